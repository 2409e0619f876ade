"""The record of one run: what is written where, when it starts, goes on and ends."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llm_training.tracking.errors import TrackingError, first_line
from llm_training.tracking.mlflow_model import log_model_in_time
from llm_training.tracking.mlflow_process import MLflowProcess
from llm_training.tracking.note import RunNote, first_start
from llm_training.tracking.record import RunRecord
from llm_training.tracking.redaction import redact_url
from llm_training.tracking.single_point_runs import TensorBoardRun, WandbRun
from llm_training.tracking.steady_tracker import SteadyTracker
from llm_training.tracking.tracked_run import Ending, Point, Status, TrackedRun
from llm_training.tracking.train_log import TrainLog, points_between, read_points

if TYPE_CHECKING:
    from accelerate import Accelerator

    from arguments import Arguments

# How long the end of a run waits for its trackers. A launcher kills what is still there 30 s after
# SIGTERM, or after another process failed, and the last checkpoint has had its share of them.
END_SECONDS: dict[Status, float] = {"FINISHED": 30.0, "FAILED": 10.0, "KILLED": 10.0}
SEND_SECONDS = 5.0  # for the last points, before the model is logged


class Tracking:
    """What a run writes down, kept by the main process; on others every method does nothing.

    train_log.jsonl is always written and complete; the trackers, MLflow first, are for looking at
    it. A thread for each sends it what is logged, MLflow's by way of a process of its own: one that
    fails, is slow or hangs in mid-run costs the loop nothing. One that cannot be started ends the
    run at its start, unless `arguments.tracking` is "optional".

    A kill loses what a tracker was yet to be sent; the next start finds it in train_log.jsonl, and
    so does `python -m llm_training.tracking sync OUTPUT_DIR`, with what tracking.json says.

    No method communicates between processes: all of them may call it, or one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: Arguments,
        output_dir: Path,
        *,
        record: RunRecord,
    ) -> None:
        """Starts the trackers of `arguments.report_to` and opens train_log.jsonl.

        Args:
            accelerator: says which process is the main one; it need not know the trackers.
            arguments: the logging group and `run_name`.
            output_dir: the run's folder; it also remembers which MLflow run goes on.
            record: what is noted of the run, without secrets.

        Raises:
            TrackingError: a tracker does not start as asked. On the main process only.
        """
        self._is_main_process: bool = accelerator.is_main_process
        self._mlflow: MLflowProcess | None = None
        self._trackers: list[SteadyTracker] = []
        self._last_step = 0  # that was logged
        if not self._is_main_process:
            return
        self._output_dir = output_dir
        output_dir.mkdir(parents=True, exist_ok=True)
        runs = self._build_runs(arguments, record)
        earlier: list[Point] = []
        if runs and record.resumed_step is not None:
            earlier = read_points(output_dir, record.resumed_step)
        for run in runs:
            self._start_tracker(run, earlier, is_required=arguments.tracking == "required")
        # Not before: a run that does not begin leaves log and note as they are.
        self._train_log = self._open_train_log(record.resumed_step)
        self._note = RunNote(
            record=record,
            experiment_name=arguments.experiment_name,
            run_name=arguments.run_name,
            store=redact_url(self._mlflow.uri) if self._mlflow else None,
            run_id=self.run_id,
        )
        self._note.started = first_start(output_dir) or self._note.started
        self._write_note()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None without MLflow, on other processes, and until it answers."""
        return self._mlflow.run_id if self._mlflow else None

    def _build_runs(self, arguments: Arguments, record: RunRecord) -> list[TrackedRun]:
        """What `arguments.report_to` names, not started yet."""
        folder, runs = self._output_dir, list[TrackedRun]()
        if "mlflow" in arguments.report_to:
            self._mlflow = MLflowProcess(arguments, folder, record, self.say)
            runs.append(self._mlflow)
        if "tensorboard" in arguments.report_to:
            runs.append(TensorBoardRun(_tensorboard_folder(folder), record))
        if "wandb" in arguments.report_to:
            runs.append(WandbRun(arguments, folder, record))
        self._report_to = [run.name for run in runs]
        return runs

    def _start_tracker(self, run: TrackedRun, earlier: list[Point], *, is_required: bool) -> None:
        """A run that does not start says what to do, and does not stay behind as FINISHED."""
        tracker = SteadyTracker(
            run,
            self.say,
            earlier,
            read_log=partial(points_between, self._output_dir),
            remedy=f"Send them later: {self._command('sync')}" if run is self._mlflow else "",
        )
        try:
            tracker.start(is_required=is_required)
        except Exception as error:
            self._end_trackers(Ending("FAILED"), ())
            if isinstance(error, TrackingError):
                raise
            raise TrackingError(
                f"report_to: {run.name} could not be started ({first_line(error)}). See to its"
                " server or store (tracking_uri), leave it out of report_to, or give"
                " --tracking optional: train_log.jsonl is written in any case."
            ) from error
        self._trackers.append(tracker)

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
            if self._mlflow and self._last_step > step:
                self._mlflow.note_rewind(step, self._last_step)
            self._last_step = step

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
        point = Point(values, step, round(time.time(), 3))
        self._last_step = step
        try:
            self._train_log.write(point)
        except OSError as error:
            self.say(f"warning: {self._train_log.path} lacks step {step} ({first_line(error)})")
        for tracker in self._trackers:
            tracker.log(point)

    def flush(self, artifacts: Sequence[Path] = ()) -> None:
        """Puts the log on the disk, and asks the trackers to send now and to keep these files.

        After each checkpoint. The trackers' part is only queued.
        """
        if not self._is_main_process:
            return
        try:
            self._train_log.flush()
        except OSError as error:
            self.say(
                f"warning: {self._train_log.path} may not be on the disk ({first_line(error)})"
            )
        for tracker in self._trackers:
            tracker.flush(artifacts)
        if self.run_id != self._note.run_id:
            self._write_note()

    def log_model(self, folder: Path, registered_name: str | None) -> None:
        """Logs the finished model in `folder` to MLflow, waits for it, and says what came of it.

        Args:
            folder: a plain Hugging Face folder.
            registered_name: in MLflow's registry; None: do not register it.
        """
        if self._mlflow is None:
            self.say("warning: log_model and register_model do nothing without mlflow in report_to")
            return
        self.flush()
        give_up_at = time.monotonic() + SEND_SECONDS
        while any(tracker.num_unsent for tracker in self._trackers):
            if time.monotonic() > give_up_at:
                break
            time.sleep(0.02)  # the model takes over what its run has of its last step
        name = f" --register_model {shlex.quote(registered_name)}" if registered_name else ""
        log_model_in_time(
            folder,
            self._mlflow.uri,
            self.run_id,
            self._last_step,
            registered_name,
            self.say,
            remedy=f"Do it later: {self._command('log_model')}{name}",
        )

    def _command(self, name: str) -> str:
        """The command that does a thing to this run's record later."""
        return f"python -m llm_training.tracking {name} {shlex.quote(str(self._output_dir))}"

    def finish(
        self,
        status: Status,
        artifacts: Sequence[Path] = (),
        *,
        error: str = "",
        reason: str = "",
    ) -> None:
        """Sends what waits, uploads the artifacts (files) to MLflow and ends every tracker.

        A tracker that needs longer than END_SECONDS is left to itself, and what it lacks is told.
        A second call does nothing.

        Args:
            status: how the run ended.
            artifacts: files.
            error: the last lines of the traceback that ended it, if one did.
            reason: what stopped it, such as a signal.
        """
        if not self._is_main_process or self._note.ending:
            return
        ending = Ending(status, error, reason)
        self._note.ending, self._note.ended = ending, round(time.time(), 3)
        self._write_note()  # first: a launcher may end this process while a tracker is waited for
        self._end_trackers(ending, artifacts)
        if self.run_id != self._note.run_id:
            self._write_note()
        self._train_log.close()

    def _write_note(self) -> None:
        self._note.run_id = self.run_id
        try:
            self._note.write(self._output_dir)
        except OSError as error:
            self.say(f"warning: tracking.json is not up to date ({first_line(error)})")

    def _end_trackers(self, ending: Ending, artifacts: Sequence[Path]) -> None:
        seconds = END_SECONDS[ending.status]
        give_up_at = time.monotonic() + seconds
        for tracker in self._trackers:
            tracker.begin_end(ending, artifacts, seconds)
        for tracker in self._trackers:
            tracker.wait_for_end(give_up_at - time.monotonic())
        self._trackers.clear()

    def review_hint(self) -> str:
        """The command, or the address, that opens this run for review."""
        if not self._is_main_process:
            return ""
        if self._mlflow and self._mlflow.uri.startswith("http"):
            return redact_url(self._mlflow.page)
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
