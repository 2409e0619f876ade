"""How sure a mean loss is: standard errors of sums over groups of neighbouring rows.

The tokens of a row, and of neighbouring rows, may be of one document and are no independent
observations. Groups of them nearly are, so errors are reckoned from the groups' sums.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def ratio_and_error(losses: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The mean of a loss over all tokens of some groups, and its standard error.

    Groups are of unequal size, so the mean is a ratio of two sums that both vary. Groups without a
    token say nothing and are passed over.

    Args:
        losses: (G,) the loss of each group summed over its tokens, in nats.
        counts: (G,) how many tokens each group has.

    Returns:
        Nats per token, 0 where there is no token; and its standard error, NaN where fewer than
        two groups have tokens.

    Source: W. G. Cochran, Sampling Techniques, 3rd edition, 1977, equation 6.12, the error of a
        ratio estimate, from a population without end.
    """
    is_counted = counts > 0
    losses, counts = losses[is_counted], counts[is_counted]
    num_groups, num_tokens = len(counts), int(counts.sum())
    if num_tokens == 0:
        return 0.0, math.nan
    mean = float(losses.sum()) / num_tokens
    if num_groups < 2:
        return mean, math.nan
    residuals = losses - mean * counts
    variance = num_groups / (num_groups - 1) * float(residuals @ residuals)
    return mean, math.sqrt(variance) / num_tokens


def paired_difference(
    now: NDArray[np.float64], before: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[float, float]:
    """By how much a loss differs between two evaluations of the same groups, and how surely.

    What makes a text hard is in both and drops out: the error is smaller than that of each.

    Args:
        now: (G,) the loss of each group summed over its tokens, in nats.
        before: (G,) the same of the other evaluation.
        counts: (G,) how many tokens each group has, in both.

    Returns:
        `now` minus `before` in nats per token, and its standard error as in `ratio_and_error`.
    """
    return ratio_and_error(now - before, counts)
