"""Proves that `python -m llm_training.tracking sync` sends what MLflow lacks, once, and the truth.

The stores are real SQLite databases of MLflow.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from mlflow import MlflowClient
from mlflow.entities import Run

from arguments import Arguments
from llm_training.outputs import OutputFolder
from llm_training.tracking import Tracking, TrackingError, is_untold
from llm_training.tracking.__main__ import main
from llm_training.tracking.mlflow_run import MLflowRun
from llm_training.tracking.note import RunNote
from llm_training.tracking.record import RunRecord, UsedDataset
from llm_training.tracking.sync import sync
from llm_training.tracking.tracked_run import Ending, Point
from llm_training.tracking.train_log import TrainLog

ROOT = Path(__file__).resolve().parents[1]
RECORD = RunRecord(
    parameters={"learning_rate": 0.001, "seed": 1},
    tags={"git_revision": "abc"},
    datasets=(UsedDataset("books", "training", "f00d", "books/", {"num_documents": 3}),),
)
Train = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the database is to be: nothing can be stored there until `bring_up`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_training.tracking.steady_tracker.SEND_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("llm_training.tracking.tracking.MLflowProcess", MLflowRun)  # at once
    folder = tmp_path / "store"
    folder.write_text("no folder, so there can be no database in it")
    return folder / "mlflow.db"


@pytest.fixture
def train(store: Path) -> Iterator[Train]:
    """Tracks a run of three steps, whose last log line is in the file."""
    started: list[Tracking] = []

    def track(status: Any = "FINISHED", steps: tuple[int, ...] = (1, 2, 3), **ending: str) -> Path:
        arguments = Arguments(
            run_name="tiny", tracking="optional", tracking_uri=f"sqlite:///{store}"
        )
        output = Path("out")
        tracking = Tracking(Accelerator(cpu=True), arguments, output, record=RECORD)
        started.append(tracking)
        (output / "arguments.json").write_text("{}")
        for step in steps:
            tracking.log({"train/loss": 1.0 / step, "train/tokens": float(step)}, step)
        if status is not None:
            tracking.finish(status, OutputFolder(output).artifacts(), **ending)
        return output

    yield track
    for tracking in started:
        for tracker in tracking._trackers:
            tracker.begin_end(Ending("KILLED"), (), 0.0)
            tracker._thread.join(30)


def bring_up(store: Path, empty_store: Path) -> MlflowClient:
    store.parent.unlink(missing_ok=True)
    store.parent.mkdir()
    shutil.copy(empty_store, store)
    return MlflowClient(f"sqlite:///{store}")


def only_run(client: MlflowClient) -> Run:
    (experiment,) = client.search_experiments(filter_string="name = 'train_llm'")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def points(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float, int]]]:
    return {
        name: sorted(
            (point.step, point.value, point.timestamp)
            for point in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }


def logged_points(output: Path) -> dict[str, list[tuple[int, float, int]]]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return {
        name: [(line["step"], line[name], round(1000 * line["time"])) for line in lines]
        for name in ("train/loss", "train/tokens")
    }


def artifact_names(client: MlflowClient, run: Run) -> set[str]:
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_run_whose_store_was_down_is_sent_whole_and_once(
    train: Train, store: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train()
    said = capsys.readouterr().out
    assert "6 logged" not in said
    assert f"python -m llm_training.tracking sync {output}" in said
    time.sleep(0.05)  # so that a time of now would be another than that of the run
    client = bring_up(store, empty_store)

    assert main(["sync", str(output)]) == 0
    run = only_run(client)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == (
        "sent 6 points of 3 steps, 2 files; status FINISHED;"
        f" MLflow run {run.info.run_id} in sqlite:///{store}"
    )
    note = RunNote.read(output)
    assert points(client, run) == logged_points(output)
    assert run.data.params == {"learning_rate": "0.001", "seed": "1"}
    assert run.data.tags["git_revision"] == "abc"
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (
        round(1000 * note.started),
        round(1000 * (note.ended or 0.0)),
    )
    assert {"arguments.json", "train_log.jsonl"} <= artifact_names(client, run)

    assert main(["sync", str(output)]) == 0
    assert "sent 0 points of 0 steps" in capsys.readouterr().out
    again = only_run(client)
    assert points(client, again) == logged_points(output)
    assert (again.info.end_time, again.info.status) == (run.info.end_time, "FINISHED")


def test_only_what_is_missing_is_sent(train: Train, store: Path, empty_store: Path) -> None:
    client = bring_up(store, empty_store)
    output = train(None, steps=(1, 2))
    wait_until(lambda: len(points(client, only_run(client)).get("train/loss", ())) == 2)
    log = TrainLog(output, resumed_step=2)  # a kill kept these from being sent
    log.write(Point({"train/loss": 0.3, "train/tokens": 3.0}, 3, 1.8e9))
    log.write(Point({"train/loss": 0.2, "train/tokens": math.nan}, 4, 1.8e9 + 1))
    sent = sync(output, None)
    assert (sent.num_points, sent.num_steps) == (3, 2)
    stored = points(client, only_run(client))
    assert [step for step, *_ in stored["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, *_ in stored["train/tokens"]] == [1, 2, 3]


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_a_failed_run_says_why(train: Train, store: Path, empty_store: Path) -> None:
    output = train("FAILED", error="ValueError: no")
    client = bring_up(store, empty_store)
    assert sync(output, None).status == "FAILED"
    assert only_run(client).info.status == "FAILED"
    assert RunNote.read(output).ending == Ending("FAILED", error="ValueError: no")


def test_a_run_that_was_killed_without_a_word_is_killed(
    train: Train, store: Path, empty_store: Path
) -> None:
    output = train(None)
    client = bring_up(store, empty_store)
    assert sync(output, None).status == "KILLED"
    run = only_run(client)
    assert run.info.status == "KILLED"
    assert points(client, run) == logged_points(output)


def test_a_run_that_was_killed_after_its_result_is_finished(
    train: Train, store: Path, empty_store: Path
) -> None:
    output = train(None)
    OutputFolder(output).write_result({"step": 3})
    client = bring_up(store, empty_store)
    assert sync(output, None).status == "FINISHED"
    assert only_run(client).info.status == "FINISHED"


def test_a_sync_that_fails_leaves_the_status_true(
    train: Train, store: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no place for files")

    output = train()
    client = bring_up(store, empty_store)
    sync(output, None)
    monkeypatch.setattr("llm_training.tracking.mlflow_run.MLflowRun.upload", fail)
    with pytest.raises(TrackingError, match="no place for files"):
        sync(output, None)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert "stopped_by" not in run.data.tags


def test_a_finished_run_whose_tracker_was_not_told_is_known(
    train: Train, store: Path, empty_store: Path, tmp_path: Path
) -> None:
    output = train(None)
    OutputFolder(output).write_result({"step": 3})
    assert is_untold(output)
    bring_up(store, empty_store)
    sync(output, None)
    assert not is_untold(output)
    assert not is_untold(tmp_path / "nowhere")


def test_the_note_reads_back_as_it_was_written(train: Train) -> None:
    note = RunNote.read(train("KILLED", reason="SIGTERM"))
    assert note.record == RECORD
    assert note.ending == Ending("KILLED", reason="SIGTERM")


def test_another_store_may_be_named(train: Train, tmp_path: Path, empty_store: Path) -> None:
    output = train()
    other = tmp_path / "other.db"
    shutil.copy(empty_store, other)
    assert main(["sync", str(output), "--tracking_uri", f"sqlite:///{other}"]) == 0
    client = MlflowClient(f"sqlite:///{other}")
    assert points(client, only_run(client)) == logged_points(output)


# ---------------------------------------------------------------------------------- what is refused


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["sync", *words]) == 1
    return capsys.readouterr().err


def test_a_run_that_is_training_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train()
    with OutputFolder(output).lock():
        assert f"{output} is in use by another run: process {os.getpid()}" in refusal(
            capsys, str(output)
        )


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder" in refusal(capsys, str(tmp_path / "missing"))
    assert "has no tracking.json" in refusal(capsys, str(tmp_path))
    (tmp_path / "tracking.json").write_text('{"record": 3}')
    assert "tracking.json cannot be read" in refusal(capsys, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"tracking.json"}


def test_a_server_that_is_down_is_named_without_its_login(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    output = train()
    said = refusal(capsys, str(output), "--tracking_uri", "http://me:password@127.0.0.1:9")
    assert "http://[redacted]@127.0.0.1:9 could not take the run" in said
    assert "password" not in said
    assert "password" not in (output / "tracking.json").read_text()


def test_a_login_must_be_given_again(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    output = train()
    note = RunNote.read(output)
    note.store = "http://[redacted]@127.0.0.1:9"
    note.write(output)
    assert "The login of http://[redacted]@127.0.0.1:9 is not kept" in refusal(capsys, str(output))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:password@127.0.0.1:9")
    assert "could not take the run" in refusal(capsys, str(output))


def test_a_run_without_mlflow_needs_a_store(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RunNote(RECORD, "train_llm", "tiny", store=None).write(tmp_path)
    assert "--tracking_uri" in refusal(capsys, str(tmp_path))


def test_the_command_line_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_training.tracking", "sync", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "OUTPUT_DIR" in done.stdout
    assert "not sent again" in done.stdout
