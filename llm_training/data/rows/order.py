"""The order of training rows: a pure function of (seed, epoch, index), found in O(1).

No permutation is stored: a keyed bijection of the row numbers is computed for the rows asked for,
so seeking costs the same in row ten as in row ten billion, and the world size is no part of it.

Source: Feistel network with cycle walking, Black & Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"; the mixing function is the finalizer of SplitMix64, Steele et al. 2014.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
# Below this the network is too small to mix; larger domains only walk a little further.
MIN_HALF_BITS = 3


def sample_rows(positions: NDArray[np.int64], num_rows: int, seed: int) -> NDArray[np.int64]:
    """The rows that stand at these positions of the endless training order.

    Args:
        positions: (N,) int64, samples counted from the start of the run; one epoch is `num_rows`.
        num_rows: rows in the data.
        seed: another seed is another order.

    Returns:
        (N,) int64, each in [0, num_rows); every epoch holds every row exactly once.
    """
    epochs, indices = np.divmod(positions, num_rows)
    keys = _mix(_mix(np.full(len(positions), seed, np.uint64)) + epochs.astype(np.uint64))
    half_bits = max(MIN_HALF_BITS, -(-(num_rows - 1).bit_length() // 2))
    rows = _feistel(indices.astype(np.uint64), keys, half_bits)
    while (outside := rows >= num_rows).any():
        rows[outside] = _feistel(rows[outside], keys[outside], half_bits)
    return rows.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int
) -> NDArray[np.uint64]:
    """A keyed bijection of [0, 4 ** half_bits)."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_number in range(ROUNDS):
        mixed = _mix(keys + np.uint64(round_number)) ^ right
        left, right = right, left ^ (_mix(mixed) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 on each value; unsigned arithmetic wraps around as it should."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
