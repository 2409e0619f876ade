"""Dropout on a CPU: masks are random and repeat, the function and its gradients are the standard's.

What it is compared with is computed in double precision from the very masks that were drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_training import cpu_dropout
from llm_training.cpu_dropout import (
    LEVELS,
    MARK,
    CpuDropout,
    attention,
    draw_mask,
    speed_up_dropout,
)

SIGMAS = 5  # of chance: one false alarm in two million


def tiny_gpt2(**overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=96, **overrides
    )
    config.bos_token_id = config.eos_token_id = 0
    return AutoModelForCausalLM.from_config(config).train()


def tiny_llama(**overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_dropout=0.2,
        **overrides,
    )
    return AutoModelForCausalLM.from_config(config).train()


# ------------------------------------------------------------------------------------------ masks


def kept(count: int, p: float) -> Tensor:
    """float64, 1 where a mask of `count` elements keeps."""
    return -draw_mask(torch.Size([count]), p)[0].double()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_as_many_are_dropped_as_asked_and_the_expectation_is_kept(p: float) -> None:
    torch.manual_seed(0)
    mask, scale = draw_mask(torch.Size([1_000_000]), p)
    assert sorted(mask.unique().tolist()) == [-1, 0]
    share = -mask.double().mean().item()
    noise = (p * (1 - p) / 1_000_000) ** 0.5
    assert abs(share - (1 - p)) < SIGMAS * noise + 0.5 / LEVELS
    assert abs(share * scale - 1) < SIGMAS * noise * scale  # exact but for chance


def test_calls_and_places_are_independent() -> None:
    torch.manual_seed(0)
    count, p = 1_000_000, 0.3
    first, second = kept(count, p) - 0.7, kept(count, p) - 0.7
    limit = SIGMAS * count**-0.5
    correlations = [(first * second).mean() / (p * (1 - p))]
    # The four of one random number, the next ones, and those 624 words of the generator away.
    for distance in (1, 2, 3, 4, 5, 8, 64, 256, 1248, 4992):
        correlations.append((first[distance:] * first[:-distance]).mean() / (p * (1 - p)))
    assert max(abs(c.item()) for c in correlations) < limit


def test_each_place_in_a_random_number_drops_alike() -> None:
    torch.manual_seed(0)
    shares = kept(1_000_000, 0.3).view(-1, 4).mean(dim=0)
    assert (shares - 0.7).abs().max() < SIGMAS * (0.21 / 250_000) ** 0.5 + 0.5 / LEVELS


def test_a_seed_gives_its_mask_whatever_the_threads() -> None:
    masks = []
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(7)
            masks.append(draw_mask(torch.Size([3, 100_003]), 0.1)[0])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], draw_mask(torch.Size([3, 100_003]), 0.1)[0])


def test_a_saved_random_state_gives_the_same_masks_again() -> None:
    torch.manual_seed(3)
    draw_mask(torch.Size([5]), 0.1)
    state = torch.get_rng_state()
    first = draw_mask(torch.Size([1000]), 0.5)[0]
    torch.set_rng_state(state)
    assert torch.equal(first, draw_mask(torch.Size([1000]), 0.5)[0])


# ------------------------------------------------------------------------------------- CpuDropout


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """Fills with the masks and factors that are drawn from now on."""
    found = []

    def draw(shape: torch.Size, p: float) -> tuple[Tensor, float]:
        found.append(draw_mask(shape, p))
        return found[-1]

    monkeypatch.setattr(cpu_dropout, "draw_mask", draw)
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 0), (torch.float32, 2e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_kept_numbers_are_scaled_once_and_gradients_with_them(
    dtype: torch.dtype, tolerance: float, is_contiguous: bool, drawn: list
) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(37, 53, dtype=dtype)
    numbers = (numbers if is_contiguous else numbers.T[::2]).requires_grad_()
    out = CpuDropout(0.3)(numbers)
    grad_out = torch.randn(out.shape, dtype=dtype)
    (grad,) = torch.autograd.grad(out, numbers, grad_out)
    ((mask, scale),) = drawn
    assert out.dtype == grad.dtype == dtype
    for found, plain in ((out, numbers), (grad, grad_out)):
        expected = plain.detach().double() * -mask.double() * scale
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_nothing_is_drawn_where_there_is_nothing_to_draw(drawn: list) -> None:
    numbers = torch.randn(8, 8)
    assert torch.equal(CpuDropout(0.0)(numbers), numbers)
    assert torch.equal(CpuDropout(0.5).eval()(numbers), numbers)
    assert torch.equal(CpuDropout(1.0)(numbers), torch.zeros(8, 8))
    assert drawn == []
    assert CpuDropout(0.5)(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_a_probability_next_to_0_or_1_is_one_level_of_it(p: float) -> None:
    torch.manual_seed(0)
    out = CpuDropout(p)(torch.ones(1_000_000))
    assert out.mean().item() == pytest.approx(1, abs=SIGMAS * (LEVELS / 1_000_000) ** 0.5)
    assert 0 < (out == 0).sum() < 1_000_000


# -------------------------------------------------------------------------------------- attention


class Caller(nn.Module):
    """What an attention module of transformers tells of itself."""

    def __init__(self, is_causal: bool = True):
        super().__init__()
        self.is_causal = is_causal
        setattr(self, MARK, True)


def reference(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, drawn: list, scaling: float
) -> Tensor:
    """Attention in double precision with the masks in `drawn`, all rows at once."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    kept_blocks = [
        nn.functional.pad(-mask.double(), (0, key.shape[2] - mask.shape[2])) for mask, _ in drawn
    ]
    keeps = torch.cat(kept_blocks, dim=1).view(batch, heads, length, -1)
    scores = query @ key.mT * scaling + visible
    weights = scores.softmax(dim=-1) * keeps * drawn[0][1]
    return (weights @ value).transpose(1, 2)


