"""Sends to MLflow what it lacks of a run, from what the run left in its output folder.

For a run whose server was down when it was trained, or that was killed before its last points were
sent: train_log.jsonl has every point, tracking.json all the rest. What is there already is not sent
again, so it may be run as often as one likes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from arguments import Arguments
from llm_training.outputs import OutputError, OutputFolder
from llm_training.tracking.errors import TrackingError, first_line
from llm_training.tracking.mlflow_model import log_model
from llm_training.tracking.mlflow_run import RUN_ID_FILE, MLflowRun
from llm_training.tracking.mlflow_store import ensure_experiment, prepare_mlflow
from llm_training.tracking.note import RunNote
from llm_training.tracking.redaction import REDACTED, redact_url
from llm_training.tracking.tracked_run import Ending
from llm_training.tracking.train_log import read_points

# Of a run that is not training now and has not said how it ended.
UNKNOWN_ENDING = Ending("KILLED", reason="its process ended without a word")


class Sent(NamedTuple):
    """What was sent, and where the run is."""

    num_points: int
    num_steps: int
    num_files: int
    status: str
    run_id: str
    store: str

    @property
    def line(self) -> str:
        """All of it for the console."""
        return (
            f"sent {self.num_points:,} points of {self.num_steps:,} steps, {self.num_files} files;"
            f" status {self.status}; MLflow run {self.run_id} in {redact_url(self.store)}"
        )


def sync(folder: Path, tracking_uri: str | None, say: Callable[[str], None] = print) -> Sent:
    """Sends what the store lacks of the run in `folder`.

    Args:
        folder: the run's output_dir.
        tracking_uri: MLflow store or server; None: the one that the run was given.
        say: told what is worth a warning.

    Raises:
        TrackingError: there is no such run, it is training now, or the store cannot be reached.
    """
    if not folder.is_dir():
        raise TrackingError(f"{folder} is no folder. Give the output_dir of a run.")
    note = RunNote.read(folder)
    store = _store_of(note, tracking_uri)
    try:
        with OutputFolder(folder).lock(say):
            return _send(folder, note, store, say)
    except OutputError as error:
        raise TrackingError(f"{error} What it logs, it sends by itself.") from error


def log_model_of(folder: Path, tracking_uri: str | None, registered_name: str | None) -> str:
    """Logs the finished model of the run in `folder`; returns a line on what came of it.

    Raises:
        TrackingError: there is no such run or model, or the store does not take it.
    """
    model, note = OutputFolder(folder).final, RunNote.read(folder)
    if not model.is_dir():
        raise TrackingError(f"{model} is not there. Give the output_dir of a run that has ended.")
    store = prepare_mlflow(_store_of(note, tracking_uri), print)
    run_id_file = folder / RUN_ID_FILE
    if not run_id_file.exists():
        raise TrackingError(
            f"{folder} is in no MLflow yet: python -m llm_training.tracking sync {folder}"
        )
    run_id = run_id_file.read_text(encoding="utf-8").strip()
    try:
        step = max((point.step for point in read_points(folder, math.inf)), default=0)
        return log_model(model, store, run_id, step, registered_name).line(registered_name)
    except Exception as error:  # of whatever library
        raise TrackingError(
            f"{redact_url(store)} did not take the model ({first_line(error)})."
        ) from error


def _store_of(note: RunNote, tracking_uri: str | None) -> str:
    """The URI with its login, which is not written down anywhere."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    store = tracking_uri or note.store
    if store is None:
        raise TrackingError("The run was not to be sent to MLflow. Say where to: --tracking_uri.")
    if REDACTED not in store:
        return store
    if from_environment and redact_url(from_environment) == store:
        return from_environment
    raise TrackingError(
        f"The login of {store} is not kept. Give the whole URI as --tracking_uri, or in the"
        " environment's MLFLOW_TRACKING_URI."
    )


def _send(folder: Path, note: RunNote, store: str, say: Callable[[str], None]) -> Sent:
    arguments = Arguments(
        run_name=note.run_name,
        experiment_name=note.experiment_name,
        output_dir=str(folder),
        tracking_uri=store,
        report_to=["mlflow"],
        sweep=note.record.sweep,
    )
    run = MLflowRun(arguments, folder, note.record, say)
    try:
        _open(run, folder, note)
        num_points, num_steps = _send_points(run, folder)
        num_files = _send_files(run, folder)
        _close(run, note, ending_of(note, folder))
    except TrackingError:
        raise
    except Exception as error:  # of whatever library
        if run.run_id is not None:
            run.close(ending_of(note, folder), ())  # or it would be running for ever
        raise TrackingError(
            f"{redact_url(run.uri)} could not take the run ({first_line(error)}). See to the"
            " server, or give another --tracking_uri, and start this again: nothing is sent twice."
        ) from error
    ending = ending_of(note, folder)
    note.run_id = run.run_id
    note.ending = ending if ending.status == "FINISHED" else note.ending
    note.write(folder)
    return Sent(num_points, num_steps, num_files, ending.status, str(run.run_id), run.uri)


def ending_of(note: RunNote, folder: Path) -> Ending:
    """How the run ended; one that was killed while its trackers were told has its result."""
    if note.ending is None and OutputFolder(folder).read_result() is not None:
        return Ending("FINISHED")
    return note.ending or UNKNOWN_ENDING


def _open(run: MLflowRun, folder: Path, note: RunNote) -> None:
    """Starts the run there or goes on with it; a new one with the time at which it was trained."""
    if not (folder / RUN_ID_FILE).exists():
        from mlflow import MlflowClient

        client = MlflowClient(run.uri)
        made = client.create_run(
            ensure_experiment(client, note.experiment_name, run.uri),
            start_time=round(1000 * note.started),
            run_name=note.run_name,
        )
        (folder / RUN_ID_FILE).write_text(made.info.run_id + "\n", encoding="utf-8")
    run.start()


def _send_points(run: MLflowRun, folder: Path) -> tuple[int, int]:
    """Sends the points that are not there; returns how many, and of how many steps."""
    missing = run.missing(read_points(folder, math.inf))
    for first in range(0, len(missing), run.points_at_once):
        run.send(missing[first : first + run.points_at_once])
    return sum(len(point.metrics) for point in missing), len({point.step for point in missing})


def _send_files(run: MLflowRun, folder: Path) -> int:
    """Uploads the files of the run in place of those of their names; returns how many."""
    output = OutputFolder(folder)
    files = [path for path in (*output.artifacts(), output.result) if path.exists()]
    for path in files:
        run.upload(path)
    return len(files)


def _close(run: MLflowRun, note: RunNote, ending: Ending) -> None:
    """Tells how the run ended, and when it did."""
    from mlflow import MlflowClient

    for error in run.close(ending, ()):
        raise error
    if note.ended is not None:
        ended = round(1000 * note.ended)
        MlflowClient(run.uri).set_terminated(str(run.run_id), ending.status, end_time=ended)
