"""Proves that the record of a run is true and complete, whatever happens to the run or a tracker.

MLflow is the real one on SQLite, Accelerate's trackers are real, and so is the Accelerator.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
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
from accelerate import Accelerator
from mlflow import MlflowClient
from mlflow.entities import Run

from arguments import Arguments
from llm_training.tracking import (
    Tracking,
    TrackingError,
    evaluation_line,
    progress_line,
    redact,
)
from llm_training.tracking.mlflow_run import MLflowRun, artifact_location, resolve_store
from llm_training.tracking.single_point_runs import TensorBoardRun
from llm_training.tracking.tracked_run import Point
from llm_training.tracking.train_log import TrainLog, read_points

ROOT = Path(__file__).resolve().parents[1]
Start = Callable[..., Tracking]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making its tables takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder (with a space in its name) that holds an empty mlflow.db."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the tracking of a run in `folder`/out, as the script does; kills it in the end."""
    monkeypatch.setattr("llm_training.tracking.steady_tracker.SEND_INTERVAL_SECONDS", 0.0)
    started = []

    def start_tracking(
        resumed_step: int | None = 0,
        parameters: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        output_dir: str = "out",
        **settings: Any,
    ) -> Tracking:
        tracking = Tracking(
            Accelerator(cpu=True),
            Arguments(run_name="tiny", **settings),
            folder / output_dir,
            parameters=parameters or {},
            tags=tags,
            resumed_step=resumed_step,
        )
        started.append(tracking)
        return tracking

    yield start_tracking
    for tracking in started:
        kill(tracking)


def kill(tracking: Tracking) -> None:
    """Stops all threads as kill -9 would: what was not sent is not sent, and no status is told."""
    for tracker in tracking._trackers:
        run: Any = tracker._run
        run.closing_calls = lambda status, artifacts: []
        tracker.begin_end("KILLED", (), seconds=-math.inf)
        tracker._thread.join()


def wait_until_sent(tracking: Tracking) -> None:
    give_up_at = time.monotonic() + 30
    while any(tracker.num_unsent for tracker in tracking._trackers):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def wait_for_rest(tracking: Tracking) -> None:
    """Waits until a tracker that failed is left alone, and tries no more."""
    give_up_at = time.monotonic() + 30
    while not any(tracker._next_at > time.monotonic() + 1 for tracker in tracking._trackers):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def stored_run(run_id: str | None) -> Run:
    return MlflowClient().get_run(str(run_id))


def stored_points(run_id: str | None, name: str) -> list[tuple[int, float]]:
    history = MlflowClient().get_metric_history(str(run_id), name)
    return sorted((point.step, point.value) for point in history)


def log_lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out" / "train_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def log_loss(tracking: Tracking, *steps: int) -> None:
    for step in steps:
        tracking.log({"train/loss": float(step)}, step)


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


# ------------------------------------------------------------------------------------------ MLflow


def test_a_run_is_in_mlflow_with_all_that_belongs_to_it(folder: Path, start: Start) -> None:
    tracking = start(parameters={"learning_rate": 1e-3}, tags={"git": "abc"})
    tracking.log({"train/loss": 4.0}, 10)
    artifact = folder / "arguments.json"
    artifact.write_text("{}")
    tracking.finish("FINISHED", [artifact])

    run = stored_run(tracking.run_id)
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params == {"learning_rate": "0.001"}
    assert run.data.tags["git"] == "abc"
    assert stored_points(tracking.run_id, "train/loss") == [(10, 4.0)]
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "train_llm"
    # Beside the database, and nowhere else.
    uploaded = folder / "mlartifacts" / str(tracking.run_id) / "artifacts" / "arguments.json"
    assert uploaded.read_text() == "{}"
    left = {path.name for path in folder.iterdir()}
    assert left == {"arguments.json", "mlartifacts", "mlflow.db", "out"}


def test_an_old_mlruns_folder_is_not_picked_up(folder: Path, start: Start) -> None:
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    tracking = start()
    log_loss(tracking, 10)
    tracking.finish("FINISHED")
    assert mlflow.get_tracking_uri() == f"sqlite:///{folder}/mlflow.db"
    assert len(list((folder / "mlruns").rglob("*"))) == 2


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_the_true_one(start: Start, status: Any) -> None:
    tracking = start()
    tracking.finish(status)
    tracking.finish("FINISHED")  # a second call changes nothing,
    Accelerator(cpu=True).end_training()  # neither does Accelerate,
    mlflow.tracking.fluent._safe_end_run()  # nor MLflow's exit hook
    assert stored_run(tracking.run_id).info.status == status


