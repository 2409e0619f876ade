"""Rows of `block_size` tokens, found by their number: what the model sees of a token store."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_training.data.rows.order import sample_rows
from llm_training.data.rows.packing import Packing, cut_into_segments, pack
from llm_training.data.rows.row_account import RowAccount
from llm_training.data.tokens.token_store import Tokens

Batch = dict[str, Tensor]
IGNORE_INDEX = -100
# Stands for "no row": a row of nothing but masked labels, which fills up the last window.
NO_ROW = -1


class Rows(Protocol):
    """Numbered rows.

    Attributes:
        num_rows: how many there are; one epoch.
        block_size: tokens in a row.
        document_mask: whether tokens see their own document alone.
        marks: what is unusual in how they are made; other marks are other rows.
    """

    num_rows: int
    block_size: int
    document_mask: bool
    marks: list[str]

    def at(self, positions: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """The numbers of the rows at these positions of the endless training order, (N,) int64."""

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The rows with these numbers, (B,) int64; `NO_ROW` gives one with nothing to predict.

        Returns:
            `input_ids` and unshifted `labels`, both (B, block_size) int64; with a document mask
            also `position_ids`, the same shape, which begin at 0 in every document.
        """

    def documents(self, row: int) -> list[int]:
        """How many tokens of each document a row holds, in its order."""

    def accounts(self) -> dict[str, RowAccount]:
        """What becomes of the tokens of each source, by its name."""


