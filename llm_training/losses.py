"""Token losses as sums and counts, so that every token weighs the same wherever it is computed."""

from __future__ import annotations

from typing import Any

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


def token_loss_sum(
    logits: Tensor,
    next_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    num_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed over the predicted tokens.

    Smoothed labels shape its gradient alone: the number stays that of the true tokens, and means
    the same in every run.

    Args:
        logits: (B, T, V) in any floating type; the loss is computed in float32.
        next_tokens: (B, T) int64, labels that `shift_labels` has shifted.
        label_smoothing: share of each target that is spread evenly over the vocabulary, 0 to 1.
        num_tokens: logits from there on stand for no token and get none of it; None: all do.

    Returns:
        A scalar float32 tensor; 0 where nothing is predicted.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"
    (arXiv:1512.00567), section 7.
    """
    flat, targets = logits.float().flatten(0, 1), next_tokens.flatten()
    if not label_smoothing:
        return F.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    num_tokens = flat.shape[1] if num_tokens is None else num_tokens
    loss: Tensor = _SmoothedLoss.apply(flat, targets, label_smoothing, num_tokens)
    return loss


class _SmoothedLoss(torch.autograd.Function):
    """The value of plain labels and the gradient of smoothed ones, from one softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float, num_tokens: int
    ) -> Tensor:
        log_probabilities = F.log_softmax(logits, -1)
        ctx.save_for_backward(log_probabilities, targets)
        ctx.label_smoothing, ctx.num_tokens = label_smoothing, num_tokens
        # To the bit what `cross_entropy` returns, which does these two steps.
        return F.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        log_probabilities, targets = ctx.saved_tensors
        slope = slope_of_logits(
            log_probabilities.exp(),
            targets.clamp(min=0)[:, None],
            label_smoothing=ctx.label_smoothing,
            num_tokens=ctx.num_tokens,
        )
        return slope.mul_((targets != IGNORE_INDEX)[:, None] * grad_loss), None, None, None


def slope_of_logits(
    probabilities: Tensor, targets: Tensor, *, label_smoothing: float, num_tokens: int
) -> Tensor:
    """The gradient of the loss by the logits: probabilities less what should be, in their place.

    Args:
        probabilities: (N, V), which are overwritten.
        targets: (N, 1) int64, from 0 on.
        label_smoothing: share of each target that is spread over the first `num_tokens` logits.

    Returns:
        (N, V); exactly 0 where no token stands and the probability is 0.
    """
    known = probabilities.gather(1, targets)
    slope = probabilities.scatter_(1, targets, known - (1 - label_smoothing))
    if label_smoothing:
        slope[:, :num_tokens] -= label_smoothing / num_tokens
    return slope


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
