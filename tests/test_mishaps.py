"""A run leaves bad steps out, goes back and passes over them, and ends the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llm
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.ranks import RankError
from tests.small_runs import curve, open_place, read_log, train_small, weights

Train = Callable[..., Path]
# 20 steps of 4 samples; each may be left out 3 times in a row.
CHANGES: dict[str, Any] = {"max_steps": 20, "save_steps": 5, "max_skipped_steps": 3}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_place(tmp_path, monkeypatch)


@pytest.fixture
def train(place: Path) -> Train:
    return partial(train_small, place, **CHANGES)


def spoil(monkeypatch: pytest.MonkeyPatch, start: int, stop: int, *, dies_at: int = -1) -> None:
    """Lets the loss be NaN at samples [start, stop); the run dies once, before step `dies_at`."""
    step_as_it_is, forward_as_it_is = train_llm.compute_gradients, CausalLMWithLoss.forward
    place, left = {"samples": 0}, [dies_at]

    def step(run: train_llm.Run, *args: Any) -> Any:
        if [run.state.step] == left:
            left.clear()
            raise RankError("the machine is gone")
        place["samples"] = run.state.samples
        return step_as_it_is(run, *args)

    def forward(self: CausalLMWithLoss, *args: Any, **named: Any) -> Any:
        loss, correct = forward_as_it_is(self, *args, **named)
        is_bad = self.training and start <= place["samples"] < stop
        return loss * torch.tensor(float("nan")) if is_bad else loss, correct

    monkeypatch.setattr(train_llm, "compute_gradients", step)
    monkeypatch.setattr(CausalLMWithLoss, "forward", forward)


def steps_of(folder: Path) -> list[float]:
    return [line["step"] for line in read_log(folder)]


def test_bad_steps_are_left_out_told_and_made_up_for(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 28, 40)
    folder = train()
    assert steps_of(folder) == list(range(1, 21))
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told[0] == "step 8 left out: loss nan (samples 28-31; 1 in a row, 1 in all)"
    assert len(told) == 3
    files = sorted((folder / "skipped").iterdir())
    assert [file.name for file in files] == [
        f"step-00000008-samples-{n}.json" for n in (28, 32, 36)
    ]
    dump = json.loads(files[0].read_text())
    assert (dump["step"], len(dump["sample_ids"]), len(dump["texts"])) == (8, 4, 4)
    assert dump["losses"] == ["nan"]
    assert dump["norms_by_layer"]["model.transformer.h.0"] == "nan"
    assert read_log(folder)[-1]["train/skipped_steps"] == 3
    state = json.loads((folder / "checkpoints/last/train_state.json").read_text())
    assert (state["step"], state["samples"]) == (20, 20 * 4 + 3 * 4)


def test_too_many_in_a_row_end_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 28, 48)
    folder = train(code=1)
    message = capsys.readouterr().err
    assert "4 in a row had to be left out (steps 8, samples 28-43), and 3 may be" in message
    assert "checkpoints/step-00000005; the same command continues from it" in message
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("dies_at", [-1, 9])
def test_a_run_goes_back_and_passes_over_a_bad_stretch(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dies_at: int
) -> None:
    spoil(monkeypatch, 28, 48)
    whole = train("whole", max_rewinds=1)
    said = capsys.readouterr().out
    assert "This run goes back to step 5." in said
    # One step more than the first that was bad; the last bad one is left out as any other.
    assert "Passed over: samples 24-43" in said
    assert steps_of(whole) == list(range(1, 21))
    monkeypatch.undo()
    monkeypatch.chdir(whole.parent)
    if dies_at > 0:  # after it went back
        spoil(monkeypatch, 28, 48, dies_at=dies_at)
        train("parts", code=1, max_rewinds=1)
        parts = train("parts", max_rewinds=1)
        assert curve(parts) == curve(whole)
        assert weights(parts) == weights(whole)
    else:
        spoil(monkeypatch, 28, 68)  # further than one going back reaches
        train("further", code=1, max_rewinds=1)
        assert "4 in a row had to be left out" in capsys.readouterr().err


def test_the_last_steps_of_an_epoch_can_be_bad(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 72, 80)
    folder = train(max_steps=None, num_train_epochs=0.5, logging_steps=100)
    last = read_log(folder)[-1]
    assert json.loads((folder / "result.json").read_text())["step"] == last["step"]
    assert (folder / "checkpoints/last").resolve().name == f"step-{int(last['step']):08d}"


def test_a_device_without_memory_is_told_with_remedies(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(train_llm, "backward", fail)
    train(code=1)
    message = capsys.readouterr().err
    assert "rank 0: the device has no memory left. CUDA out of memory." in message
    assert "--per_device_train_batch_size" in message
