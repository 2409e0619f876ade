"""A run that is limited by hours ends its decay with them, whatever slows it. Clocks are fake."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_llm
from llm_training import run as run_room
from llm_training.deadline import (
    OPEN_STEPS,
    Deadline,
    DeadlineState,
    Pauses,
    Readings,
    fitting_steps,
)
from llm_training.schedules import LearningRateSchedule
from llm_training.stopping import Decision
from tests.small_runs import open_place, read_log, train_small

KINDS = ("linear", "cosine", "constant", "warmup-stable-decay")
PAUSES = Pauses(eval_steps=100, save_steps=250)
HOURS = 0.5


class Clock:
    """A clock that only tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Simulated:
    """A run without a model: its rates, and when its steps were over.

    Attributes:
        ended: seconds of training when all is over: evaluation, checkpoint and model included.
        kept: what the last checkpoint has.
    """

    rates: list[float]
    ended: float
    reviews: list[float]
    kept: dict[str, Any]


def simulate(
    seconds_of_step: Callable[[int], float],
    kind: str = "cosine",
    *,
    evaluation: float = 3.0,
    save: float = 2.0,
    hours: float = HOURS,
    warmup: int = 20,
    decay_steps: int | None = None,
    max_steps: int | None = None,
    kept: dict[str, Any] | None = None,
    first: int = 0,
    stop_after: int = OPEN_STEPS,
) -> Simulated:
    """What train_llm.py does with the clock, step by step."""
    clock = Clock()
    deadline = Deadline.of_run(
        hours, kept, clock=clock, checkpoint_bytes=1e8 * save, model_bytes=1e8
    )
    state = deadline.state
    total = min(max_steps or OPEN_STEPS, state.total_steps or OPEN_STEPS)
    schedule = LearningRateSchedule(kind, 1.0, warmup, decay_steps, total, 0.1, state.anchor)
    deadline.start(first)
    rates, reviews, step = [], [], first

    def pause(name: str, seconds: float) -> None:
        with deadline.pause(name):
            clock.now += seconds

    while step < schedule.total_steps and step < stop_after:
        rates.append(schedule.at(step))
        clock.now += seconds_of_step(step)
        step += 1
        if deadline.is_due(step):
            reviews.append(deadline.seconds)
            found = deadline.review(step, deadline.readings(), PAUSES, max_steps)
            if found is not None and found != schedule.total_steps:
                schedule = schedule.laid_anew(step, found)
                deadline.note(found, schedule.anchor)
        is_last = step == schedule.total_steps
        if step % 100 == 0 or is_last:
            pause("evaluation", evaluation)
        if step % 250 == 0 or is_last:
            pause("save", save)
    if step == schedule.total_steps:
        pause("export", 1.0)
    return Simulated(rates, deadline.seconds, reviews, deadline.to_keep() or {})


def largest_rise(rates: list[float], warmup: int = 20) -> float:
    return max(b - a for a, b in itertools.pairwise(rates[warmup:]))


SPEEDS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.5,
    "slow from the middle on": lambda step: 0.5 if step < 1500 else 0.8,
    "fast from the middle on": lambda step: 0.5 if step < 1500 else 0.3,
    "slow for a while": lambda step: 2.0 if 1000 <= step < 1100 else 0.5,
    "slow at the start": lambda step: 30.0 if step == 0 else 0.5,
    "slow in the decay": lambda step: 0.5 if step < 3000 else 0.7,
    "large steps": lambda step: 20.0,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_decay_ends_with_the_hours(kind: str, speed: str) -> None:
    run = simulate(SPEEDS[speed], kind)
    step = SPEEDS[speed](len(run.rates))
    end = 3600 * HOURS
    assert end - 2 * step - 3.0 <= run.ended <= end  # the reserve is a fifth of 6 s, and the margin
    if kind != "constant":
        share = {"warmup-stable-decay": 0.2}.get(kind, 1.0)
        length = share * len(run.rates)
        assert run.rates[-1] <= 0.1 + 3 / length  # one or two steps above the end of the decay


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_rate_never_rises_and_never_jumps(kind: str, speed: str) -> None:
    rates = simulate(SPEEDS[speed], kind).rates
    assert largest_rise(rates) <= 1e-12
    falls = [a - b for a, b in itertools.pairwise(rates[20:])]
    # No step falls more than a few of an even decay of a fifth of the run.
    assert max(falls) <= 4 * 0.9 / (0.2 * len(rates))


