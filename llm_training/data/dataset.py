"""Rows of `block_size` tokens, taken by position: no loader, no worker, no state to save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_training.data.errors import DataError
from llm_training.data.order import sample_rows
from llm_training.data.token_store import TokenStore

Batch = dict[str, Tensor]
IGNORE_INDEX = -100
# Stands for "no row": a row of nothing but masked labels, which fills up the last window.
NO_ROW = -1


class TokenRows:
    """A flat stream of tokens seen as rows.

    Args:
        tokens: (num_tokens,) unsigned integers, usually a memory map.
        block_size: tokens in a row.
        keep_last: whether a shorter last row counts, its rest masked; else it is left over.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger], block_size: int, *, keep_last: bool):
        self.tokens = tokens
        self.block_size = block_size
        self.num_rows = len(tokens) // block_size
        self.num_leftover_tokens = len(tokens) % block_size
        # A single token predicts nothing, so it makes no row.
        if keep_last and self.num_leftover_tokens > 1:
            self.num_rows += 1
            self.num_leftover_tokens = 0

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The rows with these numbers.

        Args:
            rows: (B,) int64 row numbers; `NO_ROW` gives a row without a single predicted token.

        Returns:
            `input_ids` and unshifted `labels`, both (B, block_size) int64.
        """
        input_ids = np.zeros((len(rows), self.block_size), np.int64)
        labels = np.full((len(rows), self.block_size), IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            if row == NO_ROW:
                continue
            tokens = self.tokens[row * self.block_size : (row + 1) * self.block_size]
            input_ids[i, : len(tokens)] = tokens
            labels[i, : len(tokens)] = tokens
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def validation_rows(store: TokenStore | None, block_size: int) -> TokenRows | None:
    """All validation tokens as rows, the last and shorter one included; None where there are none.

    Raises:
        DataError: not even one row.
    """
    if store is None:
        return None
    if store.num_tokens < block_size:
        raise DataError(
            f"The validation data has {store.num_tokens} tokens, less than one row of {block_size}."
            " Give more (--validation_file, --validation_split_percentage), a smaller --block_size,"
            " or --eval_steps null to train without."
        )
    return TokenRows(store.tokens, block_size, keep_last=True)


@dataclass(frozen=True)
class TrainingWindows:
    """The micro-batches of one rank for the step that begins at a given position.

    The samples of a step do not depend on how it is split: rank `rank`'s micro-batch g holds the
    positions from `position + (g * num_ranks + rank) * micro_batch_size`.

    Args:
        rows: the training rows.
        seed: of the order.
        num_samples: where the run ends, in samples; later positions are empty rows.
        micro_batch_size: rows of one forward pass on one rank.
        num_micro_batches: forward passes of each rank in a step.
        rank: this process; num_ranks: all of them.
    """

    rows: TokenRows
    seed: int
    num_samples: int
    micro_batch_size: int
    num_micro_batches: int
    rank: int
    num_ranks: int

    def window(self, position: int) -> list[Batch]:
        """The `num_micro_batches` batches of this rank, each (micro_batch_size, block_size)."""
        return [self._micro_batch(position, g) for g in range(self.num_micro_batches)]

    def _micro_batch(self, position: int, g: int) -> Batch:
        start = position + (g * self.num_ranks + self.rank) * self.micro_batch_size
        positions = np.arange(start, start + self.micro_batch_size, dtype=np.int64)
        rows = sample_rows(positions, self.rows.num_rows, self.seed)
        rows[positions >= self.num_samples] = NO_ROW
        return self.rows.batch(rows)


def evaluation_batches(
    rows: TokenRows, batch_size: int, *, rank: int, num_ranks: int, max_rows: int | None
) -> Iterator[Batch]:
    """This rank's share of the evaluation rows; every rank gets equally many batches.

    Args:
        max_rows: rows over all ranks, taken evenly from the whole stream so that they speak for
            all of it; None: every row.

    Yields:
        Batches of `batch_size` rows; what goes beyond the rows is empty.
    """
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    for start in range(rank * batch_size, num_rows + rank * batch_size, batch_size * num_ranks):
        chosen = np.arange(start, start + batch_size, dtype=np.int64)
        yield rows.batch(np.where(chosen < num_rows, chosen * rows.num_rows // num_rows, NO_ROW))
