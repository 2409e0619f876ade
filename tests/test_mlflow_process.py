"""Proves that MLflow's process takes nothing from a run's record, and outlives no run.

The processes are real, and so is MLflow on SQLite.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from accelerate import Accelerator
from mlflow import MlflowClient

from arguments import Arguments
from llm_training.tracking import Tracking, TrackingError
from llm_training.tracking import mlflow_process as process_module
from llm_training.tracking import tracking as module
from llm_training.tracking.errors import QuotedError
from llm_training.tracking.mlflow_process import (
    LAST_SECONDS,
    LEFT_TO_THE_RUN,
    MLflowProcess,
    start_early,
)
from llm_training.tracking.mlflow_run import MLflowRun
from llm_training.tracking.note import RunNote
from llm_training.tracking.record import RunRecord, UsedDataset
from llm_training.tracking.tracked_run import Ending, Point
from tests.tracked_runs import (
    Start,
    log_lines,
    log_loss,
    open_folder,
    started_elsewhere,
    stored_points,
    stored_run,
    wait_until_sent,
)

ROOT = Path(__file__).resolve().parents[1]
RECORD = RunRecord(
    parameters={"learning_rate": 0.001, "seed": 1, "model": "x" * 7000},
    tags={"git_revision": "abc", **{f"changed.a{number}": "yes" for number in range(150)}},
    datasets=(UsedDataset("books", "training", "f00d", "books/", {"num_documents": 3}),),
    sweep="rates",
    description="About it.",
)


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = open_folder(tmp_path, empty_store, monkeypatch)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")  # for the test; the run has its own
    return folder


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with started_elsewhere(folder, monkeypatch) as start:
        yield start


@pytest.fixture
def alone(folder: Path) -> Iterator[MLflowProcess]:
    """One that is started, without the thread that calls it."""
    alone = MLflowProcess(Arguments(run_name="tiny"), folder / "out", RunRecord({}), said.append)
    (folder / "out").mkdir()
    said.clear()
    alone.start()
    yield alone
    alone._stop()


said: list[str] = []


def process_of(run: Any) -> subprocess.Popen[bytes]:
    """The process of a tracked run, or of its tracking."""
    run = run._mlflow if isinstance(run, Tracking) else run
    assert run._process is not None
    return run._process  # type: ignore[no-any-return]


def points(*steps: int) -> list[Point]:
    return [Point({"train/loss": float(step)}, step, 1.8e9 + step) for step in steps]


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


# ------------------------------------------------------------------------------ the same as here


def record_a_run(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run with all that there is to a run; what the store has of it but for ids and times."""
    monkeypatch.setattr(module, "MLflowProcess", kind)
    arguments = Arguments(run_name="tiny", experiment_name=kind.__name__, sweep="rates")
    output = folder / kind.__name__
    for resumed_step in (None, 20):
        record = dataclasses.replace(RECORD, resumed_step=resumed_step)
        if resumed_step:
            record = dataclasses.replace(record, parameters={**RECORD.parameters, "seed": 2})
        tracking = Tracking(Accelerator(cpu=True), arguments, output, record=record)
        log_loss(tracking, 10, 20, 30)
        tracking.log({"eval/loss": 2.5, "train/grad_norm": float("inf")}, 30)
        wait_until_sent(tracking)
        tracking.go_back(20)
        log_loss(tracking, 30)
        (output / "samples.json").write_text("{}")
        tracking.finish("FAILED", [output / "samples.json", output / "none"], error="no")
    client = MlflowClient()
    run = client.get_run(str(tracking.run_id))
    experiment = f"experiments/{run.info.experiment_id}/"

    def without_ids(text: str) -> str:
        return text.replace(run.info.run_id, "ID").replace(experiment, "experiments/E/")

    return {
        "info": (run.info.run_name, run.info.status),
        "params": run.data.params,
        "tags": {
            name: without_ids(text)
            for name, text in run.data.tags.items()
            if name != "mlflow.parentRunId"
        },
        "sweep": client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name,
        "metrics": {name: stored_points(run.info.run_id, name) for name in run.data.metrics},
        "inputs": [
            (used.dataset.name, used.dataset.digest, used.dataset.source)
            for used in run.inputs.dataset_inputs
        ],
        "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        "page": without_ids(f"{tracking._mlflow.page if tracking._mlflow else None}"),
    }


def test_the_store_has_the_same_as_of_a_run_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = record_a_run(folder, MLflowProcess, monkeypatch)
    here = record_a_run(folder, MLflowRun, monkeypatch)
    assert elsewhere == here
    assert elsewhere["tags"]["resume.20.seed"] == "1 -> 2"
    assert elsewhere["tags"]["rewound.2"].startswith("steps 21-30")
    assert elsewhere["artifacts"] == ["samples.json"]
    assert elsewhere["tags"]["mlflow.source.name"] == sys.argv[0]


