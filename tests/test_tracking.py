"""Proves that the record of a run is true and complete, whatever happens to the run or a tracker.

MLflow is the real one on SQLite, TensorBoard too, and so is the Accelerator.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from arguments import Arguments
from llm_training.export import ExportError
from llm_training.stopping import Stopped
from llm_training.tracking import (
    Tracking,
    TrackingError,
    evaluation_line,
    last_lines,
    progress_line,
)
from llm_training.tracking.mlflow_run import MLflowRun
from llm_training.tracking.note import RunNote
from llm_training.tracking.record import RunRecord
from llm_training.tracking.single_point_runs import TensorBoardRun
from llm_training.tracking.tracked_run import Ending, Point
from llm_training.tracking.train_log import TrainLog, read_points
from tests.small_runs import open_place, train_small
from tests.tracked_runs import (
    Start,
    kill,
    log_lines,
    log_loss,
    open_folder,
    started_here,
    stored_points,
    stored_run,
    wait_until_sent,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_folder(tmp_path, empty_store, monkeypatch)


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with started_here(folder, monkeypatch) as start:
        yield start


def wait_for_rest(tracking: Tracking) -> None:
    """Waits until a tracker that failed is left alone, and tries no more."""
    give_up_at = time.monotonic() + 30
    while not any(tracker._next_at > time.monotonic() + 1 for tracker in tracking._trackers):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def point(step: int, **metrics: float) -> Point:
    return Point(metrics or {"train/loss": 1.0}, step, 1.8e9 + step)


# ---------------------------------------------------------------------------------- train_log.jsonl


def test_a_line_has_step_time_and_metrics(folder: Path, start: Start) -> None:
    tracking = start(report_to=["none"])
    values: dict[str, Any] = {"train/loss": torch.tensor(2.5), "train/grad_norm": np.float32(0.5)}
    tracking.log(values, 10)
    # Read while the file is open: the line has left the process.
    (line,) = log_lines(folder)
    assert line.pop("time") > 1.7e9
    assert line == {"step": 10, "train/loss": 2.5, "train/grad_norm": 0.5}


def test_what_is_not_finite_is_valid_json_and_reads_back(folder: Path, start: Start) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    start(report_to=["none"]).log(values, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "out" / "train_log.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert str({name: float(line[name]) for name in values}) == str(values)


def test_a_resumed_log_loses_later_steps_and_the_torn_line_only(tmp_path: Path) -> None:
    log = TrainLog(tmp_path)
    for step in (0, 10, 20, 30, 40):
        log.write(point(step))
    log.write(point(20, **{"eval/loss": 2.0}))
    whole = log.path.read_bytes()
    with open(log.path, "ab") as file:
        file.write(b'{"step": 5, "train/lo')  # killed while writing

    resumed = TrainLog(tmp_path, resumed_step=20)
    resumed.write(point(30, **{"train/loss": 3.0}))

    lines = log.path.read_bytes().splitlines()
    kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= 20]
    assert lines[:-1] == kept  # to the byte, the times too
    assert json.loads(lines[-1])["train/loss"] == 3.0
    assert resumed.lines_removed == 3
    assert read_points(tmp_path, 10) == [point(0), point(10)]


def test_a_kill_while_the_log_is_rewritten_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TrainLog(tmp_path)
    for step in (10, 20):
        log.write(point(step))
    before = log.path.read_bytes()

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        TrainLog(tmp_path, resumed_step=10)
    assert log.path.read_bytes() == before


def test_a_new_run_keeps_the_log_that_it_finds(tmp_path: Path) -> None:
    TrainLog(tmp_path).write(point(10))
    log = TrainLog(tmp_path)
    assert log.path.read_bytes() == b""
    assert b'"step": 10' in (tmp_path / "train_log.old.jsonl").read_bytes()


def test_a_full_disk_is_told_and_does_not_end_the_run(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: TrainLog, point: Point) -> None:
        raise OSError(28, "No space left on device")

    tracking = start(report_to=["none"])
    monkeypatch.setattr(TrainLog, "write", fail)
    log_loss(tracking, 10)
    assert "lacks step 10" in capsys.readouterr().out


def test_a_line_that_a_full_disk_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    class Cutting:
        """A file of which the disk takes ten bytes, and says so in place of an error."""

        def write(self, content: bytes) -> int:
            return whole.write(content[:10])

    log = TrainLog(tmp_path)
    whole: Any = log._file
    log.write(point(10))
    log._file = Cutting()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.write(point(20))
    log._file = whole
    log.write(point(30))
    log.write(point(40))
    assert read_points(tmp_path, 40) == [point(10), point(30), point(40)]


# --------------------------------------------------------------------------- failures and kills


def test_mlflow_breaking_down_in_mid_run_does_not_end_the_run(
    folder: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracking = start(report_to=["mlflow", "tensorboard"])
    log_loss(tracking, 10)
    wait_until_sent(tracking)
    with monkeypatch.context() as patch:
        was_tried = threading.Event()

        def fail(*arguments: Any, **options: Any) -> None:
            was_tried.set()
            raise ConnectionError("http://me:password@host is down")

        patch.setattr(MlflowClient, "log_batch", fail)
        log_loss(tracking, 20, 30)
        assert was_tried.wait(30)
        wait_for_rest(tracking)
    tracking.finish("FINISHED", [folder / "missing.json"])

    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 2  # when it failed, and the count at the end
    assert "http://[redacted]@host is down" in warnings[0]
    assert re.search(r"failed \d times; no metrics are missing", warnings[1])
    assert [line["step"] for line in log_lines(folder)] == [10, 20, 30]
    assert tensorboard_steps(folder) == [10, 20, 30]
    # What waited was sent at the end.
    assert [step for step, _ in stored_points(tracking.run_id, "train/loss")] == [10, 20, 30]
    assert stored_run(tracking.run_id).info.status == "FINISHED"


def test_an_answer_that_is_lost_doubles_no_point(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = MlflowClient.log_batch, []

    def lose_the_first_answer(*arguments: Any, **options: Any) -> None:
        log_batch(*arguments, **options)
        calls.append(arguments)
        if len(calls) == 1:
            raise ConnectionError("timed out")

    tracking = start()
    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first_answer)
    log_loss(tracking, 10, 20)
    tracking.finish("FINISHED")
    assert len(calls) > 1
    assert stored_points(tracking.run_id, "train/loss") == [(10, 10.0), (20, 20.0)]


def test_many_points_go_in_one_transaction_and_keep_their_times(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, sizes = MlflowClient.log_batch, []
    is_sending, is_open = threading.Event(), threading.Event()

    def note(*arguments: Any, metrics: Any, **options: Any) -> None:
        is_sending.set()
        assert is_open.wait(30)
        sizes.append(len(metrics))
        log_batch(*arguments, metrics=metrics, **options)

    tracking = start()
    monkeypatch.setattr(MlflowClient, "log_batch", note)
    for step in range(60):
        tracking.log({f"m{index}": 0.5 for index in range(20)}, step)
        assert step or is_sending.wait(30)
    is_open.set()
    tracking.finish("FINISHED")
    assert sizes == [20, 1000, 180]  # MLflow takes 1,000 at once
    history = MlflowClient().get_metric_history(str(tracking.run_id), "m7")
    times = {point.step: point.timestamp for point in history}
    assert times == {line["step"]: round(1000 * line["time"]) for line in log_lines(folder)}


def test_points_that_a_kill_lost_follow_at_the_next_start(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    log_loss(first, 10, 20)
    wait_until_sent(first)
    with monkeypatch.context() as patch:
        patch.setattr(MLflowRun, "send", lambda *arguments: time.sleep(0.2))  # swallowed
        first.log({"train/loss": 30.0, "train/grad_norm": math.nan, "eval/loss": 3.0}, 30)
        log_loss(first, 40, 50)
        kill(first)
    assert [step for step, _ in stored_points(first.run_id, "train/loss")] == [10, 20]

    second = start(resumed_step=40)  # and so the lost points of 30 and 40 are not computed again
    log_loss(second, 50, 60)
    second.finish("FINISHED")
    assert second.run_id == first.run_id
    steps = [10, 20, 30, 40, 50, 60]
    assert stored_points(first.run_id, "train/loss") == [(step, float(step)) for step in steps]
    assert stored_points(first.run_id, "eval/loss") == [(30, 3.0)]
    assert "train/grad_norm" not in stored_run(first.run_id).data.metrics
    assert [line["step"] for line in log_lines(folder)] == steps


KILLED_RUN = """
import sys, time
from pathlib import Path
from accelerate import Accelerator
from arguments import Arguments
from llm_training.tracking import Tracking
from llm_training.tracking.note import RunNote
from llm_training.tracking.record import RunRecord
arguments, record = Arguments(run_name="tiny"), RunRecord({})
tracking = Tracking(Accelerator(cpu=True), arguments, Path("out"), record=record)
tracking.log({"train/loss": 10.0}, 10)
while any(tracker.num_unsent for tracker in tracking._trackers):
    time.sleep(0.01)
