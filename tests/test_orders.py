"""A person who touches a file in the output folder is obeyed at the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train_llm
from llm_training import run
from llm_training.control_files import ControlFiles
from tests.small_runs import curve, open_place, read_log, train_small, weights

Train = Callable[..., Path]
CHANGES: dict[str, Any] = {
    "max_steps": 12,
    "save_steps": None,
    "eval_steps": 12,
    "lr_scheduler_type": "warmup-stable-decay",
    "lr_decay_steps": 3,
    "sample_prompt": "Die",
    "sample_max_new_tokens": 5,
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.setattr(run, "ControlFiles", partial(ControlFiles, min_seconds=0.0))
    return partial(train_small, open_place(tmp_path, monkeypatch), **CHANGES)


def touch_at(monkeypatch: pytest.MonkeyPatch, orders: dict[int, str]) -> None:
    """Makes a file of that name in the output folder while a step is computed."""
    count = train_llm.count_window_tokens

    def count_and_touch(parts: train_llm.Run, *args: Any) -> int:
        if name := orders.get(parts.state.step + 1):
            (parts.output.path / name).touch()
        return count(parts, *args)

    monkeypatch.setattr(train_llm, "count_window_tokens", count_and_touch)


def test_orders_are_carried_out_once_and_change_nothing_else(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train("plain")
    touch_at(monkeypatch, {3: "EVAL", 5: "SAVE", 7: "SAMPLE", 8: "NONSENSE"})
    capsys.readouterr()
    folder = train("ordered")
    said = capsys.readouterr().out
    evaluated = [line["step"] for line in read_log(folder) if "eval/loss" in line]
    assert evaluated == [0, 3, 12]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == [
        "step-00000005",
        "step-00000012",
    ]
    assert said.count('sample step 7 | greedy  | "Die" "') == 1
    assert said.count('sample step 7 | sampled | "Die" "') == 1
    assert [p.name for p in folder.iterdir() if p.name.isupper()] == ["NONSENSE"]
    losses = [line for line in curve(folder) if "train/loss" in line]
    assert losses == [line for line in curve(plain) if "train/loss" in line]
    assert weights(folder) == weights(plain)


def test_stop_ends_the_run_with_a_checkpoint_and_without_a_failure(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train("plain")
    with monkeypatch.context() as patch:
        touch_at(patch, {4: "STOP"})
        folder = train("stopped", code=0)
    assert (
        "stopped by the file STOP at step 4; the same command continues" in capsys.readouterr().err
    )
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert not (folder / "result.json").exists()
    train("stopped")
    assert curve(folder) == curve(plain)
    assert weights(folder) == weights(plain)


def test_decay_begins_at_once_also_after_a_stop(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [
        line["train/learning_rate"] for line in read_log(train("plain")) if "train/loss" in line
    ]
    with monkeypatch.context() as patch:
        touch_at(patch, {5: "DECAY", 6: "DECAY", 7: "STOP"})
        folder = train("short")
    said = capsys.readouterr().out
    assert "DECAY: the run now ends at step 8" in said
    assert "DECAY changes nothing: it has begun at step 5" in said
    train("short")
    log = [line for line in read_log(folder) if "train/loss" in line]
    assert [line["step"] for line in log] == list(range(1, 9))
    assert [line["train/learning_rate"] for line in log] == rates[:5] + rates[-3:]
    assert json.loads((folder / "result.json").read_text())["step"] == 8


def test_decay_and_sample_say_where_they_can_do_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touch_at(monkeypatch, {5: "DECAY", 6: "SAMPLE"})
    train(lr_scheduler_type="cosine", lr_decay_steps=None, sample_prompt=[])
    said = capsys.readouterr().out
    assert "DECAY changes nothing: lr_scheduler_type=cosine, step 5" in said
    assert "SAMPLE: there is no --sample_prompt to continue" in said
