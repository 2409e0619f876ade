"""The order of rows is a pure function of (seed, epoch, index): a permutation, found in O(1)."""

import time

import numpy as np
import pytest

from llm_training.data.rows.order import sample_rows


def order(start: int, stop: int, num_rows: int, seed: int = 0) -> list[int]:
    return sample_rows(np.arange(start, stop, dtype=np.int64), num_rows, seed).tolist()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 63, 64, 65, 100, 1000, 4097])
def test_every_epoch_holds_every_row_once(num_rows: int) -> None:
    for epoch in range(3):
        rows = order(epoch * num_rows, (epoch + 1) * num_rows, num_rows)
        assert sorted(rows) == list(range(num_rows))


def test_epochs_and_seeds_differ() -> None:
    first, second = order(0, 100, 100), order(100, 200, 100)
    assert first != second
    assert first != order(0, 100, 100, seed=1)
    assert first != list(range(100))


def test_positions_can_be_asked_for_one_by_one_and_across_epochs() -> None:
    together = order(0, 250, 100)
    assert together == [order(i, i + 1, 100)[0] for i in range(250)]


def test_the_order_is_the_one_of_the_first_release() -> None:
    # A resumed run must find the order it began with: these numbers may never change.
    assert order(0, 12, 1000, seed=42) == GOLDEN


def test_neighbours_are_mixed_well() -> None:
    rows = np.array(order(0, 10_000, 10_000), dtype=float)
    correlation = np.corrcoef(rows[:-1], rows[1:])[0, 1]
    fixed_points = (rows == np.arange(10_000)).sum()
    assert abs(correlation) < 0.04  # four standard deviations of independent draws
    assert fixed_points < 8  # one is expected


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    huge = 10**12
    began = time.perf_counter()
    rows = order(5 * huge + 123_456_789, 5 * huge + 123_456_789 + 64, huge)
    assert time.perf_counter() - began < 5  # a stored permutation would take terabytes
    assert len(set(rows)) == 64
    assert all(0 <= row < huge for row in rows)


GOLDEN = [971, 324, 600, 460, 311, 137, 218, 112, 485, 72, 876, 464]