class _StoreRows(ABC):
    """What rows of one store have in common: filling a batch from runs of tokens."""

    def __init__(self, store: Tokens, block_size: int, *, document_mask: bool):
        self.store = store
        self.block_size = block_size
        self.document_mask = document_mask
        self.num_rows = 0
        self.marks = ["document_mask"] if document_mask else []

    def at(self, positions: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        return sample_rows(positions, self.num_rows, seed)

    @abstractmethod
    def runs(self, row: int) -> list[tuple[int, int]]:
        """The (first token, number of tokens) of each run of tokens that a row is made of.

        Under a document mask, no run holds tokens of two documents.
        """

    def documents(self, row: int) -> list[int]:
        return [length for _, length in self.runs(row)]

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        shape = (len(rows), self.block_size)
        input_ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        # What fills up a row counts on from 0, as if it were a document of its own.
        positions = np.tile(np.arange(self.block_size), (len(rows), 1))
        for i, row in enumerate(rows.tolist()):
            if row != NO_ROW:
                self._fill(self.runs(row), input_ids[i], labels[i], positions[i])
        arrays = {"input_ids": input_ids, "labels": labels}
        if self.document_mask:
            arrays["position_ids"] = positions
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _fill(
        self,
        runs: list[tuple[int, int]],
        input_ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        at = 0
        for start, length in runs:
            here = slice(at, at + length)
            tokens = self.store.tokens[start : start + length]
            input_ids[here] = tokens
            labels[here] = tokens
            if self.store.learned is not None:
                labels[here][self.store.learned[start : start + length] == 0] = IGNORE_INDEX
            if self.document_mask:
                positions[here] = np.arange(length)
                labels[at] = IGNORE_INDEX  # nothing that it could be told from stands before it
            at += length
        positions[at:] = np.arange(self.block_size - at)


class StreamRows(_StoreRows):
    """All documents end to end, cut every `block_size` tokens.

    Of conversations, rows in which nothing is learned are dropped.

    Args:
        store: the tokens.
        block_size: tokens in a row.
        keep_last: whether a shorter last row counts, filled up; else it is left over.
        document_mask: whether tokens see their own document alone; the store must know `ends`.
    """

    def __init__(
        self,
        store: Tokens,
        block_size: int,
        *,
        keep_last: bool = False,
        document_mask: bool = False,
    ):
        super().__init__(store, block_size, document_mask=document_mask)
        self.num_rows, self.num_leftover_tokens = divmod(store.num_tokens, block_size)
        # A single token predicts nothing, so it makes no row.
        if keep_last and self.num_leftover_tokens > 1:
            self.num_rows += 1
            self.num_leftover_tokens = 0
        # The places in the stream of the rows that count. Of text all do, which takes no memory.
        self._kept: range | NDArray[np.int64] = range(self.num_rows)
        if store.learned is not None:
            self._keep_learned(store.learned)

    def _keep_learned(self, learned: NDArray[np.uint8]) -> None:
        """Drops the rows in which nothing is predicted: they would be computed for nothing."""
        starts, firsts = self._starts(), self._firsts()
        counts = sum_runs(learned, starts, self._lengths(starts))
        np.subtract.at(counts, firsts // self.block_size, learned[firsts])
        if (counts > 0).all():
            return
        self._kept = np.flatnonzero(counts > 0)
        self.num_rows = len(self._kept)
        self.marks.append("learned")

    def _starts(self) -> NDArray[np.int64]:
        """The first token of each row that counts."""
        return np.asarray(self._kept, np.int64) * self.block_size

    def _lengths(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of the rows that begin there."""
        return np.minimum(self.block_size, self.store.num_tokens - starts)

    def _firsts(self) -> NDArray[np.int64]:
        """The tokens that nothing stands before: the first of a row or, masked, of a document."""
        starts = self._starts()
        if not self.document_mask:
            return starts
        used = self.store.num_tokens - self.num_leftover_tokens
        inner = self._ends[: np.searchsorted(self._ends, used)].astype(np.int64)
        inner = inner[inner % self.block_size != 0]
        is_kept = np.isin(inner // self.block_size, starts // self.block_size)
        return np.concatenate((starts, inner[is_kept]))

    @cached_property
    def _ends(self) -> NDArray[np.uint64]:
        assert self.store.ends is not None
        return self.store.ends

    def _span(self, row: int) -> tuple[int, int]:
        """The tokens [start, stop) of a row."""
        start = int(self._kept[row]) * self.block_size
        return start, min(start + self.block_size, self.store.num_tokens)

    def runs(self, row: int) -> list[tuple[int, int]]:
        start, stop = self._span(row)
        return self._cut_at_ends(start, stop) if self.document_mask else [(start, stop - start)]

    def documents(self, row: int) -> list[int]:
        start, stop = self._span(row)
        is_known = self.store.ends is not None
        return [n for _, n in self._cut_at_ends(start, stop)] if is_known else [stop - start]

    def _cut_at_ends(self, start: int, stop: int) -> list[tuple[int, int]]:
        first, last = np.searchsorted(self._ends, np.array([start, stop - 1], np.uint64), "right")
        borders = [start, *self._ends[first:last].tolist(), stop]
        return [(a, b - a) for a, b in pairwise(borders)]

    def accounts(self) -> dict[str, RowAccount]:
        starts, firsts = self._starts(), self._firsts()
        lengths = self._lengths(starts)
        kept = int(lengths.sum())
        account = RowAccount(
            rows=self.num_rows,
            tokens=self.store.num_tokens,
            row_starts=self.num_rows,
            document_starts=len(firsts) - self.num_rows,
            leftover=self.num_leftover_tokens,
            padding=self.num_rows * self.block_size - kept,
        )
        if self.store.learned is not None:
            learned = self.store.learned
            account.dropped = self.store.num_tokens - self.num_leftover_tokens - kept
            not_learned = kept - int(sum_runs(learned, starts, lengths).sum())
            account.not_learned = not_learned - int((learned[firsts] == 0).sum())
            if self.store.ends is not None:
                account.cut_conversations = self._count_cut(self.store.ends.astype(np.int64))
        return {"": account.balanced()}

    def _count_cut(self, ends: NDArray[np.int64]) -> int:
        """How many documents the end of a row cuts."""
        first = np.concatenate(([0], ends[:-1]))
        return int((first // self.block_size < (ends - 1) // self.block_size).sum())


class PackedRows(_StoreRows):
    """Rows of whole documents, filled up at the end.

    A document longer than a row goes on in further rows; of a conversation only the beginning is
    taken, and one that has nothing learned in it is dropped.

    Args:
        store: the tokens; it must know `ends`.
        block_size: tokens in a row.
        document_mask: whether tokens see their own document alone.
    """

    def __init__(self, store: Tokens, block_size: int, *, document_mask: bool):
        super().__init__(store, block_size, document_mask=document_mask)
        assert store.ends is not None
        is_text = store.learned is None
        starts, lengths = cut_into_segments(store.ends, block_size, keep_tails=is_text)
        self._lost = RowAccount(truncated=store.num_tokens - int(lengths.sum()))
        if store.learned is not None:
            # The first token of a document is not predicted, learned or not.
            is_kept = sum_runs(store.learned, starts + 1, lengths - 1) > 0
            self._lost.dropped = int(lengths[~is_kept].sum())
            self._lost.dropped_conversations = int((~is_kept).sum())
            tails = store.ends.astype(np.int64) - starts - lengths
            self._lost.cut_conversations = int((tails > 0).sum())
            beyond = sum_runs(store.learned, starts + lengths, tails)
            self._lost.learned_lost = int(beyond.sum())
            starts, lengths = starts[is_kept], lengths[is_kept]
        self.packing: Packing = pack(starts, lengths, block_size)
        self.num_rows = self.packing.num_rows
        self.marks.append("best_fit")

    def runs(self, row: int) -> list[tuple[int, int]]:
        return self.packing.row_segments(row)

    def accounts(self) -> dict[str, RowAccount]:
        packing = self.packing
        used = int(packing.lengths.sum())
        is_start = np.full(len(packing.starts), self.document_mask)
        is_start[packing.offsets[:-1]] = True
        account = dataclasses.replace(
            self._lost,
            rows=self.num_rows,
            tokens=self.store.num_tokens,
            row_starts=self.num_rows,
            document_starts=int(is_start.sum()) - self.num_rows,
            padding=self.num_rows * self.block_size - used,
        )
        if self.store.learned is not None:
            learned = self.store.learned
            not_learned = used - int(sum_runs(learned, packing.starts, packing.lengths).sum())
            account.not_learned = not_learned - int((learned[packing.starts[is_start]] == 0).sum())
        return {"": account.balanced()}


def sum_runs(
    values: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The sum of each run of values: (N,) int64 for N starts and lengths; an empty run gives 0."""
    sums = np.zeros(len(starts), np.int64)
    filled = np.flatnonzero(lengths > 0)
    filled = filled[np.argsort(starts[filled], kind="stable")]
    if len(filled) == 0:
        return sums
    borders = np.stack((starts[filled], starts[filled] + lengths[filled]), axis=1).ravel()
    # The last border may be the end of the values, which reduceat takes for no index.
    borders = borders[:-1] if borders[-1] == len(values) else borders
    sums[filled] = np.add.reduceat(values, borders, dtype=np.int64)[::2]
    return sums
