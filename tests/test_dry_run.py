"""Proves that --dry_run tells what the run then does, leaves nothing behind and refuses in time."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llm
from llm_training import dry_run, memory_needs
from llm_training.argument_parsing import read_arguments
from llm_training.checkpoint_files import whole_ones
from llm_training.disk_needs import DiskNeed
from llm_training.memory_needs import MemoryNeed
from tests.small_runs import curve, open_place, train_small

OF_THE_PLAN = ("train:", "validation:", "Rows", "Batch", "Rate", "Memory", "CPU")


def lines_of(output: str, *labels: str) -> list[str]:
    """The lines that begin so, but for what is free at that moment."""
    lines = [line for line in output.splitlines() if line.startswith(labels)]
    return [line.partition(" of ")[0] if line.startswith("Memory") else line for line in lines]


def test_it_tells_what_the_run_then_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    train_small(place, dry_run=True)
    told = capfd.readouterr().out
    assert not (place / "run").exists()
    train_small(place)
    said = capfd.readouterr().out
    labels = tuple(label for label in OF_THE_PLAN if label != "Rate")
    assert lines_of(told, *labels) == lines_of(said, *labels)
    assert "4 steps = " in told and "Compute" in told and "tokens a parameter" in told
    assert len(lines_of(told, "Rate")[0].split(",")) == 4  # of four steps, two points are one


def test_a_checkpoint_takes_the_bytes_that_were_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_place(tmp_path, monkeypatch)
    larger: dict[str, Any] = {
        "config_overrides": {"n_layer": 2, "n_embd": 128, "n_head": 2},
        "save_steps": 4,
    }
    told = needs_of(place, **larger)[1]
    folder = train_small(place, **larger)
    (checkpoint,) = whole_ones(folder / "checkpoints")
    assert told.checkpoint == pytest.approx(checkpoint.num_bytes, rel=0.02)
    final = sum(path.stat().st_size for path in (folder / "final").glob("*.safetensors"))
    assert told.models == pytest.approx(final, rel=0.02)


def needs_of(place: Path, **changes: Any) -> tuple[MemoryNeed, DiskNeed]:
    """What a dry run of the settings in this folder reckons with."""
    found: list[Any] = []
    estimate = dry_run.estimate_needs

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(estimate(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "estimate_needs", spy)
        train_small(place, dry_run=True, **changes)
    return found[0].memory, found[0].disk


def test_it_takes_no_weights_and_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    began = time.monotonic()
    # 7 billion parameters, 112 GB with gradients and moments: told, and refused here.
    overrides = {"n_layer": 32, "n_embd": 4096, "n_head": 32}
    monkeypatch.setattr(memory_needs, "free_memory", lambda *_: 10**9)
    monkeypatch.setattr("llm_training.needs.free_memory", lambda *_: 10**9)
    train_small(place, code=1, dry_run=True, config_overrides=overrides)
    out, err = capfd.readouterr()
    assert time.monotonic() - began < 15
    assert "gpt2, 6,4" in out
    assert "Memory: each process needs about 10" in err
    assert "a smaller model" in err


def test_a_small_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    train_small(place, dry_run=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    train_small(place, code=1, dry_run=True)
    assert "Give a --save_total_limit" in capfd.readouterr().err


def test_only_rank_0_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train_small(place, dry_run=True)
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert train_llm.main(read_arguments(["settings.json"], 2)) == 0
    told = capfd.readouterr().out
    assert "ddp x 2" in told and "2 processes" in told
    assert not torch.distributed.is_initialized()


def test_a_trial_is_timed_and_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    before = set(place.iterdir()) | {place / "settings.json", place / "token_cache"}
    train_small(place, dry_run=True, dry_run_steps=3, eval_steps=2, validation_file="text.txt")
    told = capfd.readouterr().out
    assert "3 steps, median" in told
    assert "for all 4 steps" in told and "for 4 saves and 3 evaluations" in told
    assert set(place.iterdir()) <= before


def test_the_run_is_the_same_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(tmp_path, monkeypatch)
    plain = curve(train_small(place, "plain"))
    monkeypatch.setattr("llm_training.run.need_lines", lambda *_: [])
    assert curve(train_small(place, "without")) == plain
    assert read_arguments(["settings.json"], 1).output_dir == "without"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "belongs to another run (seed: 42 there, 7 here)"),
        ({"block_size": 16}, "block_size: 32 there, 16 here)"),
        ({"max_steps": 2, "save_steps": 2}, "is at step 4, beyond the 2 steps asked for"),
        ({"resume_from_checkpoint": "none"}, "already holds a run"),
    ],
)
def test_what_the_run_refuses_to_continue_is_refused(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = open_place(tmp_path, monkeypatch)
    train_small(place)
    before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
    for dry in (True, False):
        capfd.readouterr()
        train_small(place, code=1, dry_run=dry, **changes)
        assert said in capfd.readouterr().err
        if dry:
            after = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
            assert after == before


def test_a_finished_run_and_a_strange_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    train_small(place)
    train_small(place, dry_run=True)
    assert "run already holds this run, finished" in capfd.readouterr().out
    (place / "run" / "arguments.json").unlink()
    train_small(place, code=1, dry_run=True)
    assert "but no arguments.json" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    train_small(place, "/proc/no_run", code=1, dry_run=True)
    message = capfd.readouterr().err
    assert "--output_dir /proc/no_run cannot be written" in message and "free" not in message


def test_rates_are_told_by_the_numbers_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    folder = train_small(place, warmup_steps=2)
    (line,) = lines_of(capfd.readouterr().out, "Rate")
    told = dict(re.findall(r"(\S+) at step (\d+)", line))
    logged = {
        f"{entry['train/learning_rate']:.2e}": str(entry["step"])
        for entry in curve(folder)
        if "train/learning_rate" in entry
    }
    assert told and told.items() <= logged.items()