def test_long_evaluations_are_counted() -> None:
    short, long = (simulate(lambda _: 0.5, evaluation=seconds) for seconds in (1.0, 25.0))
    assert 3600 * HOURS - 10 <= long.ended <= 3600 * HOURS
    # Each evaluation of 25 s comes after 50 s of steps, and takes a third of the time.
    assert len(long.rates) / len(short.rates) == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("step", [1, 20, 99, 100, 101])
@pytest.mark.parametrize("left", [0.3, 7.0, 49.0, 120.0, 1000.0])
def test_pauses_on_the_way_are_counted_one_by_one(step: int, left: float) -> None:
    at, pauses = Readings(0.0, 0.0, 12.0, 5.0, 0.0), Pauses(eval_steps=25, save_steps=40)
    spent, count = 0.0, 0
    while True:  # what is due after the last step belongs to the end
        done = step + count
        pause = 12.0 * (done % 25 == 0) + 5.0 * (done % 40 == 0)
        if spent + pause + 0.5 > left:
            break
        spent, count = spent + pause + 0.5, count + 1
    assert fitting_steps(step, left, 0.5, at, pauses) == count


def test_the_plateau_lasts_until_the_decay_must_begin() -> None:
    run = simulate(lambda _: 0.5, "warmup-stable-decay", decay_steps=400)
    num_steps = len(run.rates)
    assert [rate == 1.0 for rate in run.rates[20 : num_steps - 405]] == [True] * (num_steps - 425)
    assert run.rates[num_steps - 395] < 1.0
    by_default = simulate(lambda _: 0.5, "warmup-stable-decay").rates
    decayed = sum(rate < 1.0 for rate in by_default[20:])
    assert decayed == pytest.approx(len(by_default) / 5, rel=0.02)