print("lock it", flush=True)
sys.stdin.readline()
for step in (20, 30, 40):
    tracking.log({"train/loss": float(step)}, step)
print("logged", flush=True)
time.sleep(300)
"""


def test_a_real_kill_while_another_process_locks_the_database(folder: Path, start: Start) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    assert run.stdin and run.stdout
    assert run.stdout.readline() == "lock it\n"
    holder = sqlite3.connect("mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    print("go on", file=run.stdin, flush=True)
    assert run.stdout.readline() == "logged\n"  # though nothing of it can be stored
    run.send_signal(signal.SIGKILL)
    run.communicate()
    holder.rollback()
    holder.close()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    run_id = (folder / "out" / "mlflow_run_id.txt").read_text().strip()
    wait_until(lambda: stored_run(run_id).info.status == "KILLED")
    assert stored_points(run_id, "train/loss") == [(10, 10.0)]

    second = start(resumed_step=30)
    log_loss(second, 40)
    second.finish("FINISHED")
    assert second.run_id == run_id
    expected = [(step, float(step)) for step in (10, 20, 30, 40)]
    assert stored_points(run_id, "train/loss") == expected
    assert stored_run(run_id).info.status == "FINISHED"


def test_a_locked_database_costs_a_warning_and_no_point(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.store.db import utils

    # MLflow itself waits 20 seconds for SQLite.
    text = utils.sql.text
    hasty = SimpleNamespace(text=lambda words: text(words.replace("= 20000", "= 50")))
    monkeypatch.setattr(utils, "sql", hasty)
    tracking = start()
    holder = sqlite3.connect("mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    log_loss(tracking, 1, 2)
    wait_for_rest(tracking)
    holder.rollback()
    holder.close()
    tracking.finish("FINISHED")
    said = capsys.readouterr().out
    assert said.count("database is locked") == 1
    assert "no metrics are missing there" in said
    assert stored_points(tracking.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_a_database_that_goes_away_does_not_end_the_run(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = start()
    log_loss(tracking, 1)
    wait_until_sent(tracking)
    (folder / "mlflow.db").unlink()
    log_loss(tracking, 2)
    tracking.finish("FINISHED")
    said = capsys.readouterr().out
    assert said.count("Training goes on, train_log.jsonl stays complete") == 1
    assert "1 logged points are missing there" in said
    assert [line["step"] for line in log_lines(folder)] == [1, 2]


def test_a_tracker_that_hangs_keeps_neither_the_loop_nor_the_end(
    folder: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_open = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args, **options: is_open.wait())
    monkeypatch.setattr("llm_training.tracking.tracking.END_SECONDS", {"KILLED": 0.5})
    tracking = start(report_to=["mlflow", "tensorboard"])
    (tracker, _) = tracking._trackers
    log_loss(tracking, *range(1, 101))
    began = time.monotonic()
    tracking.finish("KILLED")
    assert time.monotonic() - began < 10
    is_open.set()
    tracker._thread.join()
    said = capsys.readouterr().out
    lost = "mlflow does not answer; 100 logged points and how the run ended are missing there"
    assert lost in said
    assert len(log_lines(folder)) == 100
    assert tensorboard_steps(folder) == list(range(1, 101))  # the one does not hold up the other


# ----------------------------------------------------------------------- checkpoints and the note


def test_a_checkpoint_puts_the_log_on_the_disk_and_sends_what_waits(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: order.append(os.fstat(descriptor).st_ino))
    tracking = start()
    monkeypatch.setattr("llm_training.tracking.steady_tracker.SEND_INTERVAL_SECONDS", 1000.0)
    log_loss(tracking, 10)
    wait_until_sent(tracking)
    log_loss(tracking, 20)
    ledger = folder / "out" / "ledger.json"
    ledger.write_text("{}")
    tracking.flush([ledger])
    log = folder / "out" / "train_log.jsonl"
    assert order[-1] == log.stat().st_ino
    artifacts = folder / "mlartifacts" / str(tracking.run_id) / "artifacts"
    wait_until((artifacts / "ledger.json").exists)
    assert stored_points(tracking.run_id, "train/loss") == [(10, 10.0), (20, 20.0)]


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_the_note_tells_how_the_run_ended_before_a_tracker_is_waited_for(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Ending | None] = []
    close = MLflowRun.close

    def look_and_close(self: MLflowRun, *arguments: Any) -> Any:
        noted.append(RunNote.read(folder / "out").ending)
        return close(self, *arguments)

    tracking = start(parameters={"seed": 1})
    note = RunNote.read(folder / "out")
    assert (note.ending, note.run_id) == (None, tracking.run_id)
    assert note.store == f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setattr(MLflowRun, "close", look_and_close)
    tracking.finish("FAILED", error="ValueError: no")
    tracking.finish("FINISHED")  # a second call changes nothing
    assert noted == [Ending("FAILED", error="ValueError: no")]
    assert RunNote.read(folder / "out").ending == noted[0]


def test_the_note_keeps_the_first_start_and_no_login(folder: Path, start: Start) -> None:
    first = start(report_to=["none"])
    first.finish("KILLED", reason="SIGTERM")
    started = RunNote.read(folder / "out").started
    start(resumed_step=10, report_to=["none"])
    again = RunNote.read(folder / "out")
    assert (again.started, again.ending, again.store) == (started, None, None)


def test_a_run_that_does_not_begin_leaves_the_note_of_the_one_before(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    start(report_to=["none"]).finish("FINISHED")
    before = (folder / "out" / "tracking.json").read_bytes()
    with pytest.raises(TrackingError):
        start(tracking_uri="http://127.0.0.1:9")
    assert (folder / "out" / "tracking.json").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ExportError("no https://me:password@host"), 1, ("FAILED", "")),
        (Stopped("SIGTERM", "at step 4"), 143, ("KILLED", "SIGTERM")),
    ],
)
def test_the_script_tells_what_ended_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    expected: tuple[str, str],
) -> None:
    place = open_place(tmp_path, monkeypatch)

    def fail(run: Any) -> None:
        raise error

    monkeypatch.setattr("train_llm.train", fail)
    ending = RunNote.read(train_small(place, code=code)).ending
    assert ending is not None
    assert (ending.status, ending.reason) == expected
    if ending.status == "FAILED":
        assert ending.error.endswith("ExportError: no https://[redacted]@host")
        assert "in run_training" in ending.error


def test_the_end_of_a_long_traceback_is_kept() -> None:
    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)
        else:
            raise ValueError("at the bottom\n" + "x" * 10_000 + "\nlast")

    with pytest.raises(ValueError, match="bottom") as caught:
        descend(50)
    text = last_lines(caught.value)
    assert text.endswith("last")
    assert len(text) <= 4000
    assert len(text.splitlines()) <= 20


# ------------------------------------------------------------------------------- optional tracking


def test_an_optional_tracker_that_is_down_costs_a_warning(
    folder: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = start(tracking="optional", tracking_uri="http://me:password@127.0.0.1:9")
    log_loss(tracking, 10, 20)
    tracking.finish("FINISHED")
    said = capsys.readouterr().out
    assert said.count("warning: mlflow could not be started (") == 1
    assert "Training goes on with train_log.jsonl alone" in said
    assert "mlflow could not be started; 2 logged points are missing there. Send them" in said
    assert f"python -m llm_training.tracking sync '{folder / 'out'}'" in said
    assert "password" not in said
    assert tracking.run_id is None
    assert [line["step"] for line in log_lines(folder)] == [10, 20]


def test_an_optional_tracker_that_answers_later_gets_everything(
    folder: Path, start: Start, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    log = TrainLog(folder / "out")
    log.write(point(10, **{"train/loss": 10.0}))  # of an earlier start
    later = folder / "later"
    later.write_text("no folder, so there can be no database in it")
    tracking = start(
        resumed_step=10, tracking="optional", tracking_uri=f"sqlite:///{later}/mlflow.db",
        parameters={"seed": 1},
    )  # fmt: skip
    log_loss(tracking, 20, 30)
    assert tracking.run_id is None
    later.unlink()
    later.mkdir()
    shutil.copy(empty_store, later / "mlflow.db")
    tracking.finish("FINISHED")
    expected = [(step, float(step)) for step in (10, 20, 30)]
    assert stored_points(tracking.run_id, "train/loss") == expected
    run = stored_run(tracking.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"})
    assert "mlflow answers now" in capsys.readouterr().out


def test_a_mistake_in_the_settings_is_an_error_though_tracking_is_optional(
    folder: Path, start: Start
) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(TrackingError, match="'old' was deleted"):
        start(experiment_name="old", tracking="optional")


# ------------------------------------------------------------------------------------ other places


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def wait_for_another_second() -> None:
    """TensorBoard's files are in order only if they are not of the same second."""
    time.sleep(1.01 - time.time() % 1)


