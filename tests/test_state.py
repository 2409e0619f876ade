"""The state of a run survives a checkpoint to the last bit, early stopping's counters included."""

from pathlib import Path

import numpy as np
import pytest

from llm_training.state import TrainState


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(seed=2**31, step=7, samples=56, tokens=400, best_loss=0.1 + 0.2, best_step=4)
    state.logged_loss_sum = 1 / 3
    state.save(tmp_path / "state.json")
    assert TrainState.load(tmp_path / "state.json") == state


@pytest.mark.parametrize("text", ["[1]", '{"step": 3}', '{"seed": 1, "unknown": 2}', "{"])
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


def test_evaluations_are_counted_until_one_is_better() -> None:
    state = TrainState(seed=0)
    found = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.9]):
        state.step = step
        found.append((state.note_evaluation(loss, 0.0), state.evals_without_better))
    assert found == [(True, 0), (True, 0), (False, 1), (False, 2), (True, 0)]
    assert (state.first_loss, state.last_loss, state.best_loss, state.best_step) == (3, 1.9, 1.9, 4)


def test_gains_below_min_delta_do_not_hold_off_early_stopping() -> None:
    state = TrainState(seed=0)
    assert [state.note_evaluation(loss, 0.1) for loss in (2.0, 1.95, 1.91, 1.85)] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_nan_loss_is_never_the_best() -> None:
    state = TrainState(seed=0)
    state.note_evaluation(2.0, 0.0)
    assert not state.note_evaluation(float("nan"), 0.0)
    assert state.best_loss == 2.0
