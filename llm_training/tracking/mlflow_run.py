"""The MLflow side of a run: which store, which experiment, and what an earlier start wrote there.

Accelerate's MLflow tracker starts the run, notes its parameters and uploads files. Here is what it
leaves to the script: a store and an artifact folder that do not depend on what lies in the working
folder, a run that can go on after a kill, many points in one transaction, and a true status. MLflow
takes 1.4 s to import, hence inside functions.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.tracking.errors import TrackingError
from llm_training.tracking.redaction import redact_url
from llm_training.tracking.single_point_runs import Parameters, require_package
from llm_training.tracking.tracked_run import Point, Status

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from arguments import Arguments

RUN_ID_FILE = "mlflow_run_id.txt"

# A dead server must cost the start and the end of a run seconds, where MLflow's own defaults make
# it four minutes; and a training machine calls nobody that its user did not name.
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# These would go before the arguments that describe the run, so they are taken away from MLflow.
# MLFLOW_TRACKING_URI is not among them: it decides where tracking_uri is null.
IGNORED_ENVIRONMENT = (
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TAGS",
    "MLFLOW_NESTED_RUN",
)

MAX_PARAMETER_LENGTH = 6000  # MLflow's limit in characters; Accelerate drops what is longer
CUT_MARK = "... [cut]"
MAX_METRICS_AT_ONCE = 1000  # MLflow's limit


class MLflowRun:
    """One MLflow run, new or gone on with; a `TrackedRun`.

    A point that the store already has is not sent again: the steps between the last checkpoint and
    a kill are computed twice, bit for bit, and MLflow would keep both. Every point keeps the time
    at which it was logged: of two with the same name, step, value and time, as after an answer that
    was lost, MLflow's databases keep one.

    Attributes:
        uri: of the store; absolute where it is a SQLite file.
        run_id: MLflow's id of the run; None until it is started.
    """

    name = "mlflow"
    points_at_once = 100

    def __init__(
        self,
        arguments: Arguments,
        output_dir: Path,
        parameters: Parameters,
        tags: dict[str, str],
        resumed_step: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Prepares the environment and reaches nobody; the arguments are those of `Tracking`.

        Raises:
            TrackingError: MLflow is missing.
        """
        require_package("mlflow")
        for name, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        for name in IGNORED_ENVIRONMENT:
            if os.environ.pop(name, None) is not None:
                say(f"warning: the environment's {name} is not used; the arguments decide")
        with _no_garbage_collection():
            import mlflow

        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # each new table else
        self.uri = resolve_store(arguments.tracking_uri)
        self.run_id: str | None = None
        mlflow.set_tracking_uri(self.uri)
        self._run_id_file = output_dir / RUN_ID_FILE
        self._resumed_step = -1 if resumed_step is None else resumed_step
        self._experiment_name = arguments.experiment_name
        self._run_name = arguments.run_name
        self._parameters = parameters
        self._tags = tags
        self._say = say

    def start(self) -> None:
        """Finds store, experiment and the earlier run, and has Accelerate's tracker start it.

        Raises:
            TrackingError: the experiment's name cannot be used.
            mlflow.exceptions.MlflowException: the store cannot be reached.
        """
        with _no_garbage_collection():
            self._start()

    def _start(self) -> None:
        from accelerate.tracking import MLflowTracker
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri)
        # Also where a run was killed before its first checkpoint and begins anew.
        run = self._find_earlier_run()
        self._stored_steps = self._read_stored_steps(run) if run else {}
        _ensure_experiment(self._client, self._experiment_name, self.uri)
        self._tracker: GeneralTracker = MLflowTracker(
            self._experiment_name,
            run_id=run.info.run_id if run else None,
            run_name=self._run_name,
            tags=self._tags,
        )
        try:
            self._tracker.start()
            self.run_id = str(self._tracker.tracker.info.run_id)
            self._note_run_id(self.run_id)
            self._log_parameters(self.run_id, run.data.params if run else {})
        except BaseException:
            with suppress(Exception):  # the first error tells more
                end_active_run("FAILED")
            raise

    def _find_earlier_run(self) -> Run | None:
        """The run to go on with, in whichever experiment it is; None if there is none any more."""
        from mlflow.exceptions import MlflowException

        if not self._run_id_file.exists():
            return None
        run_id = self._run_id_file.read_text(encoding="utf-8").strip()
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            self._say(
                f"warning: MLflow's run {run_id} is gone from the store; a new one is started"
            )
            self._tags = {**self._tags, "resumed_from_run": run_id}
            return None
        self._experiment_name = self._client.get_experiment(run.info.experiment_id).name
        return run

    def _read_stored_steps(self, run: Run) -> dict[str, set[int]]:
        """The steps that the store has, for each metric."""
        history = self._client.get_metric_history
        return {
            name: {point.step for point in history(run.info.run_id, name)}
            for name in run.data.metrics
        }

    def _note_run_id(self, run_id: str) -> None:
        beside = self._run_id_file.with_suffix(".tmp")
        beside.write_text(run_id + "\n", encoding="utf-8")
        beside.replace(self._run_id_file)

    def _log_parameters(self, run_id: str, stored: dict[str, str]) -> None:
        """Notes the parameters that the store does not have.

        MLflow's never change. Where a run goes on with another value than the stored one, the tag
        `resume.STEP.NAME` says "stored -> now".
        """
        now = {name: _cut(str(value)) for name, value in self._parameters.items()}
        new = {name: now[name] for name in now if name not in stored}
        self._tracker.store_init_configuration(new)
        for name in now:
            if name in stored and stored[name] != now[name]:
                tag = f"resume.{max(0, self._resumed_step)}.{name}"
                self._client.set_tag(run_id, tag, _cut(f"{stored[name]} -> {now[name]}"))

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Leaves out what the store had at the start, and NaN and infinity (it keeps 1.8e308)."""
        nothing: set[int] = set()
        wanted = []
        for point in points:
            metrics = {
                name: value
                for name, value in point.metrics.items()
                if math.isfinite(value) and point.step not in self._stored_steps.get(name, nothing)
            }
            if metrics:
                wanted.append(point._replace(metrics=metrics))
        return wanted

    def send(self, points: Sequence[Point]) -> None:
        """Sends them in as few transactions as MLflow allows."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * point.time), point.step)
            for point in self.missing(points)
            for name, value in point.metrics.items()
        ]
        for first in range(0, len(metrics), MAX_METRICS_AT_ONCE):
            part = metrics[first : first + MAX_METRICS_AT_ONCE]
            self._client.log_batch(str(self.run_id), metrics=part, synchronous=True)

    def closing_calls(self, status: Status, artifacts: Sequence[Path]) -> list[Callable[[], Any]]:
        """Uploads the artifacts, and tells the status."""
        uploads = [partial(self._tracker.log_artifact, str(path)) for path in artifacts]
        return [*uploads, partial(end_active_run, status)]