def test_steps_end_a_run_that_has_hours_left() -> None:
    run = simulate(lambda _: 0.5, max_steps=700)
    assert len(run.rates) == 700
    plain = LearningRateSchedule("cosine", 1.0, 20, None, 700, 0.1)
    assert run.rates == [plain.at(step) for step in range(700)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_after", [3, 30, 1500, 3300])
def test_a_resumed_run_has_the_rest_of_its_hours(kind: str, stop_after: int) -> None:
    first = simulate(lambda _: 0.5, kind, stop_after=stop_after)
    kept = json.loads(json.dumps(first.kept))
    second = simulate(lambda _: 0.5, kind, kept=kept, first=stop_after)
    assert 3600 * HOURS - 10 <= second.ended <= 3600 * HOURS
    rates = first.rates + second.rates
    assert largest_rise(rates) <= 1e-12
    whole = simulate(lambda _: 0.5, kind)
    assert len(rates) == pytest.approx(len(whole.rates), abs=12)


def test_what_was_decided_lies_in_the_checkpoint() -> None:
    first = simulate(lambda _: 0.5, stop_after=1500)
    schedule = LearningRateSchedule(
        "cosine", 1.0, 20, None, first.kept["total_steps"], 0.1, first.kept["anchor"]
    )
    second = simulate(lambda _: 0.5, kept=dict(first.kept), first=1500)
    assert second.rates[:19] == [schedule.at(step) for step in range(1500, 1519)]


def test_clocks_are_asked_seldom() -> None:
    reviews = simulate(lambda _: 0.05).reviews
    seldom = [b - a for a, b in itertools.pairwise(reviews) if 60 < a < 3600 * HOURS - 60]
    assert min(seldom) >= 9
    assert len(reviews) < 3600 * HOURS / 9.5 + 30  # some more at the start and the end


def test_hours_shorter_than_anything() -> None:
    # The second step may have begun when the first one's end is known.
    assert len(simulate(lambda _: 0.5, hours=1e-6).rates) == 2
    # Nothing is left to decay, and the run ends with its hours all the same.
    run = simulate(lambda _: 0.5, hours=0.05, warmup=10_000)
    assert 3600 * 0.05 - 10 <= run.ended <= 3600 * 0.05


def test_without_hours_nothing_happens() -> None:
    deadline = Deadline()
    assert not any(deadline.is_due(step) for step in range(5))
    assert deadline.to_keep() is None


def test_a_state_survives_json() -> None:
    state = DeadlineState(2.0, seconds=3.5, total_steps=7, anchor=(3, 0.25))
    assert DeadlineState.of(json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert DeadlineState.of(None) is None


# ------------------------------------------------------------------------------------ real runs


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In the runs of a test, each step takes a second, and nothing else takes any time."""
    clock = Clock()
    open_place(tmp_path, monkeypatch)
    deadline_as_it_is, step_as_it_is = run_room.Deadline.of_run, train_llm.compute_gradients

    def of_run(*args: Any, **more: Any) -> Deadline:
        return deadline_as_it_is(*args, **more | {"clock": clock})

    def take_a_second(*args: Any) -> Any:
        clock.now += 1.0
        return step_as_it_is(*args)

    monkeypatch.setattr(run_room.Deadline, "of_run", of_run)
    monkeypatch.setattr(train_llm, "compute_gradients", take_a_second)
    return clock


TIMED: dict[str, Any] = {
    "max_steps": None,
    "max_train_hours": 60 / 3600,
    "save_steps": 10,
    "lr_scheduler_type": "linear",
    "min_lr_ratio": 0.0,
    "learning_rate": 1e-3,
}


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Lets a run end in the middle of the step after `step`."""
    step_as_it_is = train_llm.compute_gradients

    def die(run: train_llm.Run, *args: Any) -> Any:
        if run.state.step == step:
            raise train_llm.RankError("killed")
        return step_as_it_is(run, *args)

    patch.setattr(train_llm, "compute_gradients", die)


def rates_of(folder: Path) -> list[float]:
    return [line["train/learning_rate"] for line in read_log(folder)]


def test_a_run_goes_through_its_data_again_until_its_hours_are_over(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_small(tmp_path, **TIMED)
    rates = rates_of(folder)
    assert 58 <= len(rates) <= 60
    assert largest_rise(rates, 0) <= 1e-12
    assert rates[-1] < 1e-4
    said = capsys.readouterr().out
    assert "Length   0.0166667 hours of training: the steps are counted on the way" in said
    assert "step 1/? | " in said
    assert "steps fit into 0.0166667 hours" in said
    last = json.loads((folder / "checkpoints" / "last" / "train_state.json").read_text())
    assert last["step"] == len(rates)
    assert last["deadline"]["seconds"] <= 60
    assert (folder / "final" / "model.safetensors").exists()


def test_a_killed_run_has_the_rest_of_its_hours(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rates_of(train_small(tmp_path, "whole", **TIMED))
    with monkeypatch.context() as patch:
        die_at(patch, 33)
        train_small(tmp_path, code=1, **TIMED)
    clock.now += 1e6  # what lies between two starts does not count
    rates = rates_of(train_small(tmp_path, **TIMED))
    assert len(rates) == pytest.approx(len(whole), abs=1)
    assert rates[:30] == whole[:30]
    assert largest_rise(rates, 0) <= 1e-12


def asked(is_asked: bool) -> Decision:
    return Decision(None, frozenset({"DECAY"} if is_asked else ()))


def test_a_person_can_begin_the_decay_sooner(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_llm, "agree", lambda run: asked(run.state.step + 1 == 20))
    rates = rates_of(train_small(tmp_path, **TIMED | {"lr_scheduler_type": "warmup-stable-decay"}))
    assert len(rates) == 25  # a fifth of which decays
    assert [rate < 1e-3 for rate in rates] == [False] * 21 + [True] * 4


def test_more_hours_let_a_run_go_on_at_its_rate(clock: Clock, tmp_path: Path) -> None:
    first = rates_of(train_small(tmp_path, **TIMED | {"min_lr_ratio": 0.1}))
    changed = TIMED | {"min_lr_ratio": 0.1, "max_train_hours": 90 / 3600}
    rates = rates_of(train_small(tmp_path, **changed))
    assert 88 <= len(rates) <= 90
    assert max(rates[len(first) :]) <= first[-1]


def test_hours_can_be_given_to_a_run_that_had_none(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = TIMED | {"num_train_epochs": 6}  # 95 steps
    with monkeypatch.context() as patch:
        die_at(patch, 40)
        first = rates_of(train_small(tmp_path, code=1, **steps | {"max_train_hours": None}))
    rates = rates_of(train_small(tmp_path, **steps | {"max_train_hours": 30 / 3600}))
    assert 68 <= len(rates) <= 70
    assert rates[40] == pytest.approx(first[-1], rel=0.05)
    assert largest_rise(rates, 0) <= 1e-12


def test_a_warmup_as_long_as_the_hours_is_told(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = rates_of(train_small(tmp_path, **TIMED | {"warmup_steps": 500}))
    assert 58 <= len(rates) <= 60
    assert "WARNING: --warmup_steps 500 is as long as all" in capsys.readouterr().out