def documents(length: int) -> Tensor:
    """(2, 1, T, T) bool: causal, and within documents that differ from row to row."""
    place = torch.arange(length)
    number = torch.stack([place // 11, place // 40])
    return ((number[:, :, None] == number[:, None, :]) & (place[:, None] >= place))[:, None]


MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "causal": lambda length: None,
    "documents": documents,
    "added": lambda length: torch.randn(1, 4, length, length),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("length", "kv_heads"), [(150, 4), (64, 2), (20, 1)])
def test_attention_is_the_standard_one(
    kind: str, length: int, kv_heads: int, dtype: torch.dtype, tolerance: float, drawn: list
) -> None:
    torch.manual_seed(0)
    heads = {"query": 4, "key": kv_heads, "value": kv_heads}
    # As models have them: (B, T, heads, size), transposed. `scaling` is no power of two.
    rounded = [torch.randn(2, length, n, 12, dtype=dtype).transpose(1, 2) for n in heads.values()]
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    rounded = [tensor.requires_grad_() for tensor in rounded]
    mask = MASKS[kind](length)
    mask = mask.to(dtype) if kind == "added" else mask
    out, weights = attention(Caller(), *rounded, mask, dropout=0.3, scaling=0.4)
    assert weights is None
    assert out.shape == (2, length, 4, 12)
    assert out.dtype == dtype
    assert len(drawn) == -(-length // cpu_dropout.ROWS_AT_ONCE)

    if kind == "added":
        visible = mask.double()
    else:
        seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        visible = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    expected = reference(*exact, visible, drawn, scaling=0.4)
    grad_out = torch.randn(out.shape, dtype=dtype)
    found = [out, *torch.autograd.grad(out, rounded, grad_out)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad_out.double())]
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = (one.double() - other).norm() / other.norm()
        assert error < tolerance, ("out", *heads)[number]


def test_without_a_mask_and_without_causality_every_key_is_seen(drawn: list) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    for caller, is_causal in ((Caller(is_causal=False), None), (Caller(), False)):
        drawn.clear()
        out, _ = attention(caller, query, key, value, None, dropout=0.5, is_causal=is_causal)
        visible = torch.zeros(70, 70, dtype=torch.float64)
        expected = reference(query, key, value, visible, drawn, scaling=8**-0.5)
        torch.testing.assert_close(out, expected)


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients() -> None:
    tensors = [torch.randn(1, 2, 4, 8).requires_grad_() for _ in range(3)]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2, :] = False
    out, _ = attention(Caller(), *tensors, mask, dropout=0.5)
    assert (out[:, 2] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


def test_autocast_reaches_attention(drawn: list) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 70, 8).requires_grad_() for _ in range(3)]
    kinds = set()
    watch = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kinds.add(tensor.dtype) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", torch.bfloat16), watch:
        out, _ = attention(Caller(), *tensors, None, dropout=0.5)
    assert out.dtype == torch.bfloat16
    assert kinds == {torch.bfloat16, torch.int16}  # weights in float32 would be twice as large
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert {grad.dtype for grad in grads} == {torch.float32}
    visible = torch.full((70, 70), -torch.inf, dtype=torch.float64).triu(1)
    exact = [tensor.double() for tensor in tensors]
    expected = reference(*exact, visible, drawn, scaling=8**-0.5)
    assert (out.double() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("change", ["dropout", "mark", "cache", "lengths"])
def test_all_else_is_left_to_transformers(change: str, drawn: list) -> None:
    caller, options, length = Caller(), {"dropout": 0.5}, 6
    if change == "dropout":
        options = {}
    elif change == "mark":
        delattr(caller, MARK)
    elif change == "cache":
        options["cache"] = "anything"
    else:
        length = 9
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, length, 8)
    out, _ = attention(caller, query, key, key, None, **options)
    assert out.shape == (1, 6, 2, 8)
    assert drawn == []


