"""A device that decides alone which steps to apply gives the same run, and is left to work.

On a GPU that is how it goes; here, a CPU is taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train_llm
from llm_training import steps
from llm_training.ranks import RankError
from tests.host_waits import HostWaits
from tests.small_runs import curve, open_place, read_log, train_small, weights
from tests.test_mishaps import spoil

Train = Callable[..., Path]
# 20 steps of 4 samples; nothing is due after most of them.
CHANGES: dict[str, Any] = {
    "max_steps": 20,
    "save_steps": 5,
    "logging_steps": 5,
    "eval_steps": 10,
    "dropout": 0.1,
    "max_skipped_steps": 3,
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return partial(train_small, open_place(tmp_path, monkeypatch), **CHANGES)


def decide_on_the_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the device decide in all runs to come; returns the list of the steps it decided."""
    decided: list[int] = []
    finish = steps.finish_step_unseen

    def finish_and_note(*args: Any, **named: Any) -> Any:
        decided.append(1)
        return finish(*args, **named)

    monkeypatch.setattr(steps, "can_finish_unseen", lambda *_: True)
    monkeypatch.setattr(steps, "finish_step_unseen", finish_and_note)
    return decided


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        (folder / "checkpoints/last/train_state.json").read_text("utf-8")
    )
    return state


def assert_same(folder: Path, other: Path) -> None:
    assert curve(folder) == curve(other)
    assert weights(folder) == weights(other)
    assert state_of(folder) == state_of(other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": None},
        {"skip_spikes": 1.0, "max_steps": 60, "learning_rate": 0.05, "max_skipped_steps": 50},
        {"max_steps": None, "num_train_epochs": 0.3, "logging_steps": 100, "save_steps": 100},
    ],
    ids=["clipped", "unclipped", "spikes", "epochs"],
)
def test_the_run_is_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    seen = train("seen", **changes)
    decided = decide_on_the_device(monkeypatch)
    unseen = train("unseen", **changes)
    assert len(decided) >= state_of(seen)["step"]
    if "skip_spikes" in changes:
        assert state_of(seen)["health"]["num_skipped"] > 0
    assert_same(unseen, seen)


@pytest.mark.parametrize("start", [20, 28, 72, 76])  # steps 6, 8, 19 and 20
def test_bad_steps_are_left_out_alike(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start: int,
) -> None:
    spoil(monkeypatch, start, start + 8)
    seen = train("seen")
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(told) == 2
    decide_on_the_device(monkeypatch)
    unseen = train("unseen")
    assert [line for line in capsys.readouterr().out.splitlines() if "left out" in line] == told
    assert_same(unseen, seen)
    names = sorted(path.name for path in (seen / "skipped").iterdir())
    for name in names:
        dumps = [json.loads((run / "skipped" / name).read_text()) for run in (seen, unseen)]
        assert dumps[0] == dumps[1]
    assert names == sorted(path.name for path in (unseen / "skipped").iterdir())


@pytest.mark.parametrize("save_steps", [5, 3])  # right before what is passed over, and earlier
@pytest.mark.parametrize("length", [{}, {"max_steps": None, "num_train_epochs": 1.2}])
def test_a_run_goes_back_alike(
    length: dict[str, Any],
    save_steps: int,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, 28, 48)
    changes = length | {"max_rewinds": 1, "save_steps": save_steps, "logging_steps": 20}
    seen = train("seen", **changes)
    decide_on_the_device(monkeypatch)
    unseen = train("unseen", **changes)
    said = capsys.readouterr().out
    # The third checkpoint of the second kind lies at step 6.
    assert said.count(f"This run goes back to step {6 if save_steps == 3 else 5}.") == 2
    assert said.count("Passed over: samples 24-43") == 2
    assert_same(unseen, seen)


def test_a_stopped_run_continues_bit_for_bit(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = train("seen")
    decide_on_the_device(monkeypatch)
    gradients, left = train_llm.compute_gradients, [13]

    def die(run: train_llm.Run, *args: Any) -> Any:
        if [run.state.step] == left:
            left.clear()
            raise RankError("the machine is gone")
        return gradients(run, *args)

    monkeypatch.setattr(train_llm, "compute_gradients", die)
    train("parts", code=1)
    assert not left
    assert_same(train("parts"), seen)


def test_the_host_asks_the_device_for_nothing_between_two_lines_of_the_log(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide_on_the_device(monkeypatch)
    asked: dict[int, list[str]] = {}
    settle = train_llm.settle
    with HostWaits(beside="count_window_tokens") as spy:

        def settle_and_look(run: train_llm.Run) -> bool:
            went_on = settle(run)
            asked.setdefault(run.state.step, []).extend(spy.take())
            return went_on

        monkeypatch.setattr(train_llm, "settle", settle_and_look)
        folder = train()
    due = {line["step"] for line in read_log(folder)}
    assert len(asked) > 12
    # Logging, evaluating and saving may ask.
    assert {step: places for step, places in asked.items() if places and step not in due} == {}
