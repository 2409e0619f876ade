"""The last linear layer and the loss behind it, for a part of the positions at a time.

The logits (N, V) of a micro-batch are the largest tensors of a step: at 50k tokens of vocabulary
they, their probabilities and their gradient hold more than all other activations together. Here
they exist for one chunk of positions only. Its gradient is computed at once, so that nothing has
to be computed twice: three matrix products for a chunk, as many as without chunks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_training.losses import IGNORE_INDEX, likeliest_tokens, slope_of_logits
from llm_training.vocab_padding import PaddedHead, num_tokens_of
from llm_training.zero_init import whole_models

# Logits of one chunk in float32. Smaller chunks add to the weight's gradient more often, which
# takes time; larger ones take memory (benchmarks/results/loss_head_cpu.md). A GPU multiplies so
# much faster than it adds that its chunks are larger: by reckoning, not by measurement.
CPU_CHUNK_BYTES = 64 * 2**20
GPU_CHUNK_BYTES = 1024 * 2**20
# Rows of the weight's gradient that are computed at a time where they are of 16 bits.
PRODUCT_ROWS = 2048
# Chunks in a micro-batch from which on the memory they save is worth their code path.
WORTHWHILE_CHUNKS = 4


def is_worth_chunking(num_positions: int, vocab_size: int, device_type: str) -> bool:
    """Whether the logits of a micro-batch of `num_positions` would take much memory."""
    return num_positions > WORTHWHILE_CHUNKS * positions_per_chunk(vocab_size, device_type)


def positions_per_chunk(vocab_size: int, device_type: str) -> int:
    """How many positions have their logits computed together."""
    chunk_bytes = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocab_size))


class ChunkedHead(PaddedHead):
    """The last layer of a language model, in the place of another one, with its very parameters.

    It gives logits as that one did, or, where it is told the next tokens, their loss. The model's
    own forward pass runs in both cases, and with it the hooks by which backends gather weights.
    """

    def __init__(self, head: nn.Linear, num_tokens: int, *, label_smoothing: float = 0.0):
        super().__init__(head, num_tokens)
        self.label_smoothing = label_smoothing
        self._next_tokens: Tensor | None = None
        self._is_per_row = self._wants_guesses = False
        self._guesses: Tensor | None = None

    @classmethod
    def take_place(cls, model: PreTrainedModel, *, label_smoothing: float = 0.0) -> ChunkedHead:
        """Puts one where `model` has its head; `why_not_chunked` must have no objection."""
        old, num_tokens = model.get_output_embeddings(), num_tokens_of(model)
        head = cls(old, num_tokens, label_smoothing=label_smoothing)
        model.set_output_embeddings(head)
        return head

    @contextmanager
    def judging(
        self, next_tokens: Tensor, *, per_row: bool = False, with_guesses: bool = False
    ) -> Iterator[None]:
        """Inside, the next call returns the loss of `next_tokens` (B, T), not logits.

        Args:
            per_row: whether it is the loss of each row, which has no gradient.
            with_guesses: whether `take_guesses` will be asked, beside the loss of each row.
        """
        self._next_tokens = next_tokens
        self._is_per_row, self._wants_guesses = per_row, with_guesses
        try:
            yield
            assert self._next_tokens is None, "the model did not call its head"
        finally:
            self._next_tokens = None

    def take_guesses(self) -> Tensor | None:
        """The likeliest tokens (B, T) int64 of the last judged call, where they were asked for."""
        guesses, self._guesses = self._guesses, None
        return guesses

    @torch.compiler.disable  # chunks differ in length, and their products are all there is to do
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of `hidden` (..., H); or the summed loss: float32, a scalar or (B,)."""
        next_tokens, self._next_tokens = self._next_tokens, None
        if next_tokens is None:
            return super().forward(hidden)
        inputs = (hidden.flatten(0, -2), self.weight, self.bias)
        chunk_size = positions_per_chunk(self.out_features, hidden.device.type)
        if not self._is_per_row:
            return linear_token_loss_sum(
                *inputs,
                next_tokens.flatten(),
                chunk_size,
                num_tokens=self.num_tokens,
                label_smoothing=self.label_smoothing,
            )
        losses, self._guesses = linear_row_losses(
            *inputs,
            next_tokens,
            chunk_size,
            num_tokens=self.num_tokens,
            with_guesses=self._wants_guesses,
        )
        return losses


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Why the loss of `model` cannot be computed within its head; None where it can.

    Some models scale or bend what their head returns, and a loss from there would be another one.
    So a twin without weights or arithmetic runs: its logits must be what its head returned.
    """
    kind = model.config.model_type
    if type(model.get_output_embeddings()) not in (nn.Linear, PaddedHead):
        return f"the head of {kind} is no plain linear layer"
    config = copy.deepcopy(model.config)
    plainly = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    returned: list[Tensor] = []
    try:
        with torch.device("meta"), whole_models(), torch.no_grad():
            twin = type(model)._from_config(config, **plainly)
            head = twin.get_output_embeddings()
            head.register_forward_hook(lambda _, __, output: returned.append(output))
            ids = torch.zeros((1, 2), dtype=torch.int64)
            # With a mask; without one, some models look into the positions for several documents.
            logits = twin(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception as error:  # models fail in many ways where there is nothing to compute with
        reason = str(error).partition("\n")[0]
        return f"{kind} cannot be tried without its weights ({type(error).__name__}: {reason})"
    is_untouched = len(returned) == 1 and logits is returned[0] and logits._version == 0
    if is_untouched and logits.shape == (1, 2, head.out_features):
        return None
    return f"{kind} changes what its head returns before it is judged"


def linear_token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    next_tokens: Tensor,
    chunk_size: int,
    *,
    num_tokens: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`token_loss_sum` of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    The products are computed in autocast's type, where it is on, and in `hidden`'s elsewhere; loss
    and probabilities in float32; the gradients of weight and bias are summed over the chunks in
    float32. Positions that predict nothing cost nothing. Its gradient has no gradient.

    Args:
        hidden: (N, H) in any floating type.
        weight: (V, H).
        bias: (V,) or None.
        next_tokens: (N,) int64, `IGNORE_INDEX` where nothing is predicted.
        chunk_size: positions that are computed together.
        num_tokens: rows of the weight from there on stand for no token and are never predicted.
        label_smoothing: as in `token_loss_sum`; it shapes the gradient alone.

    Returns:
        The loss in nats, a scalar float32 tensor, 0 where nothing is predicted.
    """
    num_tokens = weight.shape[0] if num_tokens is None else num_tokens
    is_training = torch.is_grad_enabled()
    how = (chunk_size, num_tokens, label_smoothing, _product_type(hidden), is_training)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearTokenLoss.apply(hidden, weight, bias, next_tokens, *how)
    return loss


