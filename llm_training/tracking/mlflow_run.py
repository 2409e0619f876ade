"""The MLflow side of a run: which store, which experiment, and what an earlier start wrote there.

Accelerate's MLflow tracker starts the run and logs to it. Here is what it leaves to the script: a
store and an artifact folder that do not depend on what lies in the working folder, a run that can
go on after a kill, and a true status. MLflow takes 1.4 s to import, hence inside functions.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_training.tracking.errors import TrackingError
from llm_training.tracking.redaction import redact_url

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from arguments import Arguments

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id.txt"

# A dead server must cost a step seconds, where MLflow's own defaults make it four minutes; and a
# training machine calls nobody that its user did not name.
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# These would go before the arguments that describe the run, so they are hidden from MLflow.
# MLFLOW_TRACKING_URI is not among them: it decides where tracking_uri is null.
IGNORED_ENVIRONMENT = (
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TAGS",
    "MLFLOW_NESTED_RUN",
)

MAX_PARAMETER_LENGTH = 6000  # MLflow's limit in characters; Accelerate drops what is longer
CUT_MARK = "... [cut]"


class MLflowRun:
    """One MLflow run, new or gone on with.

    The constructor finds the store, the experiment and the earlier run; `build_tracker` gives
    Accelerate the tracker to start; `log_parameters` completes the started run. A point that the
    store already has is not sent again: the steps between the last checkpoint and a kill are
    computed twice, bit for bit, and MLflow would keep both.

    Attributes:
        uri: of the store; absolute where it is a SQLite file.
    """

    def __init__(
        self,
        arguments: Arguments,
        output_dir: Path,
        tags: dict[str, str],
        resumed_step: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Reaches the store; the arguments are those of `Tracking`.

        Raises:
            TrackingError: MLflow is missing, or the experiment's name cannot be used.
            mlflow.exceptions.MlflowException: the store cannot be reached.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise TrackingError(
                "report_to: mlflow is not installed. Install it (pip install mlflow) or leave it"
                " out."
            )
        for name, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        for name in IGNORED_ENVIRONMENT:
            if name in os.environ:
                say(f"warning: the environment's {name} is not used; the arguments decide")
        import mlflow

        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # each new table else
        self.uri = resolve_store(arguments.tracking_uri)
        mlflow.set_tracking_uri(self.uri)
        self._client = mlflow.MlflowClient()
        self._run_id_file = output_dir / RUN_ID_FILE
        self._resumed_step = -1 if resumed_step is None else resumed_step
        self._experiment_name = arguments.experiment_name
        self._run_name = arguments.run_name
        self._tags = tags
        # Also where a run was killed before its first checkpoint and begins anew.
        self._earlier_run = self._find_earlier_run(say)
        self._stored_points = self._read_stored_points()
        _ensure_experiment(self._client, self._experiment_name, self.uri)

    def _find_earlier_run(self, say: Callable[[str], None]) -> Run | None:
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
            say(f"warning: MLflow's run {run_id} is gone from the store; a new one is started")
            self._tags = {**self._tags, "resumed_from_run": run_id}
            return None
        self._experiment_name = self._client.get_experiment(run.info.experiment_id).name
        return run

    def _read_stored_points(self) -> set[tuple[str, int]]:
        """The (metric, step) pairs logged from the resumed step on, which may come again."""
        if not self._earlier_run:
            return set()
        run_id = self._earlier_run.info.run_id
        return {
            (name, point.step)
            for name in self._earlier_run.data.metrics
            for point in self._client.get_metric_history(run_id, name)
            if point.step >= self._resumed_step
        }

    def build_tracker(self) -> GeneralTracker:
        """Accelerate's tracker for this run, to be made and started in `ignored_environment`."""
        from accelerate.tracking import MLflowTracker

        return MLflowTracker(
            self._experiment_name,
            run_id=self._earlier_run.info.run_id if self._earlier_run else None,
            run_name=self._run_name,
            tags=self._tags,
        )

    def log_parameters(self, tracker: GeneralTracker, parameters: dict[str, Any]) -> str:
        """Completes the run that the tracker started; returns its id and notes it in a file.

        MLflow's parameters never change. Where a run goes on with another value than the stored
        one, the tag `resume.STEP.NAME` says "stored -> now".
        """
        run_id: str = tracker.tracker.info.run_id
        stored = self._earlier_run.data.params if self._earlier_run else {}
        now = {name: _cut(str(value)) for name, value in parameters.items()}
        tracker.store_init_configuration({name: now[name] for name in now if name not in stored})
        for name in now:
            if name in stored and stored[name] != now[name]:
                tag = f"resume.{max(0, self._resumed_step)}.{name}"
                self._client.set_tag(run_id, tag, _cut(f"{stored[name]} -> {now[name]}"))
        beside = self._run_id_file.with_suffix(".tmp")
        beside.write_text(run_id + "\n", encoding="utf-8")
        beside.replace(self._run_id_file)
        return run_id

    def points_to_send(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        """Leaves out what the store already has, and NaN and infinity (it keeps 1.8e308)."""
        return {
            name: value
            for name, value in metrics.items()
            if math.isfinite(value) and (name, step) not in self._stored_points
        }


def end_active_run(status: Status) -> None:
    """Ends MLflow's active run, if there is one, with the true status.

    Accelerate's `end_training` and MLflow's exit hook say FINISHED whatever happened; after this
    they find no run to say it of.
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


@contextmanager
def ignored_environment() -> Iterator[None]:
    """Hides IGNORED_ENVIRONMENT while a run is started."""
    hidden = {name: os.environ.pop(name) for name in IGNORED_ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _cut(value: str) -> str:
    if len(value) <= MAX_PARAMETER_LENGTH:
        return value
    return value[: MAX_PARAMETER_LENGTH - len(CUT_MARK)] + CUT_MARK
