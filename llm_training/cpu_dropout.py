"""Dropout on a CPU, several times as fast as torch's: masks of 15 random bits, used as bits.

torch draws one random number for each element there, and with dropout `sdpa` leaves its fast kernel
for one that computes in float32. Here every random number decides on four elements, masks are
applied to the bits of a number, and attention is computed for some rows at a time. Random numbers
come from torch's generator as before, so seeds, checkpoints and replays hold without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

LEVELS = 2**15  # probabilities are rounded to this fraction, the scale with them
SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of queries at a time. Fewer skip more of what lies above the diagonal, and cost more calls.
ROWS_AT_ONCE = 64

MARK = "has_cpu_dropout"  # on the modules of a model, for `attention`


def speed_up_dropout(model: PreTrainedModel) -> int:
    """Lets `model` draw its dropout masks as this module does, where it runs on a CPU.

    The function is the same, with other masks of the same distribution. The configuration and the
    names of weights stay as they are, and so does what is saved.

    Returns:
        How many modules have dropout that is drawn this way.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and child.p > 0:
                setattr(module, name, CpuDropout(child.p).train(child.training))
                count += 1
    if model.config._attn_implementation == "sdpa":
        # Under its own name: a new one would be saved with the configuration.
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
        for module in model.modules():
            setattr(module, MARK, True)
            rate = getattr(module, "attention_dropout", None)  # of llama and the like
            count += isinstance(rate, float) and rate > 0
    return count


def draw_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Which elements are kept, from torch's generator, whatever the number of threads.

    Args:
        shape: of the mask.
        p: the probability that an element is dropped, above 0 and below 1.

    Returns:
        int16 of `shape`, all bits set where an element is kept and none where it is dropped; and
        the factor that keeps the expectation, from the probability as it was rounded.
    """
    num_kept_levels = min(max(round((1 - p) * LEVELS), 1), LEVELS - 1)
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    levels = words.view(torch.int16)[:count].bitwise_and_(LEVELS - 1)
    # Negative below the border; the sign then fills all 16 bits.
    mask = levels.sub_(num_kept_levels).bitwise_right_shift_(15)
    return mask.view(shape), LEVELS / num_kept_levels


def clear_dropped_(numbers: Tensor, mask: Tensor) -> Tensor:
    """Sets `numbers` to zero, in place, where `mask` of `draw_mask` has no bits."""
    integer = SAME_SIZE_INTEGER[numbers.element_size()]
    numbers.view(integer).bitwise_and_(mask.to(integer))
    return numbers


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with masks of `draw_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        mask, scale = draw_mask(input.shape, self.p)
        dropped: Tensor = _Dropout.apply(input, mask, scale)
        return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return clear_dropped_(numbers * scale, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return clear_dropped_(grad * ctx.scale, mask), None, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The `sdpa` attention of transformers, which it leaves all to but dropout on a CPU.

    Args:
        module: the attention module that calls.
        query: (B, heads, T, head size).
        key, value: (B, heads or a divisor of it, S, head size).
        attention_mask: None, or broadcast to (B, heads, T, S): bool, True where a key is seen, or
            of numbers that are added to the scores.
        dropout: probability that a weight of attention is dropped.
        scaling: of the scores; None: 1 / sqrt(head size).
        is_causal: None: as `module.is_causal` says. Counts without a mask only.

    Returns:
        (B, T, heads, head size), and None for the weights.
    """
    if not _is_ours(module, query, key, attention_mask, dropout, kwargs):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if torch.is_autocast_enabled("cpu"):  # which does not look into functions of our own
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None:
        hides_future = getattr(module, "is_causal", True) if is_causal is None else is_causal
    else:
        is_square = attention_mask.shape[-1] == attention_mask.shape[-2]
        is_bool = attention_mask.dtype == torch.bool
        hides_future = is_bool and is_square and not attention_mask.triu(1).any()
        attention_mask = attention_mask.expand(batch, heads, length, key.shape[2])
    out = _Attention.apply(
        query.reshape(batch * heads, length, size),
        repeat_kv(key, groups).flatten(0, 1),
        repeat_kv(value, groups).flatten(0, 1),
        attention_mask,
        dropout,
        size**-0.5 if scaling is None else scaling,
        hides_future,
    )
    return out.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), None


def _is_ours(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> bool:
    """Whether it is dropout on a CPU, of a model that was sped up, and nothing unusual."""
    if not (0 < dropout < 1 and query.device.type == "cpu" and getattr(module, MARK, False)):
        return False
    if any(options.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        return False
    if attention_mask is None:
        return query.shape[2] == key.shape[2]
    return not attention_mask.requires_grad


class _Attention(torch.autograd.Function):
    """Attention with dropout for `ROWS_AT_ONCE` queries at a time; N = batch x heads.

    As in the eager form the scores are rounded to the dtype of the queries; sums within matrix
    products and softmax are float32.

    Source: Vaswani et al. 2017, "Attention is all you need" (arXiv:1706.03762), section 3.2.1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (N, T, D)
        key: Tensor,  # (N, S, D)
        value: Tensor,  # (N, S, D)
        attention_mask: Tensor | None,  # (B, heads, T, S)
        dropout: float,
        scaling: float,
        hides_future: bool,  # no query sees a later key: those are left out
    ) -> Tensor:
        out = torch.empty(*query.shape[:2], value.shape[2], dtype=query.dtype)
        saved = []
        for start in range(0, query.shape[1], ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, query.shape[1]))
            seen = slice(0, rows.stop if hides_future else key.shape[1])
            scores = _product(query[:, rows], key[:, seen].mT, scaling)
            if attention_mask is not None:
                weights = _masked_softmax(scores, attention_mask[:, :, rows, seen])
            else:
                if hides_future:
                    size = rows.stop - start
                    future = torch.full((size, size), -torch.inf, dtype=scores.dtype).triu_(1)
                    scores[:, :, start:].add_(future)
                weights = torch.softmax(scores, dim=-1)
            kept, scale = draw_mask(weights.shape, dropout)
            dropped = clear_dropped_(weights.clone(), kept)
            out[:, rows] = _product(dropped, value[:, seen], scale)
            saved += [weights, kept]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.scaling, ctx.scale = scaling, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        # Sums over blocks of rows, so with more digits than each of them.
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_key, grad_value = (
            torch.zeros_like(key, dtype=wide),
            torch.zeros_like(value, dtype=wide),
        )
        for block, (weights, kept) in enumerate(zip(saved[::2], saved[1::2], strict=True)):
            rows = slice(block * ROWS_AT_ONCE, block * ROWS_AT_ONCE + weights.shape[1])
            seen = slice(0, weights.shape[2])
            grad = grad_out[:, rows]
            dropped = clear_dropped_(weights.clone(), kept)
            grad_value[:, seen] += _product(dropped.mT, grad, ctx.scale)
            grad_weights = clear_dropped_(_product(grad, value[:, seen].mT, ctx.scale), kept)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, rows] = _product(grad_scores, key[:, seen], ctx.scaling)
            grad_key[:, seen] += _product(grad_scores.mT, query[:, rows], ctx.scaling)
        nothing = (None,) * 4
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), *nothing


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Matrix products times `factor`, rounded once."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The weights, (N, rows, S), under a mask (B, heads, rows, S); overwrites `scores`."""
    by_head = scores.view(mask.shape)
    if mask.dtype != torch.bool:
        by_head.add_(mask)
    else:
        by_head.masked_fill_(~mask, -torch.inf)
    # Zeros, as `sdpa` has them, where a query sees nothing.
    return torch._safe_softmax(scores, dim=-1)