@torch.no_grad()
def linear_row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    next_tokens: Tensor,
    chunk_size: int,
    *,
    num_tokens: int | None = None,
    with_guesses: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`row_losses` of logits that never exist as a whole, as in `linear_token_loss_sum`.

    It is for evaluation and has no gradient.

    Args:
        hidden: (B * T, H) in any floating type.
        weight: (V, H).
        bias: (V,) or None.
        next_tokens: (B, T) int64, `IGNORE_INDEX` where nothing is predicted.
        chunk_size: positions that are computed together.
        num_tokens: rows of the weight from there on stand for no token and are never predicted.
        with_guesses: whether the likeliest tokens are looked for.

    Returns:
        The loss of each row in nats, (B,) float32; and the likeliest token of each position, (B, T)
        int64 and anything where nothing is predicted, or None.
    """
    num_tokens = weight.shape[0] if num_tokens is None else num_tokens
    targets = next_tokens.flatten()
    losses = hidden.new_zeros(targets.shape, dtype=torch.float32)
    guesses = torch.zeros_like(targets) if with_guesses else None
    dtype = _product_type(hidden)
    matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for places in _places(targets, chunk_size):
            logits = F.linear(hidden[places].to(dtype), matrix, offset)
            logits[:, num_tokens:] = -math.inf
            if guesses is not None:
                guesses[places] = likeliest_tokens(logits)
            values = logits.log_softmax(-1, dtype=torch.float32)
            del logits
            wanted = values.gather(1, targets[places, None].clamp(min=0))[:, 0]
            losses[places] = -wanted.where(targets[places] != IGNORE_INDEX, 0.0)
            del values
    return losses.view(next_tokens.shape).sum(1), None if guesses is None else guesses.view(
        next_tokens.shape
    )


def _product_type(hidden: Tensor) -> torch.dtype:
    """What the products with `hidden` are computed in: autocast's type where it is on."""
    device = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast else hidden.dtype


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        next_tokens: Tensor,
        chunk_size: int,
        num_tokens: int,
        label_smoothing: float,
        dtype: torch.dtype,
        is_training: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (
            is_training and needed for needed in ctx.needs_input_grad[:3]
        )
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = _zeros_for_sum(weight) if needs_weight else None
        grad_bias = _zeros_for_sum(bias) if needs_bias and bias is not None else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        for places in _places(next_tokens, chunk_size):
            targets = next_tokens[places, None]
            is_judged = targets != IGNORE_INDEX
            targets = targets.clamp(min=0)
            inputs = hidden[places].to(dtype)
            logits = F.linear(inputs, matrix, offset)
            logits[:, num_tokens:] = -math.inf
            values = logits.log_softmax(-1, dtype=torch.float32)
            del logits  # each is given back as soon as it can be: only a chunk's memory counts
            loss -= (values.gather(1, targets) * is_judged).sum()
            if needs_hidden or needs_weight or needs_bias:
                slope = slope_of_logits(
                    values.exp_(), targets, label_smoothing=label_smoothing, num_tokens=num_tokens
                )
                del values
                if grad_bias is not None:
                    grad_bias += (is_judged.T.to(slope.dtype) @ slope)[0]
                slope = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[places] = (slope @ matrix).to(hidden.dtype) * is_judged
                if grad_weight is not None:
                    _add_product(grad_weight, slope.T, inputs * is_judged)
                del slope
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # In place, since they are as large as the weight: torch refuses a second backward pass.
        for gradient in ctx.saved_tensors:
            if gradient is not None:
                gradient.mul_(grad_loss)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


def _places(next_tokens: Tensor, chunk_size: int) -> Iterable[Tensor | slice]:
    """The positions whose logits are computed together: on a CPU of those with a target alone.

    How many these are a GPU would have to be asked, and the host would wait for all that it still
    has to do; there the logits of all positions are computed, and those without a target count
    nothing.
    """
    if next_tokens.device.type == "cpu":
        return (next_tokens != IGNORE_INDEX).nonzero()[:, 0].split(chunk_size)
    return _slices(len(next_tokens), chunk_size)


def _slices(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, length, chunk_size)]


def _zeros_for_sum(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the matrix product to `total`, which may be of a wider type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    # The product of all rows would be as large as the weight.
    for rows, part in zip(total.split(PRODUCT_ROWS), left.split(PRODUCT_ROWS), strict=True):
        rows += part @ right
