"""Token losses as sums and counts, so that every token weighs the same wherever it is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
# Tokens of which the likeliest is looked for together: few enough to be quick, in few blocks.
BLOCK_TOKENS = 256


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


def row_losses(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the predicted tokens of each row.

    Args:
        logits: (B, T, V) in any floating type; the loss is computed in float32.
        next_tokens: (B, T) int64, labels that `shift_labels` has shifted.

    Returns:
        (B,) float32; 0 where a row predicts nothing.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        next_tokens.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return losses.view(next_tokens.shape).sum(1)


def likeliest_tokens(logits: Tensor) -> Tensor:
    """The likeliest token at each position, the first of equals: (...) int64 for logits (..., V).

    CPUs find a maximum many times as fast as its place. So the place is looked for only where the
    maximum is: within one block of the vocabulary.
    """
    vocab_size = logits.shape[-1]
    if logits.device.type != "cpu" or vocab_size <= BLOCK_TOKENS:
        return logits.argmax(-1)
    flat = logits.flatten(0, -2)
    num_whole = vocab_size // BLOCK_TOKENS * BLOCK_TOKENS
    maxima = flat[:, :num_whole].unflatten(1, (-1, BLOCK_TOKENS)).amax(-1)
    if num_whole < vocab_size:
        maxima = torch.cat((maxima, flat[:, num_whole:].amax(-1, keepdim=True)), dim=1)
    # The last block is filled up with tokens before it, which are less likely where it is chosen.
    starts = maxima.max(1, keepdim=True).indices * BLOCK_TOKENS
    starts = starts.clamp(max=vocab_size - BLOCK_TOKENS)
    block = flat.gather(1, starts + torch.arange(BLOCK_TOKENS))
    # `argmax` gives the same place as `max`, but takes longer on a CPU.
    return (starts[:, 0] + block.max(1).indices).view(logits.shape[:-1])