# --------------------------------------------------------------------------------- whole models


def loss_and_gradients(model: PreTrainedModel, seed: int = 1) -> list[Tensor]:
    rows = torch.randint(64, (3, 80), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    ("build", "places", "num_drawn"),
    # Embeddings, and in each block attention (two blocks of rows), its output and the MLP's.
    [(tiny_gpt2, 1 + 2 * 3, 1 + 2 * 4), (tiny_llama, 2, 2 * 2)],
)
def test_every_dropout_of_a_model_is_found(
    build: Callable, places: int, num_drawn: int, drawn: list
) -> None:
    model = build()
    assert speed_up_dropout(model) == places
    loss_and_gradients(model)
    assert len(drawn) == num_drawn


def test_a_model_without_dropout_stays(drawn: list) -> None:
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    plain = loss_and_gradients(model)
    assert speed_up_dropout(model) == 0
    assert all(map(torch.equal, loss_and_gradients(model), plain))
    assert drawn == []


def test_training_mode_is_kept() -> None:
    model = tiny_gpt2().eval()
    assert speed_up_dropout(model) == 7
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_evaluation_is_the_same_and_other_models_are_left_alone(
    build: Callable, drawn: list
) -> None:
    plain, fast = build(), build()
    speed_up_dropout(fast)
    loss_and_gradients(plain)
    assert drawn == []
    rows = torch.arange(40).view(1, 40)
    assert torch.equal(plain.eval()(rows).logits, fast.eval()(rows).logits)
    assert drawn == []


def test_the_loss_has_the_distribution_that_torch_gives_it() -> None:
    plain, fast = tiny_gpt2(), tiny_gpt2()
    speed_up_dropout(fast)
    losses = [[loss_and_gradients(m, seed)[0] for seed in range(60)] for m in (plain, fast)]
    expected, found = (torch.stack(one) for one in losses)
    noise = ((expected.var() + found.var()) / 60) ** 0.5
    assert abs(found.mean() - expected.mean()) < SIGMAS * noise
    assert found.std() == pytest.approx(expected.std().item(), rel=0.6)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_replay_by_gradient_checkpointing_draws_the_same_masks(build: Callable) -> None:
    model = build()
    speed_up_dropout(model)
    kept_activations = loss_and_gradients(model)
    assert all(map(torch.equal, loss_and_gradients(model), kept_activations))
    assert not torch.equal(loss_and_gradients(model, seed=2)[0], kept_activations[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, loss_and_gradients(model), kept_activations))


def test_documents_do_not_see_each_other_while_training() -> None:
    model = tiny_llama()
    speed_up_dropout(model)
    rows = torch.arange(80).view(1, 80) % 64
    position_ids = torch.cat([torch.arange(30), torch.arange(50)])[None]
    logits = []
    for change in (0, 1):
        rows[0, :30] = (rows[0, :30] + change) % 64
        torch.manual_seed(0)
        logits.append(model(rows, position_ids=position_ids, use_cache=False).logits)
    assert torch.equal(logits[0][:, 30:], logits[1][:, 30:])
    assert not torch.equal(logits[0][:, :30], logits[1][:, :30])


def test_what_is_saved_is_the_same(tmp_path: Path) -> None:
    plain, fast = tiny_gpt2(), tiny_gpt2()
    speed_up_dropout(fast)
    loss_and_gradients(fast)
    for name, model in (("plain", plain), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "fast")]
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fast")]
    assert weights[0] == weights[1]
    assert fast.config._attn_implementation == "sdpa"