def end_active_run(status: Status) -> None:
    """Ends the active run of this thread, if there is one, with the true status.

    Accelerate's MLflow tracker could only say FINISHED, whatever happened.
    """
    import mlflow

    mlflow.end_run(status)


def resolve_store(tracking_uri: str | None) -> str:
    """The store's URI: the argument, else MLFLOW_TRACKING_URI, else mlflow.db in this folder.

    The path of a SQLite file becomes absolute, so that the review command works from anywhere.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def artifact_location(uri: str) -> str | None:
    """Where a new experiment's artifacts go; None: the server decides.

    A database without a server would put them in ./mlruns: here it is mlartifacts/, beside the
    SQLite file or in the working folder.
    """
    if uri.startswith("sqlite:///"):
        return str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    if uri.startswith(("postgresql", "mysql", "mssql")):
        return str(Path("mlartifacts").absolute())
    return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and to search it for garbage takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ensure_experiment(client: MlflowClient, name: str, uri: str) -> None:
    """Makes the experiment if it is not there, so that Accelerate's tracker finds it."""
    if "'" in name:
        raise TrackingError(
            f"experiment_name: {name!r} has a single quote, with which Accelerate's MLflow tracker"
            " cannot find it. Choose a name without one."
        )
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        client.create_experiment(name, artifact_location=artifact_location(uri))
    elif experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment_name: {name!r} was deleted in MLflow, which keeps the name. Choose another"
            f" name, or restore it: MLFLOW_TRACKING_URI={redact_url(uri)}"
            f" mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )


def _cut(value: str) -> str:
    if len(value) <= MAX_PARAMETER_LENGTH:
        return value
    return value[: MAX_PARAMETER_LENGTH - len(CUT_MARK)] + CUT_MARK
