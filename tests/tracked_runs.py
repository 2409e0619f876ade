"""Runs that are tracked as the script does it, in a folder with an empty MLflow database."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from mlflow import MlflowClient
from mlflow.entities import Run

from arguments import Arguments
from llm_training.tracking import Tracking
from llm_training.tracking.mlflow_process import MLflowProcess
from llm_training.tracking.mlflow_run import MLflowRun
from llm_training.tracking.record import UsedDataset, build_record
from llm_training.tracking.tracked_run import Ending

Start = Callable[..., Tracking]


def open_folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder (with a space in its name) that holds an empty mlflow.db the working one."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@contextmanager
def started_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """As `started_elsewhere`, with MLflow's side in this process, where a test can change it.

    What is between the processes is tested in test_mlflow_process.py.
    """
    monkeypatch.setattr("llm_training.tracking.tracking.MLflowProcess", MLflowRun)
    with started_elsewhere(folder, monkeypatch) as start:
        yield start


@contextmanager
def started_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the tracking of a run in `folder`/out, as the script does; kills it in the end."""
    monkeypatch.setattr("llm_training.tracking.steady_tracker.SEND_INTERVAL_SECONDS", 0.0)
    started = []

    def start_tracking(
        resumed_step: int | None = 0,
        parameters: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        datasets: tuple[UsedDataset, ...] = (),
        output_dir: str = "out",
        **settings: Any,
    ) -> Tracking:
        arguments = Arguments(**{"run_name": "tiny", **settings})
        record = build_record(parameters or {}, tags, resumed_step=resumed_step)
        record = dataclasses.replace(record, datasets=datasets, sweep=arguments.sweep)
        tracking = Tracking(Accelerator(cpu=True), arguments, folder / output_dir, record=record)
        started.append(tracking)
        return tracking

    yield start_tracking
    for tracking in started:
        kill(tracking)


def kill(tracking: Tracking) -> None:
    """Stops all threads as kill -9 would: what was not sent is not sent, and no status is told."""
    for tracker in tracking._trackers:
        run: Any = tracker._run
        run.close = lambda ending, artifacts: []
        tracker.begin_end(Ending("KILLED"), (), seconds=-math.inf)
        tracker._thread.join()
        if isinstance(run, MLflowProcess):
            run._stop()


def wait_until_sent(tracking: Tracking) -> None:
    give_up_at = time.monotonic() + 30
    while any(tracker.num_unsent for tracker in tracking._trackers):
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
