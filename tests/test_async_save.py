"""A checkpoint that is written while the run trains on is as good as any other."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train_llm
from llm_training import checkpoint_writing
from llm_training.checkpoint_comparison import compare_checkpoints
from llm_training.checkpoint_writing import StagedCheckpoint
from llm_training.checkpointing import open_checkpoint
from llm_training.model_state import staging, tensor_files
from tests.small_runs import curve, open_place, train_small, weights

Train = Callable[..., Path]
CHANGES: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "save_total_limit": 2}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return partial(train_small, open_place(tmp_path, monkeypatch), **CHANGES)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_same_checkpoints_and_the_same_run(train: Train, tmp_path: Path) -> None:
    plain, other = train("plain"), train("other", async_save=True)
    assert names(other) == names(plain) == ["last", "step-00000006", "step-00000008"]
    for name in ("step-00000006", "step-00000008"):
        found = compare_checkpoints(plain / "checkpoints" / name, other / "checkpoints" / name)
        assert found.num_tensors > 20
        assert found.differences == []
        files = [open_checkpoint(run / "checkpoints" / name).files for run in (plain, other)]
        assert files[0] == files[1]  # to the last byte
    assert curve(other) == curve(plain)
    assert weights(other) == weights(plain)


def test_training_goes_on_while_one_is_written(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    gate = threading.Event()
    write, step_as_it_is = StagedCheckpoint.write, train_llm.compute_gradients

    def slow_write(self: StagedCheckpoint) -> None:
        if self.path.name == "step-00000002":
            assert gate.wait(30)  # until the run has trained on
        write(self)

    def step(run: train_llm.Run, *args: Any) -> Any:
        steps.append(run.state.step)
        if run.state.step == 3:
            assert not (run.output.checkpoints / "step-00000002").exists()
            gate.set()
        return step_as_it_is(run, *args)

    monkeypatch.setattr(StagedCheckpoint, "write", slow_write)
    monkeypatch.setattr(train_llm, "compute_gradients", step)
    folder = train(async_save=True, save_total_limit=None)
    assert steps == list(range(8))
    assert names(folder) == ["last", *(f"step-0000000{step}" for step in (2, 4, 6, 8))]


def test_a_kill_meanwhile_leaves_the_one_before(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train("plain")
    write = StagedCheckpoint.write

    def broken_write(self: StagedCheckpoint) -> None:
        if self.path.name == "step-00000006":
            raise KeyboardInterrupt  # as if the process were gone: nothing is cleaned up
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "write", broken_write)
        with pytest.raises(KeyboardInterrupt):
            train("other", async_save=True)
    other = train("other", async_save=True)
    assert curve(other) == curve(plain)
    assert weights(other) == weights(plain)


@pytest.mark.parametrize(("policy", "code"), [("stop", 1), ("continue", 0)])
def test_what_cannot_be_written_is_told_at_the_next_save(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    code: int,
) -> None:
    write = tensor_files._write

    def full(path: Path, content: Any) -> dict[str, Any]:
        if "step-00000002" in str(path) and path.name == "optimizer.bin":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(tensor_files, "_write", full)
    folder = train(code=code, async_save=True, on_save_error=policy, save_total_limit=None)
    said = capsys.readouterr()
    told = "step-00000002 was not saved: rank 0 could not write optimizer.bin: [Errno 28] No space"
    assert told in said.out + said.err
    found = [name for name in names(folder) if name.startswith("step-")]
    assert found == [f"step-0000000{step}" for step in ((4, 6, 8) if code == 0 else ())]


def test_too_little_memory_is_told_with_the_way_out(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = checkpoint_writing.shutil.disk_usage

    def small(path: Path) -> Any:
        found = usage(path)
        return found._replace(free=1000) if path == checkpoint_writing.MEMORY else found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writing.shutil, "disk_usage", small)
        train("files", code=1, async_save=True)
    assert (
        "1,000 are free there. Make it larger, or leave --async_save out" in capsys.readouterr().err
    )
    monkeypatch.setattr(staging, "free_memory", lambda: 1000)
    train("tensors", code=1, async_save=True)
    assert re.search(
        r"--async_save needs [\d,]+ bytes of memory for model\.safetensors, and 1,000 are free\."
        " Leave --async_save out",
        capsys.readouterr().err,
    )


def test_nothing_is_left_in_memory(train: Train) -> None:
    before = set(checkpoint_writing.MEMORY.glob("train_llm-*"))
    train(async_save=True)
    assert set(checkpoint_writing.MEMORY.glob("train_llm-*")) == before
