"""The MLflow side of a run: begun or gone on with, fed, and ended with the truth.

MLflow's client does the work: what MLflow calls the active run has a status of its own making, and
Accelerate's tracker would bring torch into the process that sends. Here is what goes beyond: a run
that can go on after a kill, many points in one transaction, what the run was trained on, files that
are replaced as they grow, and a true status.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llm_training.imports import no_garbage_collection
from llm_training.tracking.mlflow_notes import (
    DESCRIPTION_TAG,
    TABLES,
    TABLES_TAG,
    artifact_folder,
    context_tags,
    cut,
    dataset_inputs,
    description,
    ending_tags,
    outdated_tags,
    with_table,
)
from llm_training.tracking.mlflow_store import ensure_experiment, page_of, prepare_mlflow
from llm_training.tracking.mlflow_sweep import (
    PARENT_RUN_ID,
    Result,
    best_result,
    find_or_make_parent,
    note_result,
)
from llm_training.tracking.record import RunRecord
from llm_training.tracking.tracked_run import Ending, Point, attempt_all

if TYPE_CHECKING:
    from mlflow.entities import Run

    from arguments import Arguments

RUN_ID_FILE = "mlflow_run_id.txt"
# MLflow's limits.
MAX_METRICS_AT_ONCE = 1000
MAX_PARAMETERS_AT_ONCE = MAX_TAGS_AT_ONCE = 100
DECIDING_METRIC = "eval/loss"  # where the record names no other
FALLING = ("loss", "perplexity", "bits_per_byte")  # as the evaluation has it: the lower the better

Item = TypeVar("Item")


class MLflowRun:
    """One MLflow run, new or gone on with; a `TrackedRun`.

    A point that the store already has is not sent again: the steps between the last checkpoint and
    a kill are computed twice, bit for bit, and MLflow would keep both. Every point keeps the time
    at which it was logged: of two with the same name, step, value and time, as after an answer that
    was lost, MLflow's databases keep one.

    Attributes:
        uri: of the store; absolute where it is a SQLite file.
        run_id: MLflow's id of the run; None until it is started.
        page: of the run on a server, in MLflow's view for training; its first page until then.
    """

    name = "mlflow"
    points_at_once = 100

    def __init__(
        self,
        arguments: Arguments,
        output_dir: Path,
        record: RunRecord,
        say: Callable[[str], None],
    ) -> None:
        """Prepares the environment and reaches nobody; the arguments are those of `Tracking`.

        Raises:
            TrackingError: MLflow is missing.
        """
        self.uri = prepare_mlflow(arguments.tracking_uri, say)
        self.run_id: str | None = None
        self.page = self.uri
        self._output_dir = output_dir
        self._run_id_file = output_dir / RUN_ID_FILE
        self._experiment_name = arguments.experiment_name
        self._run_name = arguments.run_name
        self._record = record
        self._say = say
        self._rewinds: list[tuple[int, int]] = []  # not told yet
        self._num_rewinds = 0
        self._stored_until = math.inf  # later steps were computed again since the start

    # -------------------------------------------------------------------------------- the start

    def start(self) -> None:
        """Finds store, experiment and the earlier run, and begins the run or goes on with it.

        Raises:
            TrackingError: the experiment's name cannot be used.
            mlflow.exceptions.MlflowException: the store cannot be reached.
        """
        with no_garbage_collection():
            self._start()

    def _start(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri)
        # Also where a run was killed before its first checkpoint and begins anew.
        run, tags = self._find_earlier_run()
        self._stored_steps = self._read_stored_steps(run) if run else {}
        experiment_id = ensure_experiment(self._client, self._experiment_name, self.uri)
        tags |= {name: cut(text) for name, text in self._record.tags.items()}
        tags |= self._sweep_tags(experiment_id)
        run_id = self._begin(experiment_id, tags) if run is None else self._go_on(run, tags)
        try:
            self._note_run_id(run_id)
            self._log_parameters(run_id, run.data.params if run else {})
            self._log_surroundings(run_id, run.data.tags if run else {})
        except BaseException:
            with suppress(Exception):  # the first error tells more
                self._client.set_terminated(run_id, "FAILED")
            raise
        self.run_id, self.page = run_id, page_of(self.uri, experiment_id, run_id)

    def _begin(self, experiment_id: str, tags: dict[str, str]) -> str:
        tags = context_tags() | tags
        run = self._client.create_run(experiment_id, tags=tags, run_name=self._run_name)
        return str(run.info.run_id)

    def _go_on(self, run: Run, tags: dict[str, str]) -> str:
        from mlflow.entities import RunTag

        run_id = str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING", name=self._run_name)
        for part in parts([RunTag(*item) for item in tags.items()], MAX_TAGS_AT_ONCE):
            self._client.log_batch(run_id, tags=part, synchronous=True)
        return run_id

    def _find_earlier_run(self) -> tuple[Run | None, dict[str, str]]:
        """The run to go on with, in whichever experiment it is; else a tag on one that is gone."""
        from mlflow.exceptions import MlflowException

        if not self._run_id_file.exists():
            return None, {}
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
            return None, {"resumed_from_run": run_id}
        self._experiment_name = self._client.get_experiment(run.info.experiment_id).name
        return run, {}

    def _read_stored_steps(self, run: Run) -> dict[str, set[int]]:
        """The steps that the store has, for each metric."""
        history = self._client.get_metric_history
        return {
            name: {point.step for point in history(run.info.run_id, name)}
            for name in run.data.metrics
        }

    def _sweep_tags(self, experiment_id: str) -> dict[str, str]:
        sweep = self._record.sweep
        if sweep is None:
            return {}
        parent = find_or_make_parent(self._client, experiment_id, sweep)
        return {"sweep": sweep, PARENT_RUN_ID: parent}

    def _note_run_id(self, run_id: str) -> None:
        beside = self._run_id_file.with_suffix(".tmp")
        beside.write_text(run_id + "\n", encoding="utf-8")
        beside.replace(self._run_id_file)

    def _log_parameters(self, run_id: str, stored: dict[str, str]) -> None:
        """Notes the parameters that the store does not have.

        MLflow's never change. Where a run goes on with another value than the stored one, the tag
        `resume.STEP.NAME` says "stored -> now".
        """
        from mlflow.entities import Param

        now = {name: cut(str(value)) for name, value in self._record.parameters.items()}
        new = [Param(name, now[name]) for name in now if name not in stored]
        for part in parts(new, MAX_PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=part, synchronous=True)
        for name in now:
            if name in stored and stored[name] != now[name]:
                tag = f"resume.{self._record.resumed_step or 0}.{name}"
                self._client.set_tag(run_id, tag, cut(f"{stored[name]} -> {now[name]}"))

    def _log_surroundings(self, run_id: str, stored_tags: dict[str, str]) -> None:
        """Notes the datasets and the description; what is true no more is taken away."""
        if datasets := dataset_inputs(self._record):
            self._client.log_inputs(run_id, datasets)
        for name in outdated_tags(stored_tags, self._record):
            self._client.delete_tag(run_id, name)
        self._num_rewinds = sum(name.startswith("rewound.") for name in stored_tags)
        self._client.set_tag(run_id, DESCRIPTION_TAG, description(self._record, run_id, None))

    # ------------------------------------------------------------------------------- the middle

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Leaves out what the store had at the start, and NaN and infinity (it keeps 1.8e308)."""
        nothing: set[int] = set()
        wanted = []
        for point in points:
            metrics = {
                name: value
                for name, value in point.metrics.items()
                if math.isfinite(value)
                and not (
                    point.step <= self._stored_until
                    and point.step in self._stored_steps.get(name, nothing)
                )
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
        for part in parts(metrics, MAX_METRICS_AT_ONCE):
            self._client.log_batch(str(self.run_id), metrics=part, synchronous=True)
        self._tell_rewinds()

    def note_rewind(self, first: int, last: int, is_told: bool = False) -> None:
        """Has it told that the run went back from step `last` behind step `first`; on any thread.

        MLflow takes no point back: those of both passes are in the curves.

        Args:
            first: behind which it is computed again.
            last: that was computed before.
            is_told: MLflow has been told, by a process before this one.
        """
        if not is_told:
            self._rewinds.append((first, last))
        self._stored_until = min(self._stored_until, first)

    def _tell_rewinds(self) -> None:
        while self._rewinds:
            first, last = self._rewinds[0]
            text = f"steps {first + 1}-{last} were computed again, from step {first} on"
            self._client.set_tag(str(self.run_id), f"rewound.{self._num_rewinds + 1}", text)
            self._num_rewinds += 1
            self._rewinds.pop(0)

    def upload(self, path: Path) -> None:
        """Keeps a copy of a file, in the folder that it has below the output folder."""
        run_id, folder = str(self.run_id), artifact_folder(path, self._output_dir)
        self._client.log_artifact(run_id, str(path), folder)
        if folder is None and path.name in TABLES:
            tables = self._client.get_run(run_id).data.tags.get(TABLES_TAG)
            if (now := with_table(tables, path.name)) != tables:
                self._client.set_tag(run_id, TABLES_TAG, now)

    # ---------------------------------------------------------------------------------- the end

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        """Notes how it went, uploads the artifacts, and tells the status."""
        calls: list[Callable[[], Any]] = [
            partial(self._note_ending, ending),
            *(partial(self.upload, path) for path in artifacts),
            self._note_result,
            partial(self._client.set_terminated, str(self.run_id), ending.status),
        ]
        return attempt_all(calls)

    def _note_ending(self, ending: Ending) -> None:
        self._tell_rewinds()
        for name, text in ending_tags(ending).items():
            self._client.set_tag(str(self.run_id), name, text)

    def _note_result(self) -> None:
        """Puts the best result into the description, and has the sweep know it."""
        run_id, (metric, rises) = str(self.run_id), deciding_metric(self._record)
        result: Result | None = best_result(self._client, run_id, metric, rises=rises)
        if result is None:
            return
        text = description(self._record, run_id, result)
        self._client.set_tag(run_id, DESCRIPTION_TAG, text)
        if self._record.sweep is None:
            return
        run = self._client.get_run(run_id)
        # Asked for anew: two that were made at once, or one that was deleted meanwhile.
        parent = find_or_make_parent(self._client, run.info.experiment_id, self._record.sweep)
        if run.data.tags.get(PARENT_RUN_ID) != parent:
            self._client.set_tag(run_id, PARENT_RUN_ID, parent)
        note_result(self._client, run, parent, result)


def deciding_metric(record: RunRecord) -> tuple[str, bool]:
    """The metric that says which of two runs is better, and whether higher is."""
    metric = str(record.parameters.get("metric_for_best_model", DECIDING_METRIC))
    rises = record.parameters.get("greater_is_better")
    is_falling = metric.rpartition("/")[-1] in FALLING
    return metric, rises if isinstance(rises, bool) else not is_falling


def parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items, so many at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))
