"""Proves that rows hold every segment once, and are those of plain best-fit-decreasing."""

from __future__ import annotations

import numpy as np
import pytest

from llm_training.data.rows.packing import cut_into_segments, pack


def plain_best_fit(lengths: list[int], row_size: int) -> list[int]:
    """The filled length of each row, the slow way."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else row_size
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(row_size - room for room in rooms)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_plain_best_fit_decreasing(seed: int) -> None:
    draw = np.random.default_rng(seed)
    row_size = int(draw.integers(1, 40))
    lengths = draw.integers(1, row_size + 1, int(draw.integers(1, 80))).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    packing = pack(starts, lengths, row_size)
    rows = [packing.row_segments(row) for row in range(packing.num_rows)]
    assert sorted(sum(length for _, length in row) for row in rows) == plain_best_fit(
        lengths.tolist(), row_size
    )
    placed = sorted(segment for row in rows for segment in row)
    assert placed == list(zip(starts.tolist(), lengths.tolist(), strict=True))


def test_many_equal_segments_share_rows_as_they_fit() -> None:
    packing = pack(np.arange(7) * 3, np.full(7, 3), 10)
    assert [len(packing.row_segments(row)) for row in range(packing.num_rows)] == [3, 3, 1]


def test_no_segment_makes_no_row() -> None:
    assert pack(np.zeros(0, np.int64), np.zeros(0, np.int64), 8).num_rows == 0


def test_a_long_document_goes_on_in_further_segments() -> None:
    starts, lengths = cut_into_segments(np.array([3, 14, 18], np.uint64), 4, keep_tails=True)
    assert starts.tolist() == [0, 3, 7, 11, 14]
    assert lengths.tolist() == [3, 4, 4, 3, 4]


def test_or_only_its_beginning_is_taken() -> None:
    starts, lengths = cut_into_segments(np.array([3, 14, 18], np.uint64), 4, keep_tails=False)
    assert (starts.tolist(), lengths.tolist()) == ([0, 3, 14], [3, 4, 4])