def test_tensorboard_gets_event_files_and_a_resumed_run_has_each_step_once(
    folder: Path, start: Start
) -> None:
    settings: dict[str, Any] = {"report_to": ["tensorboard"], "experiment_name": "/not/a/folder"}
    parameters = {"learning_rate": 0.1, "files": ["a", "b"], "dropout": None}
    first = start(parameters=parameters, **settings)
    log_loss(first, 10, 20, 30)
    first.finish("KILLED")
    wait_for_another_second()
    second = start(resumed_step=20, parameters=parameters, **settings)
    log_loss(second, 30, 40)
    second.finish("FINISHED")
    assert tensorboard_steps(folder) == [10, 20, 30, 40]
    assert not (folder / "mlartifacts").exists()


def test_tensorboard_has_each_step_once_where_a_run_begins_anew(folder: Path, start: Start) -> None:
    """As after a kill before the first checkpoint."""
    first = start(resumed_step=None, report_to=["tensorboard"])
    log_loss(first, 10, 20)
    first.finish("KILLED")
    wait_for_another_second()
    second = start(resumed_step=None, report_to=["tensorboard"])
    log_loss(second, 10, 20, 30)
    second.finish("FINISHED")
    assert tensorboard_steps(folder) == [10, 20, 30]


def test_tensorboard_gets_what_a_kill_lost(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(report_to=["tensorboard"])
    log_loss(first, 10)
    wait_until_sent(first)
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardRun, "send", lambda *arguments: time.sleep(0.2))  # swallowed
        log_loss(first, 20, 30)
        kill(first)
    wait_for_another_second()
    second = start(resumed_step=20, report_to=["tensorboard"])
    log_loss(second, 30)
    second.finish("FINISHED")
    assert tensorboard_steps(folder) == [10, 20, 30]


