"""The record of one run: what is written where, when it starts, goes on and ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.tracking.errors import TrackingError, first_line
from llm_training.tracking.mlflow_run import (
    MLflowRun,
    Status,
    end_active_run,
    ignored_environment,
)
from llm_training.tracking.redaction import redact, redact_url
from llm_training.tracking.steady_tracker import SteadyTracker
from llm_training.tracking.train_log import TrainLog

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from arguments import Arguments


class Tracking:
    """What a run writes down, kept by the main process; on others every method does nothing.

    train_log.jsonl is always written and complete; the trackers, MLflow first, are for looking at
    it. One that cannot be started stops the run at its start; one that fails later never does.

    No method communicates between processes: all of them may call it, or one. The trackers belong
    to the thread that made this object, because MLflow's active run does.

    Attributes:
        run_id: MLflow's id of the run; None without MLflow and on other processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: Arguments,
        output_dir: Path,
        *,
        parameters: dict[str, Any],
        tags: dict[str, str] | None = None,
        resumed_step: int | None = None,
    ) -> None:
        """Starts the trackers of `arguments.report_to` and opens train_log.jsonl.

        Args:
            accelerator: its trackers become those started here, whatever it was built with.
            arguments: the logging group and `run_name`.
            output_dir: the run's folder; it also remembers which MLflow run goes on.
            parameters: what is noted of the run; secrets are taken out.
            tags: short texts about it, such as the git revision; secrets are taken out.
            resumed_step: step of the checkpoint that the run goes on from; None: a new run.

        Raises:
            TrackingError: a tracker does not start as asked. On the main process only.
        """
        self.run_id: str | None = None
        self._is_main_process: bool = accelerator.is_main_process
        if not self._is_main_process:
            return
        self._accelerator = accelerator
        self._report_to = [name for name in arguments.report_to if name != "none"]
        self._output_dir = output_dir
        self._mlflow: MLflowRun | None = None
        output_dir.mkdir(parents=True, exist_ok=True)
        tags = redact(tags or {})
        with self._start_errors_explained():
            if "mlflow" in self._report_to:
                self._mlflow = MLflowRun(arguments, output_dir, tags, resumed_step, self.say)
            self._start_trackers(arguments, resumed_step)
            self._log_parameters(redact(parameters), tags)
        self._trackers = [SteadyTracker(tracker, self.say) for tracker in accelerator.trackers]
        self._train_log = self._open_train_log(resumed_step)

    def _start_trackers(self, arguments: Arguments, resumed_step: int | None) -> None:
        """Starts Accelerate's trackers, each told how to go on after the resumed step."""
        trackers: list[GeneralTracker] = []
        with ignored_environment():
            if self._mlflow:
                trackers.append(self._mlflow.build_tracker())
            if "tensorboard" in self._report_to:
                trackers.append(_build_tensorboard(self._output_dir, resumed_step))
            if "wandb" in self._report_to:
                trackers.append(_build_wandb(self._output_dir, arguments))
            # Trackers and not their names: Accelerate leaves out a name that is not installed.
            self._accelerator.log_with = trackers
            self._accelerator.init_trackers(arguments.experiment_name)

    def _log_parameters(self, parameters: dict[str, Any], tags: dict[str, str]) -> None:
        simple = {name: _to_simple_value(value) for name, value in parameters.items()}
        for tracker in self._accelerator.trackers:
            if self._mlflow and tracker.name == "mlflow":
                self.run_id = self._mlflow.log_parameters(tracker, simple)
            else:  # the others have no tags
                tracker.store_init_configuration({**simple, **tags})

    @contextmanager
    def _start_errors_explained(self) -> Iterator[None]:
        """A run that does not start says what to do, and does not stay behind as FINISHED."""
        try:
            yield
        except Exception as error:
            self._accelerator.trackers.clear()
            if self._mlflow:
                end_active_run("FAILED")
            if isinstance(error, TrackingError):
                raise
            raise TrackingError(
                f"report_to: {' or '.join(self._report_to)} could not be started"
                f" ({first_line(error)}). See to its server or store (tracking_uri),"
                " or leave it out of report_to: train_log.jsonl is written in any case."
            ) from error

    def _open_train_log(self, resumed_step: int | None) -> TrainLog:
        log = TrainLog(self._output_dir, resumed_step)
        if log.lines_removed:
            self.say(
                f"{log.path.name}: removed {log.lines_removed} lines after step {resumed_step},"
                " which will be computed again"
            )
        return log

    def go_back(self, step: int) -> None:
        """Takes later steps out of train_log.jsonl: the run was put back behind `step`.

        Trackers keep what they were sent; the steps that come again are added to it.
        """
        if self._is_main_process:
            self._train_log.close()
            self._train_log = self._open_train_log(step)

    def say(self, line: str) -> None:
        """Prints a line on the main process's console."""
        if self._is_main_process:
            print(line, flush=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Writes metrics, such as `{"train/loss": 4.1}`, of a step; a failure is only told.

        The file comes first: what a tracker has, it has too.
        """
        if not self._is_main_process:
            return
        values = {name: float(value) for name, value in metrics.items()}
        try:
            self._train_log.write(values, step)
        except OSError as error:
            self.say(f"warning: {self._train_log.path} lacks step {step} ({first_line(error)})")
        for tracker in self._trackers:
            wanted = values
            if self._mlflow and tracker.name == "mlflow":
                wanted = self._mlflow.points_to_send(values, step)
            if wanted:
                tracker.log(wanted, step)

    def finish(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Sends what waits, uploads the artifacts (files) to MLflow and ends every tracker.

        Afterwards `accelerator.end_training()` has only the process group left to end, and no
        chance to call a failed run FINISHED. A second call does nothing.
        """
        if not self._is_main_process:
            return
        for tracker in self._trackers:
            is_answering = tracker.send_waiting()
            if tracker.name == "mlflow":
                for path in artifacts if is_answering else ():
                    tracker.attempt(partial(tracker.tracker.log_artifact, str(path)))
                tracker.attempt(partial(end_active_run, status))
            tracker.attempt(tracker.tracker.finish)
            tracker.tell_losses()
        self._trackers.clear()
        self._accelerator.trackers.clear()
        self._train_log.close()

    def review_hint(self) -> str:
        """The command, or the address, that opens this run for review."""
        if not self._is_main_process:
            return ""
        if self._mlflow and self._mlflow.uri.startswith("http"):
            return redact_url(self._mlflow.uri)
        if self._mlflow:
            store = shlex.quote(redact_url(self._mlflow.uri))
            return (
                f"{_mlflow_command()} ui --backend-store-uri {store} --host 127.0.0.1 --port 5000"
            )
        if "tensorboard" in self._report_to:
            folder = _tensorboard_folder(self._output_dir).absolute()
            return f"tensorboard --logdir {shlex.quote(str(folder))}"
        return f"less {shlex.quote(str(self._train_log.path.absolute()))}"


def _mlflow_command() -> str:
    """`mlflow`, or how this Python starts it where its environment is not the active one."""
    if shutil.which("mlflow"):
        return "mlflow"
    python = os.path.relpath(sys.executable)
    return f"{shlex.quote(sys.executable if python.startswith('..') else python)} -m mlflow"


def _tensorboard_folder(output_dir: Path) -> Path:
    return output_dir / "tensorboard"


def _build_tensorboard(output_dir: Path, resumed_step: int | None) -> GeneralTracker:
    _require_package("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    # purge_step hides what was logged after the checkpoint and will be logged again. The first
    # argument is a folder below the second: an experiment's name, such as /a/b, might leave it.
    purge_step = None if resumed_step is None else resumed_step + 1
    return TensorBoardTracker("", _tensorboard_folder(output_dir), purge_step=purge_step)


def _build_wandb(output_dir: Path, arguments: Arguments) -> GeneralTracker:
    _require_package("wandb")
    from accelerate.tracking import WandBTracker

    # "auto" goes on with a run that broke off in this folder; W&B ignores steps that it has.
    return WandBTracker(
        arguments.experiment_name, name=arguments.run_name, dir=str(output_dir), resume="auto"
    )


def _require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise TrackingError(
            f"report_to: {name} is not installed. Install it (pip install {name}) or leave it out."
        )


def _to_simple_value(value: Any) -> bool | int | float | str:
    """The value where every tracker can store it, else its JSON (null for None)."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, default=str)
