"""Which documents share a row: pure functions of their lengths.

Source: best-fit-decreasing bin packing as used for training rows by Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Rows made of whole segments of the token stream; row r holds those of `row_segments(r)`.

    Attributes:
        starts: (segments,) int64, the first token of each, sorted by row.
        lengths: (segments,) int64, how many tokens it has.
        offsets: (rows + 1,) int64, where the segments of each row begin.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row_segments(self, row: int) -> list[tuple[int, int]]:
        """The (first token, number of tokens) of each segment of a row, in its order."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        return list(zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True))


def pack(starts: NDArray[np.int64], lengths: NDArray[np.int64], row_size: int) -> Packing:
    """Puts segments into as few rows as best-fit-decreasing finds.

    The longest come first; each goes into the fullest row that still has room for it. Time grows
    with the number of different lengths, not with the number of segments beyond sorting them.

    Args:
        starts, lengths: (segments,) int64; every length from 1 to `row_size`.
    """
    by_length = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[by_length], lengths[by_length]
    row_of = np.empty(len(lengths), np.int64)
    rows = _OpenRows(row_size)
    borders = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        length = int(lengths[begin])
        while begin < end:
            placed = rows.place(length, end - begin)
            row_of[begin : begin + len(placed)] = placed
            begin += len(placed)
    by_row = np.argsort(row_of, kind="stable")
    offsets = np.searchsorted(row_of[by_row], np.arange(rows.count + 1))
    return Packing(starts[by_row], lengths[by_row], offsets.astype(np.int64))


class _OpenRows:
    """Rows by the room they have left."""

    def __init__(self, row_size: int):
        self.count = 0
        self._row_size = row_size
        self._by_room: dict[int, list[NDArray[np.int64]]] = {}
        self._rooms = 0  # bit r is set where some row has room r

    def place(self, length: int, count: int) -> NDArray[np.int64]:
        """Takes in up to `count` segments of one length; returns the row of each it took."""
        fitting = self._rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            rows = self._take(room, -(-count // (room // length)))
        else:
            room = self._row_size
            num_new = -(-count // (room // length))
            rows = np.arange(self.count, self.count + num_new)
            self.count += num_new
        # A row that has room for several takes them one after the other: after the first it is
        # the fullest that still has room.
        each = room // length
        num_full, rest = divmod(count, each) if len(rows) * each > count else (len(rows), 0)
        self._put(room - each * length, rows[:num_full])
        if rest:
            self._put(room - rest * length, rows[num_full:])
        return np.repeat(rows, each)[:count]

    def _take(self, room: int, count: int) -> NDArray[np.int64]:
        rows = np.concatenate(self._by_room.pop(room))
        self._rooms &= ~(1 << room)
        self._put(room, rows[count:])
        return rows[:count]

    def _put(self, room: int, rows: NDArray[np.int64]) -> None:
        if room and len(rows):
            self._by_room.setdefault(room, []).append(rows)
            self._rooms |= 1 << room


def cut_into_segments(
    ends: NDArray[np.integer], row_size: int, *, keep_tails: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The segments that the documents of a stream are packed as.

    Args:
        ends: (documents,) where each document ends; the first begins at 0.
        row_size: tokens of a row.
        keep_tails: whether a document longer than a row goes on in further segments; else its
            first `row_size` tokens are all that is taken.

    Returns:
        starts and lengths, (segments,) int64 each, in the order of the stream.
    """
    ends = ends.astype(np.int64)
    first = np.concatenate(([0], ends[:-1])).astype(np.int64)
    lengths = ends - first
    if not keep_tails:
        return first, np.minimum(lengths, row_size)
    pieces = -(-lengths // row_size)
    # Which piece of its document each segment is: 0, 1, ..., 0, 1, ...
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(first, pieces) + number * row_size
    return starts, np.minimum(np.repeat(ends, pieces) - starts, row_size)
