"""The state of a run survives a checkpoint to the last bit, early stopping's counters included."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llm_training.state import Aim, Result, TrainState
from llm_training.uncertainty import paired_difference


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(seed=2**31, step=7, samples=56, tokens=400, best_loss=0.1 + 0.2, best_step=4)
    state.logged_loss_sum = 1 / 3
    state.save(tmp_path / "state.json")
    assert TrainState.load(tmp_path / "state.json") == state


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{"step": 3}',
        '{"seed": 1, "unknown": 2}',
        "{",
        '{"seed": 1, "best": {"metric": "a"}}',
    ],
)
def test_what_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError):
        TrainState.load(tmp_path / "state.json")


def test_the_hash_of_samples_is_of_their_order_and_survives_the_disk(tmp_path: Path) -> None:
    def hash_of(*steps: list[int]) -> str:
        state = TrainState(seed=0)
        for step in steps:
            state.note_samples(np.array(step, np.int64))
            state.save(tmp_path / "state.json")
            state = TrainState.load(tmp_path / "state.json")
        return state.sample_hash

    assert len(hash_of([1, 2])) == 64
    assert hash_of([1, 2], [3]) == hash_of([1, 2], [3])
    assert len({hash_of([1, 2], [3]), hash_of([2, 1], [3]), hash_of([3], [1, 2]), hash_of([])}) == 4


def no_pairs(*arrays: object) -> tuple[float, float]:
    raise AssertionError("nothing asked for standard errors")


def noted(values: list[float], aim: Aim = Aim()) -> tuple[TrainState, list[tuple[bool, int]]]:  # noqa: B008
    """A state after these evaluations; of each whether it was the best, and the count after it."""
    state, found = TrainState(seed=0), []
    for step, value in enumerate(values):
        state.step = step
        result = Result(aim.metric, aim.rises, value, step)
        found.append((state.note_result(result, aim, no_pairs), state.evals_without_better))
    return state, found


def test_evaluations_are_counted_until_one_is_better() -> None:
    state, found = noted([3.0, 2.0, 2.5, 2.0, 1.9])
    assert found == [(True, 0), (True, 0), (False, 1), (False, 2), (True, 0)]
    assert state.best == state.reference == Result("eval/loss", False, 1.9, 4)


def test_a_metric_may_rise() -> None:
    state, found = noted([0.1, 0.3, 0.2, 0.31], Aim("eval/math/token_accuracy", rises=True))
    assert found == [(True, 0), (True, 0), (False, 1), (True, 0)]
    assert state.best is not None and state.best.value == 0.31


def test_gains_below_min_delta_are_the_best_and_do_not_hold_off_early_stopping() -> None:
    state, found = noted([2.0, 1.95, 1.91, 1.85, 1.8], Aim(min_delta=0.1))
    assert found == [(True, 0), (True, 1), (True, 2), (True, 0), (True, 1)]
    assert state.best is not None and state.best.value == 1.8
    assert state.reference is not None and state.reference.value == 1.85


def test_nan_is_never_the_best_nor_what_others_must_beat() -> None:
    nan = float("nan")
    state, found = noted([nan, 2.0, nan, 1.9])
    assert found == [(False, 1), (True, 0), (False, 1), (True, 0)]
    state.note_loss(nan)
    assert (state.best_loss, state.best_step) == (None, None)
    assert math.isnan(state.last_loss or 0.0)


def test_losses_are_noted_whatever_decides() -> None:
    state = TrainState(seed=0)
    for state.step, loss in enumerate([3.0, 2.0, 2.5]):
        state.note_loss(loss)
    assert (state.first_loss, state.last_loss, state.best_loss, state.best_step) == (3, 2.5, 2, 1)


def test_what_cannot_be_compared_begins_anew() -> None:
    state, _ = noted([3.0, 2.0, 2.5], Aim("eval/loss"))
    other = Aim("eval/math/loss")
    assert state.note_result(Result(other.metric, False, 9.0, 3, rows="a"), other, no_pairs)
    assert state.evals_without_better == 0
    assert not state.note_result(Result(other.metric, False, 9.5, 4, rows="a"), other, no_pairs)
    assert state.note_result(Result(other.metric, False, 9.6, 5, rows="b"), other, no_pairs)
    assert state.best is not None and state.best.value == 9.6


# Two groups of rows of 100 tokens; in the second the loss is noise.
TOKENS = (100, 100)


def grouped(step: int, *losses: float) -> Result:
    return Result("eval/loss", False, sum(losses) / 200, step, "rows", losses, TOKENS)


def test_standard_errors_ask_how_sure_a_difference_is_not_how_large() -> None:
    """The difference over its error: -50 +- 50 of the first pair, -2 +- 0 of the second."""
    noisy = (grouped(0, 400.0, 400.0), grouped(1, 400.0, 300.0))
    sure = (grouped(0, 400.0, 400.0), grouped(1, 398.0, 398.0))
    absolute = Aim(min_delta=0.1)
    in_errors = Aim(min_delta=2.0, in_standard_errors=True)

    def count_after(results: tuple[Result, Result], aim: Aim) -> int:
        state = TrainState(seed=0)
        assert [state.note_result(result, aim, paired_difference) for result in results] == [
            True,
            True,
        ]
        return state.evals_without_better

    assert (count_after(noisy, absolute), count_after(noisy, in_errors)) == (0, 1)
    assert (count_after(sure, absolute), count_after(sure, in_errors)) == (1, 0)


def test_equal_losses_are_not_better_and_a_worse_one_never_is() -> None:
    aim = Aim(min_delta=0.5, in_standard_errors=True)
    state = TrainState(seed=0)
    results = [grouped(0, 400.0, 400.0), grouped(1, 400.0, 400.0), grouped(2, 500.0, 401.0)]
    assert [state.note_result(result, aim, paired_difference) for result in results] == [
        True, False, False,
    ]  # fmt: skip
    assert state.evals_without_better == 2


def test_with_standard_errors_too_any_number_beats_infinity() -> None:
    aim = Aim(min_delta=2.0, in_standard_errors=True)
    state = TrainState(seed=0)
    for step, losses in enumerate([(math.inf, 5.0), (9.0, 5.0)]):
        state.step = step
        result = Result("eval/loss", False, sum(losses) / 8, step, "", losses, (4, 4))
        state.note_result(result, aim, paired_difference)
        assert (state.reference, state.evals_without_better) == (result, 0)


def test_groups_are_read_back_bit_for_bit_and_the_best_keeps_none(tmp_path: Path) -> None:
    aim = Aim(min_delta=1.0, in_standard_errors=True)
    state = TrainState(seed=0)
    state.note_result(grouped(0, 0.1 + 0.2, 1 / 3), aim, paired_difference)
    state.save(tmp_path / "state.json")
    loaded = TrainState.load(tmp_path / "state.json")
    assert loaded == state
    assert loaded.reference is not None and loaded.reference.group_losses == (0.1 + 0.2, 1 / 3)
    assert loaded.best is not None and loaded.best.group_losses == ()


def test_a_reference_without_groups_gives_way_to_one_with_them() -> None:
    aim = Aim(min_delta=2.0, in_standard_errors=True)
    state = TrainState(seed=0, evals_without_better=2)
    state.best = state.reference = Result("eval/loss", False, 1.0, 5)
    assert not state.note_result(grouped(6, 400.0, 400.0), aim, paired_difference)
    assert state.reference == grouped(6, 400.0, 400.0)
    assert state.evals_without_better == 0


def test_a_state_of_before_there_were_other_metrics_goes_on(tmp_path: Path) -> None:
    old = {"seed": 1, "best_loss": 2.0, "best_step": 4, "evals_without_better": 1}
    (tmp_path / "state.json").write_text(json.dumps(old))
    state = TrainState.load(tmp_path / "state.json")
    assert state.best == state.reference == Result("eval/loss", False, 2.0, 4)
    new = Result("eval/loss", False, 2.1, 6, rows="known by now")
    assert not state.note_result(new, Aim(), no_pairs)
    assert state.evals_without_better == 2
    (tmp_path / "state.json").write_text(json.dumps({"seed": 1, "best_loss": None}))
    assert TrainState.load(tmp_path / "state.json").best is None