def test_a_resumed_run_is_one_run_without_doubled_steps(folder: Path, start: Start) -> None:
    first = start()
    log_loss(first, 10, 20, 30)
    first.log({"eval/loss": 9.0}, 20)
    wait_until_sent(first)
    kill(first)  # after step 30; the checkpoint is of step 20

    second = start(resumed_step=20)
    second.log({"eval/loss": 9.0}, 20)  # the evaluation of the checkpoint's own step
    log_loss(second, 30, 40)
    second.log({"eval/loss": 8.0}, 30)  # same step, but not logged before the kill
    second.finish("FINISHED")

    assert second.run_id == first.run_id
    assert stored_points(first.run_id, "train/loss") == [(s, float(s)) for s in (10, 20, 30, 40)]
    assert stored_points(first.run_id, "eval/loss") == [(20, 9.0), (30, 8.0)]
    assert stored_run(first.run_id).info.status == "FINISHED"
    steps = [line["step"] for line in log_lines(folder) if "train/loss" in line]
    assert steps == [10, 20, 30, 40]


def test_parameters_that_changed_at_a_resume_become_tags(start: Start) -> None:
    long = "x" * 7000
    first = start(parameters={"learning_rate": 0.1, "seed": 1, "long": long})
    kill(first)
    now = {"learning_rate": 0.2, "seed": 1, "long": long, "added": None}
    second = start(resumed_step=20, parameters=now)

    data = stored_run(first.run_id).data
    assert {name: data.params[name] for name in ("learning_rate", "seed", "added")} == {
        "learning_rate": "0.1",
        "seed": "1",
        "added": "null",
    }
    changes = {name: value for name, value in data.tags.items() if name.startswith("resume")}
    assert changes == {"resume.20.learning_rate": "0.1 -> 0.2"}
    assert second.run_id == first.run_id