TRAINED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from arguments import Arguments
from llm_training.tracking import Tracking
from llm_training.tracking.record import RunRecord
main: object = SimpleNamespace(is_main_process=True)
tracking = Tracking(main, Arguments(run_name="tiny"), Path("out"), record=RunRecord({}))
tracking.log({"train/loss": 1.0}, 1)
tracking.finish("FINISHED")
print([*{"mlflow", "torch", "sqlalchemy"} & {*sys.modules}], tracking.run_id)
"""


def test_the_training_imports_nothing_of_mlflow(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINED], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    modules, run_id = done.stdout.rsplit(maxsplit=1)
    assert modules == "[]"
    assert stored_points(run_id, "train/loss") == [(1, 1.0)]
    assert stored_run(run_id).info.status == "FINISHED"


# ------------------------------------------------------------------------------- the process ends


def test_the_process_ends_with_the_run(start: Start) -> None:
    tracking = start()
    process = process_of(tracking)
    tracking.finish("FINISHED")
    assert process.returncode == 0


def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = start()
    log_loss(tracking, 10, 20, 30)
    wait_until_sent(tracking)
    tracking.go_back(10)
    log_loss(tracking, 20)
    wait_until_sent(tracking)
    first = process_of(tracking)
    first.kill()
    first.wait()
    log_loss(tracking, 30)
    wait_until_sent(tracking)
    second = process_of(tracking)
    tracking.go_back(20)
    log_loss(tracking, 30, 40)
    tracking.finish("FINISHED")
    assert second.pid != first.pid
    run = stored_run(tracking.run_id)
    assert run.info.status == "FINISHED"
    rewound = {name: text for name, text in run.data.tags.items() if name.startswith("rewound")}
    assert rewound == {
        "rewound.1": "steps 11-30 were computed again, from step 10 on",
        "rewound.2": "steps 21-30 were computed again, from step 20 on",
    }
    steps = [step for step, _ in stored_points(tracking.run_id, "train/loss")]
    assert steps == [10, 20, 20, 30, 30, 30, 40]  # those of all passes
    out = capsys.readouterr().out
    assert out.count("warning: MLflow's process has ended (signal 9); it is started again") == 1


def test_a_process_that_is_killed_while_it_sends_is_a_failure_that_is_made_good(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = start()
    process = process_of(tracking)
    holder = sqlite3.connect("mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    log_loss(tracking, 1, 2, 3)
    wait_until(lambda: bool(tracking._trackers[0]._in_flight))
    time.sleep(0.5)  # it waits for the database
    process.kill()
    wait_until(lambda: process.returncode is not None)
    holder.rollback()
    holder.close()
    tracking.finish("FINISHED")
    assert stored_points(tracking.run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert stored_run(tracking.run_id).info.status == "FINISHED"
    said = capsys.readouterr().out
    assert "warning: mlflow failed (MLflow's process has ended (signal 9))" in said
    assert "no metrics are missing there" in said


def test_a_start_that_fails_leaves_no_process(folder: Path) -> None:
    MlflowClient().delete_experiment(MlflowClient().create_experiment("old"))
    before = psutil.Process().children()
    arguments = Arguments(run_name="tiny", experiment_name="old")
    run = MLflowProcess(arguments, folder / "out", RunRecord({}), print)
    with pytest.raises(TrackingError, match="'old' was deleted"):
        run.start()
    assert psutil.Process().children() == before


def test_an_error_comes_over_as_it_is_quoted_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    arguments = Arguments(run_name="tiny", tracking_uri="http://me:password@127.0.0.1:9")
    run = MLflowProcess(arguments, folder / "out", RunRecord({}), print)
    with pytest.raises(QuotedError) as caught:
        run.start()
    assert str(caught.value).startswith("MlflowException: API request to http://[redacted]@127.0")


def test_what_fails_at_the_end_is_told_and_the_rest_is_done(alone: MLflowProcess) -> None:
    errors = alone.close(Ending("FINISHED"), [Path("not there"), Path("mlflow.db")])
    (error,) = errors
    assert isinstance(error, QuotedError)
    assert "not there" in str(error)
    run_id = str(alone.run_id)
    assert stored_run(run_id).info.status == "FINISHED"
    assert [file.path for file in MlflowClient().list_artifacts(run_id)] == ["mlflow.db"]


# ---------------------------------------------------------------------- the training ends first


def end_the_training(run: MLflowProcess) -> int:
    """What the process sees when the training is killed; how it ends then."""
    process = process_of(run)
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(30)


def test_a_training_that_is_killed_is_told(folder: Path, alone: MLflowProcess) -> None:
    alone.send(points(1, 2))
    assert end_the_training(alone) == 0
    run = stored_run(alone.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["stopped_by"] == "its process ended without a word"


def test_a_training_that_had_noted_its_end_is_not_called_killed(
    folder: Path, alone: MLflowProcess
) -> None:
    note = RunNote(RunRecord({}), "train_llm", "tiny", store=None)
    note.ending = Ending("FAILED", error="no luck")
    note.write(folder / "out")
    end_the_training(alone)
    run = stored_run(alone.run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "no luck")


def test_of_a_training_that_is_killed_nothing_is_half_sent(alone: MLflowProcess) -> None:
    """A point that came later would meet those of the next start."""
    holder = sqlite3.connect("mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    process = process_of(alone)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(pickle.dumps(("send", (points(1),))))
    process.stdin.flush()
    time.sleep(0.5)  # it waits for the database
    process.stdin.close()  # as the training's end does
    assert process.wait(LAST_SECONDS - 2) == 1  # at once, though the database may be free soon
    holder.rollback()
    holder.close()
    assert stored_run(alone.run_id).info.status == "RUNNING"
    assert "train/loss" not in stored_run(alone.run_id).data.metrics


# ------------------------------------------------------------------------------- started early


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that were started early and not taken."""
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(process_module, "_early", processes)
    monkeypatch.delenv("RANK", raising=False)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_run_takes_the_process_that_was_started_early(
    folder: Path,
    early: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "of somebody else")
    start_early(Arguments())
    (process,) = early
    monkeypatch.delenv("MLFLOW_RUN_ID")
    (folder / "out").mkdir()
    run = MLflowProcess(Arguments(run_name="tiny"), folder / "out", RunRecord({}), print)
    run.start()
    assert process_of(run) is process
    assert not early
    run.close(Ending("FINISHED"), [])
    assert process.returncode == 0
    assert stored_run(run.run_id).info.status == "FINISHED"
    assert capsys.readouterr().out == ""  # what is not used of the environment, the run has said


