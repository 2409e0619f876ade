"""Several sources mixed by weight: which source stands at which position, found in O(1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llm_training.data.errors import DataError
from llm_training.data.rows.order import sample_rows
from llm_training.data.rows.row_account import RowAccount
from llm_training.data.rows.store_rows import NO_ROW, Batch, Rows

# A weight is met within this share of itself.
WEIGHT_TOLERANCE = 0.005
_SMALL_BLOCK = 2**12
_LARGEST_BLOCK = 2**20
# The sources' own orders must not resemble each other, nor that of the mixture.
_SEED_STEP = 0x9E3779B97F4A7C15


class MixtureRows:
    """The rows of several sources, in proportion to their weights at every length of the run.

    The positions fall into blocks; in each block, every source has exactly its share, at places
    that the seed shuffles. So the position in each source follows from the position in the run,
    and there is no state beside that.

    Args:
        sources: the rows of each source, by its name; all of one block size.
        weights: how much of the training comes from each; only their ratios count.

    Raises:
        DataError: weights that are negative, or sum to nothing.
    """

    def __init__(self, sources: Mapping[str, Rows], weights: Mapping[str, float]):
        self.names = list(sources)
        self.sources = list(sources.values())
        self.block_size = self.sources[0].block_size
        self.document_mask = self.sources[0].document_mask
        self.num_rows = sum(rows.num_rows for rows in self.sources)
        self._shares = np.array(block_shares([weights[name] for name in self.names]), np.int64)
        self._borders = np.cumsum(self._shares)
        self.marks = [
            f"{name}:{share}" + "".join(f"+{mark}" for mark in rows.marks)
            for name, rows, share in zip(self.names, self.sources, self._shares, strict=True)
        ]
        self._offsets = np.cumsum([0, *(rows.num_rows for rows in self.sources)])
        for name, rows, share in zip(self.names, self.sources, self._shares, strict=True):
            if share and rows.num_rows == 0:
                raise DataError(
                    f"train_mixture: source {name!r} has not one row of {self.block_size} tokens."
                    " Give it more text, a weight of 0, or a smaller --block_size."
                )

    def at(self, positions: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Row numbers; source k's begin after those of all sources before it."""
        which, index = self._locate(positions, seed)
        rows = np.empty(len(positions), np.int64)
        for k, source in enumerate(self.sources):
            mine = which == k
            if mine.any():
                own_seed = (seed + (k + 2) * _SEED_STEP) % 2**64
                rows[mine] = source.at(index[mine], own_seed) + self._offsets[k]
        return rows

    def _locate(
        self, positions: NDArray[np.int64], seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position the source, and how often it stood before (in about that order)."""
        block = int(self._borders[-1])
        slots = sample_rows(positions, block, (seed + _SEED_STEP) % 2**64)
        which = np.searchsorted(self._borders, slots, "right")
        share = self._shares[which]
        return which, positions // block * share + slots - (self._borders[which] - share)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        which = self.source_of(rows)
        which[rows == NO_ROW] = next(k for k, share in enumerate(self._shares) if share)
        whole: Batch = {}
        for k in np.unique(which).tolist():
            mine = which == k
            own = np.where(rows[mine] == NO_ROW, NO_ROW, rows[mine] - self._offsets[k])
            for name, part in self.sources[k].batch(own).items():
                out = whole.setdefault(
                    name, torch.empty((len(rows), self.block_size), dtype=part.dtype)
                )
                out[torch.from_numpy(mine)] = part
        return whole

    def source_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the source, as in `names`, that each of these rows is of: both (N,)."""
        return np.searchsorted(self._offsets, rows, "right") - 1

    def documents(self, row: int) -> list[int]:
        k = int(np.searchsorted(self._offsets, row, "right")) - 1
        return self.sources[k].documents(row - int(self._offsets[k]))

    def accounts(self) -> dict[str, RowAccount]:
        return {
            name: account
            for name, rows in zip(self.names, self.sources, strict=True)
            for account in rows.accounts().values()
        }

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source is gone through in the first `num_samples` of a run."""
        share = self._shares / self._borders[-1]
        return {
            name: float(num_samples * part / max(1, rows.num_rows))
            for name, rows, part in zip(self.names, self.sources, share, strict=True)
        }

    def describe(self, num_samples: int) -> list[str]:
        """Each source's share of a run, and how often it is gone through."""
        share = self._shares / self._borders[-1]
        epochs = self.epochs(num_samples)
        return [
            f"{name} {part:.1%} = {epochs[name]:.2f} epochs"
            for name, part in zip(self.names, share, strict=True)
        ]


def block_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers whose ratios are those of the weights, within the tolerance.

    Raises:
        DataError: weights that are negative, not finite, or sum to nothing.
    """
    total = sum(weights)
    if not np.isfinite(total) or total <= 0 or min(weights) < 0:
        raise DataError(
            f"train_mixture: the weights {', '.join(f'{w:g}' for w in weights)} make no mixture."
            " Give each source a weight of 0 or more, and at least one of them more than 0."
        )
    wanted = np.array(weights, np.float64) / total
    positive = wanted > 0
    # Beyond small blocks, those that the smallest weight has a whole share of.
    smallest = wanted[positive].min()
    large = [round(share / smallest) for share in range(1, 1001)]
    for block in [
        *range(1, _SMALL_BLOCK),
        *(b for b in large if _SMALL_BLOCK <= b <= _LARGEST_BLOCK),
    ]:
        shares = np.rint(wanted * block)
        if shares.sum() != block or (shares[positive] == 0).any():
            continue
        if (abs(shares[positive] / block / wanted[positive] - 1) <= WEIGHT_TOLERANCE).all():
            return [int(share) for share in shares]
    raise DataError(
        f"train_mixture: the smallest weight, {min(w for w in weights if w):g} of {total:g}, is too"
        f" small to be met within {_LARGEST_BLOCK:,} rows. Leave that source out or raise it."
    )
