"""Proves that TensorBoard and W&B get what train_log.jsonl has, under the same names.

Both are the real packages, in a process of their own. W&B is offline: what it would send is read
from the file that it keeps.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

GIT_COMMANDS = (
    "init",
    "remote add origin https://me:password@example.org/code.git",
    "add code.txt",
    "-c user.name=me -c user.email=me@example.com commit -m code",
)

# A run that is stopped after step 30 and goes on from the checkpoint of step 20.
TRACKED_RUN = """
import math, os, socket, sys, time
from pathlib import Path

def refuse(self, address):
    assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"{address} was called"
    connect(self, address)

connect, socket.socket.connect = socket.socket.connect, refuse

from accelerate import Accelerator
from arguments import Arguments
from llm_training.tracking import Tracking
from llm_training.tracking.record import RunRecord

def track(resumed_step, steps, status):
    tracking = Tracking(
        Accelerator(cpu=True),
        Arguments(run_name="tiny", report_to=[sys.argv[1]]),
        Path("out"),
        record=RunRecord({"seed": 1, "optim": "muon"}, {"git": "abc"}, resumed_step=resumed_step),
    )
    for step in steps:
        metrics = {"train/loss": 5 / step, "train/grad_norm": math.nan, "train/tokens": step}
        tracking.log(metrics, step)
        tracking.log({"eval/loss": 4 / step, "system/cpu_utilization_percentage": 50.0}, step)
    tracking.finish(status)

track(None, (10, 20, 30), "KILLED")
time.sleep(1.01 - time.time() % 1)  # files of TensorBoard are in order only if seconds apart
track(20, (30, 40), "FINISHED")
"""


def run_tracked(place: Path, tracker: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", TRACKED_RUN, tracker],
        cwd=place, env=clean | {"PYTHONPATH": str(ROOT), "HOME": str(place)} | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


Series = dict[str, list[tuple[int, str]]]


def logged(place: Path) -> Series:
    """What train_log.jsonl has: for each name the steps with their values to six digits."""
    series: Series = {}
    for text in (place / "out" / "train_log.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in line.keys() - {"step", "time"}:
            series.setdefault(name, []).append((line["step"], f"{float(line[name]):.6g}"))
    return series


def test_the_log_has_each_step_once(tmp_path: Path) -> None:
    assert run_tracked(tmp_path, "none").returncode == 0
    assert [step for step, _ in logged(tmp_path)["train/loss"]] == [10, 20, 30, 40]


def test_tensorboard_has_the_same_numbers_under_the_same_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run_tracked(tmp_path, "tensorboard")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    stored = {
        name: [(event.step, f"{event.value:.6g}") for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert stored == logged(tmp_path)


def test_wandb_has_the_same_numbers_and_what_the_run_was(tmp_path: Path) -> None:
    (tmp_path / "code.txt").touch()
    for words in GIT_COMMANDS:
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    done = run_tracked(tmp_path, "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name  # one run, which its folder remembers
    assert history(second) == logged(tmp_path)
    assert times(second) == log_times(tmp_path)
    ends = [record.exit.exit_code for file in (first, second) for record in kind(file, "exit")]
    assert ends == [255, 0]

    (run,) = (record.run for record in kind(second, "run"))
    assert (run.project, run.display_name) == ("train_llm", "tiny")
    assert not run.git.remote_url
    assert b"example.org" not in second.read_bytes()
    updates = [item for record in kind(second, "config") for item in record.config.update]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert {"seed": 1, "optim": "muon", "git": "abc"}.items() <= config.items()
    # Nothing of the machine, its packages and what it prints.
    collected = {record.WhichOneof("record_type") for record in records(second)}
    assert collected.isdisjoint({"files", "stats", "output", "output_raw", "environment"})


def test_wandb_without_a_login_is_refused_and_asks_nobody(tmp_path: Path) -> None:
    done = run_tracked(tmp_path, "wandb")
    assert done.returncode == 1
    assert "TrackingError: report_to: wandb is not logged in" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "out" / "train_log.jsonl").exists()


def history(file: Path) -> Series:
    """Every metric of a W&B file, as `logged` gives it."""
    series: Series = {}
    for record in kind(file, "history"):
        row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in row.keys() - {"_step", "_timestamp", "_runtime"}:
            series.setdefault(name, []).append((row["_step"], f"{float(row[name]):.6g}"))
    return series


def times(file: Path) -> dict[int, float]:
    """When each step of a W&B file was logged last, in Unix seconds."""
    rows = [record.history.item for record in kind(file, "history")]
    by_name = [{item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
    return {row["_step"]: round(row["_timestamp"], 3) for row in by_name}


def log_times(place: Path) -> dict[int, float]:
    lines = (place / "out" / "train_log.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: json.loads(line)["time"] for line in lines}


def kind(file: Path, name: str) -> list[Any]:
    return [record for record in records(file) if record.WhichOneof("record_type") == name]


def records(file: Path) -> Iterator[Any]:
    """The records of a W&B file, which is a log in LevelDB's format behind seven bytes.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    header, block_size, full, last = struct.Struct("<IHB"), 32768, 1, 4
    content, position, record = file.read_bytes(), 7, b""
    while position < len(content):
        if block_size - position % block_size < header.size:
            position += block_size - position % block_size
            continue
        _, length, part = header.unpack_from(content, position)
        position += header.size
        record += content[position : position + length]
        position += length
        if part in (full, last):
            yield Record.FromString(record)
            record = b""