def test_a_run_that_was_deleted_is_followed_by_a_new_one(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start()
    kill(first)
    MlflowClient().delete_run(str(first.run_id))
    second = start(resumed_step=20)
    assert second.run_id != first.run_id
    assert stored_run(second.run_id).data.tags["resumed_from_run"] == first.run_id
    assert f"{first.run_id} is gone" in capsys.readouterr().out


def test_a_run_that_another_store_has_never_seen_is_followed_by_a_new_one(
    folder: Path, start: Start, empty_store: Path
) -> None:
    first = start()
    kill(first)
    shutil.copy(empty_store, folder / "other.db")
    second = start(resumed_step=20, tracking_uri="sqlite:///other.db")
    assert stored_run(second.run_id).data.tags["resumed_from_run"] == first.run_id


def test_a_resumed_run_stays_in_its_experiment(start: Start) -> None:
    first = start(experiment_name="a/b")
    kill(first)
    second = start(resumed_step=20, experiment_name="c")
    assert second.run_id == first.run_id
    assert MlflowClient().get_experiment_by_name("c") is None


def test_what_is_not_finite_stays_out_of_mlflow(start: Start) -> None:
    tracking = start()
    tracking.log({"train/loss": math.inf, "train/grad_norm": math.nan, "perf/mfu": 0.5}, 10)
    wait_until_sent(tracking)
    assert set(stored_run(tracking.run_id).data.metrics) == {"perf/mfu"}


def test_many_and_long_parameters_arrive_and_a_cut_shows(start: Start) -> None:
    many = {f"parameter_{index}": index for index in range(230)}
    tracking = start(parameters={**many, "long": "x" * 10_000, "nested": {"n_layer": 6}})
    parameters = stored_run(tracking.run_id).data.params
    assert len(parameters) == 232
    assert len(parameters["long"]) == 6000
    assert parameters["long"].endswith("x... [cut]")
    assert parameters["nested"] == '{"n_layer": 6}'


def test_secrets_do_not_reach_a_tracker(start: Start) -> None:
    secrets = {"hf_token": "hf_abc", "deep": {"api_key": "k"}, "url": "http://me:pw@host/x"}
    tracking = start(parameters=secrets, tags={"remote": "https://ghp_1@github.com/a/b"})
    data = stored_run(tracking.run_id).data
    assert data.params == {
        "hf_token": "[redacted]",
        "deep": '{"api_key": "[redacted]"}',
        "url": "http://[redacted]@host/x",
    }
    assert data.tags["remote"] == "https://[redacted]@github.com/a/b"


def test_the_environment_decides_the_store_and_nothing_else(
    folder: Path, start: Start, empty_store: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copy(empty_store, folder / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    tracking = start()
    assert mlflow.get_tracking_uri() == f"sqlite:///{folder}/other.db"
    experiment = stored_run(tracking.run_id).info.experiment_id
    assert MlflowClient().get_experiment(experiment).name == "train_llm"
    assert "MLFLOW_EXPERIMENT_NAME is not used" in capsys.readouterr().out


def test_a_dead_server_is_given_up_soon_unless_the_user_says_otherwise(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    start()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"


@pytest.mark.parametrize("name", ['say "x"', "a/b", "/Shared/x", "100 % ü"])
def test_unusual_experiment_names_work(start: Start, name: str) -> None:
    tracking = start(experiment_name=name)
    experiment = stored_run(tracking.run_id).info.experiment_id
    assert MlflowClient().get_experiment(experiment).name == name


def test_an_experiment_name_with_a_quote_is_refused(start: Start) -> None:
    with pytest.raises(TrackingError, match=r"experiment_name: \"it's\".*single quote"):
        start(experiment_name="it's")


def test_an_experiment_name_that_mlflow_does_not_take_is_refused(start: Start) -> None:
    with pytest.raises(TrackingError, match="maximum length of 500 characters"):
        start(experiment_name="x" * 501)


def test_a_deleted_experiment_is_refused_with_the_way_out(folder: Path, start: Start) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    number = client.create_experiment("old")
    client.delete_experiment(number)
    with pytest.raises(TrackingError, match=f"'old' was deleted.*--experiment-id {number}"):
        start(experiment_name="old")


def test_a_server_that_is_down_at_the_start_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        TrackingError, match=r"mlflow could not be started.*tracking_uri.*--tracking optional"
    ):
        start(tracking_uri="http://me:password@127.0.0.1:9")


def test_a_server_that_never_answers_is_an_error_at_the_start(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    refusal = pytest.raises(TrackingError, match=r"mlflow could not be started.*tracking_uri")
    with socket.create_server(("127.0.0.1", 0)) as silent, refusal:
        start(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert 1 < time.monotonic() - began < 10


def test_a_start_that_fails_after_mlflow_started_leaves_no_finished_run(
    folder: Path, start: Start
) -> None:
    with pytest.raises(TrackingError, match="could not be started"):
        start(parameters={"no(brackets)": 1})
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'train_llm'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


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
tracking = Tracking(Accelerator(cpu=True), Arguments(run_name="tiny"), Path("out"), parameters={})
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
    assert stored_points(run_id, "train/loss") == [(10, 10.0)]
    assert stored_run(run_id).info.status == "RUNNING"

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
    assert "mlflow could not be started; 2 logged points are missing there" in said
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


def test_a_mistake_in_the_settings_is_an_error_though_tracking_is_optional(start: Start) -> None:
    with pytest.raises(TrackingError, match="single quote"):
        start(experiment_name="it's", tracking="optional")


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


def test_wandb_is_started_the_way_accelerate_starts_it(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B itself is not installed here: this holds what we hand to it."""
    calls: list[Any] = []
    run = SimpleNamespace(
        step=21,
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("end"),
    )
    config = SimpleNamespace(update=lambda values, allow_val_change: calls.append(values))

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(settings)
        return run

    fake = SimpleNamespace(init=init, config=config, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = TrainLog(folder / "out")
    for step in (10, 20, 30):
        log.write(point(step))
    tracking = start(30, report_to=["wandb"], parameters={"seed": 1}, tags={"git": "abc"})
    log_loss(tracking, 40)
    tracking.finish("FINISHED")
    assert calls == [
        {"project": "train_llm", "name": "tiny", "dir": str(folder / "out"), "resume": "auto"},
        {"seed": 1, "git": "abc"},
        ({"train/loss": 1.0}, 30),  # which W&B lacks
        ({"train/loss": 40.0}, 40),
        "end",
    ]


def test_other_processes_write_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other: Any = SimpleNamespace(is_main_process=False)
    tracking = Tracking(other, Arguments(run_name="tiny"), folder / "out", parameters={})
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


def test_stores_and_where_their_artifacts_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_store(None) == f"sqlite:///{folder}/mlflow.db"
    assert resolve_store("sqlite:////data/m.db") == "sqlite:////data/m.db"
    assert resolve_store("http://host:5000") == "http://host:5000"
    assert artifact_location("sqlite:////data/m.db") == "/data/mlartifacts"
    assert artifact_location("postgresql://host/db") == f"{folder}/mlartifacts"
    assert artifact_location("http://host:5000") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_store(None) == "http://host:5000"
    assert resolve_store("sqlite:////data/m.db") == "sqlite:////data/m.db"


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "accessToken", "api_key", "apikey", "db_password", "SECRET"],
)
def test_names_of_secrets(name: str) -> None:
    assert redact({name: "abc"}) == {name: "[redacted]"}


@pytest.mark.parametrize(
    "name",
    ["tokenizer_name", "cache_dir", "sample_max_new_tokens", "eos_token", "flops_per_token"],
)
def test_names_of_what_is_no_secret(name: str) -> None:
    assert redact({name: "token_cache"}) == {name: "token_cache"}


def test_a_secret_that_is_not_set_shows_that() -> None:
    assert redact({"hf_token": None}) == {"hf_token": None}


def test_none_of_our_arguments_is_taken_for_a_secret() -> None:
    values = dict.fromkeys(vars(Arguments()), "value")
    assert redact(values) == values


def test_redacting_keeps_what_an_at_sign_is_not_a_login_in() -> None:
    for text in ("me@host.org", "https://host/a@b", "https://host/?q=a@b", "git@host:a/b"):
        assert redact(text) == text


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