def test_a_tracker_that_is_not_installed_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "mlflow"):
        with pytest.raises(TrackingError, match=f"report_to: {name} is not installed"):
            start(report_to=[name])


def test_other_processes_write_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other: Any = SimpleNamespace(is_main_process=False)
    tracking = Tracking(other, Arguments(run_name="tiny"), folder / "out", record=RunRecord({}))
    tracking.log({"train/loss": 1.0}, 10)
    tracking.say("hello")
    tracking.finish("FINISHED")
    assert tracking.run_id is None
    assert tracking.review_hint() == ""
    assert not (folder / "out").exists()
    assert capsys.readouterr().out == ""


def test_importing_the_room_imports_nothing_slow() -> None:
    code = "import sys, llm_training.tracking; print([*{'mlflow', 'torch'} & {*sys.modules}])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_review_hint_is_a_command_for_the_shell(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    tracking = start()
    here = shlex.split(tracking.review_hint())  # for an environment that is not the active one
    assert (here[0], here[1:4]) == (sys.executable, ["-m", "mlflow", "ui"])
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    words = shlex.split(tracking.review_hint())
    assert words[:4] == ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    tracking.finish("FINISHED")
    assert shlex.split(tracking.review_hint()) == words
    tensorboard = start(report_to=["tensorboard"])
    assert shlex.split(tensorboard.review_hint())[-1] == str(folder / "out" / "tensorboard")
    file_only = start(report_to=["none"])
    assert shlex.split(file_only.review_hint())[-1] == str(folder / "out" / "train_log.jsonl")


# ---------------------------------------------------------------------------------- pure functions


def test_the_progress_line() -> None:
    metrics = {
        "train/loss": 4.12341,
        "train/grad_norm": 0.806,
        "train/learning_rate": 9.8e-4,
        "train/tokens": 5,
        "perf/tokens_per_second": 9_123.4,
    }
    assert progress_line(12, 400, metrics, 112.0) == (
        "step  12/400 | loss 4.1234 | grad 0.81 | lr 9.8e-04 | 9.1k tokens/s | 1:52 left"
    )
    assert progress_line(7, None, {}) == "step 7/?"
    assert progress_line(400, 400, {"train/loss": math.nan}) == "step 400/400 | loss nan"


def test_the_evaluation_line() -> None:
    metrics = {"eval/loss": 3.9, "eval/perplexity": 49.4024, "eval/token_accuracy": 0.3111}
    assert evaluation_line(120, metrics) == (
        "eval  step 120 | loss 3.9000 | perplexity 49.4 | token accuracy 0.3111"
    )
