"""Token losses as sums and counts, so that every token weighs the same wherever it is computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def shift_labels(labels: Tensor) -> Tensor:
    """The token that each position predicts; the last position of a row predicts nothing.

    Shifting the labels and not the logits saves a copy of the largest tensor of the step.

    Args:
        labels: (B, T) int64, unshifted, `IGNORE_INDEX` where nothing is to be predicted.

    Returns:
        (B, T) int64.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def count_predicted_tokens(labels: Tensor) -> Tensor:
    """Number of tokens that unshifted `labels` (B, T) ask for: a scalar int64 tensor."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def token_loss_sum(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the predicted tokens.

    Args:
        logits: (B, T, V) in any floating type; the loss is computed in float32.
        next_tokens: (B, T) int64, labels that `shift_labels` has shifted.

    Returns:
        A scalar float32 tensor; 0 where nothing is predicted.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        next_tokens.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def count_correct_tokens(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Number of predicted tokens whose likeliest guess is right: a scalar int64 tensor.

    Args:
        logits: (B, T, V).
        next_tokens: (B, T) int64, labels that `shift_labels` has shifted.
    """
    return (logits.argmax(-1) == next_tokens).sum()