def test_one_that_has_ended_meanwhile_is_not_taken(
    folder: Path, early: list[subprocess.Popen[bytes]]
) -> None:
    start_early(Arguments())
    (process,) = early
    process.kill()
    process.wait()
    (folder / "out").mkdir()
    run = MLflowProcess(Arguments(run_name="tiny"), folder / "out", RunRecord({}), print)
    run.start()
    assert process_of(run) is not process
    run.close(Ending("FINISHED"), [])


def test_one_that_no_run_takes_ends_with_the_script(
    early: list[subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    start_early(Arguments())
    (process,) = early
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"report_to": ["none"]}, "0"), ({"report_to": ["tensorboard"]}, "0"),
     ({"dry_run": True}, "0"), ({"eval_only": True}, "0"), ({}, "1")],
)  # fmt: skip
def test_where_none_is_needed_none_is_started(
    early: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any], rank: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", rank)
    start_early(Arguments(**settings))
    assert not early


# ------------------------------------------------------------------------------ in nobody's way


def test_signals_are_for_the_training(alone: MLflowProcess) -> None:
    process = process_of(alone)
    assert os.getpgid(process.pid) == process.pid  # so that a terminal's do not come at all
    for number in LEFT_TO_THE_RUN:
        process.send_signal(number)
    alone.send(points(1))
    assert signal.SIGTERM in LEFT_TO_THE_RUN
    assert stored_points(alone.run_id, "train/loss") == [(1, 1.0)]


class Talkative:
    """Prints when it is unpickled, as a library may at any time."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("I have something to say",)


def test_what_a_library_prints_is_no_answer(
    alone: MLflowProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    assert alone._ask_run("missing", [*points(1, 2)]) == points(1, 2)
    with pytest.raises(QuotedError, match="not iterable"):
        alone._ask("missing", Talkative())
    assert alone.missing(points(3)) == points(3)
    assert capfd.readouterr().out == ""


def test_what_is_worth_a_warning_is_said_here(folder: Path, alone: MLflowProcess) -> None:
    end_the_training(alone)
    MlflowClient().delete_run(str(alone.run_id))
    earlier = alone.run_id
    alone.send(points(1))
    assert said == [
        "warning: MLflow's process has ended (exit code 0); it is started again",
        f"warning: MLflow's run {earlier} is gone from the store; a new one is started",
    ]
    assert stored_points(alone.run_id, "train/loss") == [(1, 1.0)]


def test_every_line_of_the_log_is_in_the_store(folder: Path, start: Start) -> None:
    tracking = start()
    for step in range(250):
        tracking.log({f"m{index}": step / 7 for index in range(20)}, step)
    tracking.finish("FINISHED")
    for index in (0, 19):
        expected = [(line["step"], line[f"m{index}"]) for line in log_lines(folder)]
        assert stored_points(tracking.run_id, f"m{index}") == expected
