"""Proves that a document mask is tried on the real model, and that no leak passes.

Flash attention needs a GPU. Here a stand-in takes the place of its package's functions alone; all
that leads to them is transformers' own: how documents are told apart, and what the kernel is given.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    modeling_flash_attention_utils,
    modeling_utils,
)
from transformers.integrations import hub_kernels

from llm_training.causal_lm import CausalLMWithLoss
from llm_training.document_mask import DocumentMaskError, check_document_mask

LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
BLOOM = {"n_layer": 2, "hidden_size": 32, "n_head": 2}
MODELS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "bloom": BLOOM}


def make_model(model_type: str, **kwargs: Any) -> CausalLMWithLoss:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=300, **ends, **MODELS[model_type])
    return CausalLMWithLoss(AutoModelForCausalLM.from_config(config, **kwargs))


def check(model: CausalLMWithLoss, precision: str = "no", block_size: int = 64) -> None:
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    check_document_mask(
        accelerator,
        accelerator.prepare(model),
        batch_size=3,
        block_size=block_size,
        vocab_size=300,
        kernel=str(model.config._attn_implementation),
    )


@pytest.mark.parametrize(
    ("model_type", "kernel", "precision"),
    [
        ("llama", "eager", "no"),
        ("llama", "eager", "bf16"),
        ("llama", "sdpa", "no"),
        ("llama", "sdpa", "bf16"),
        ("llama", "flex_attention", "no"),  # compiled first, so only once
        ("qwen3", "sdpa", "bf16"),
        ("gpt2", "eager", "bf16"),
        ("gpt2", "sdpa", "no"),
    ],
)
def test_documents_do_not_see_each_other(model_type: str, kernel: str, precision: str) -> None:
    check(make_model(model_type, attn_implementation=kernel), precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_leak_is_found(model_type: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(model_type)
    forward = model.model.forward

    def leaking(input_ids: Tensor, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids)  # as a tokenizer gives it: all are there, all are seen
        return forward(input_ids=input_ids, attention_mask=mask, **kwargs)

    monkeypatch.setattr(model.model, "forward", leaking)
    with pytest.raises(DocumentMaskError, match="a change in one document changed the loss"):
        check(model, precision)


def test_a_model_that_knows_no_positions_is_refused() -> None:
    with pytest.raises(DocumentMaskError, match="--document_mask false"):
        check(make_model("bloom"))


def test_rows_too_short_for_several_documents_are_refused() -> None:
    with pytest.raises(DocumentMaskError, match="--block_size 5 is too short"):
        check(make_model("llama"), block_size=5)


def test_nothing_of_the_run_changes() -> None:
    model = make_model("gpt2").train()
    before = torch.get_rng_state()
    check(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_document_in_a_row_gives_the_loss_it_has_alone() -> None:
    """Under a mask, positions begin anew: the row's loss is the sum of its documents' own."""
    model = make_model("llama").eval()
    tokens = torch.randint(1, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    borders = [0, 7, 19, 30]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)])
    labels = tokens.clone()
    labels[0, borders[:-1]] = -100
    with torch.no_grad():
        packed, _ = model(tokens, labels=labels, position_ids=positions[None])
        alone = sum(
            float(model(tokens[:, a:b], labels=tokens[:, a:b])[0]) for a, b in pairwise(borders)
        )
    assert float(packed) == pytest.approx(alone, rel=1e-5)


# Flash attention

FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


# Real kernels take 16 bits. transformers leaves these as they are on the way to one, so that small
# differences show; in GPT-2 it finds no type to cast float32 to, and fails.
NOT_CAST = {"llama": torch.float32, "gpt2": torch.float64}


class FlashStandIn:
    """What a package of flash attention offers, computed on a CPU.

    Attributes:
        lengths: of the sequences that the kernel was told of, call by call.
        ignores_borders: whether it computes as if they were one sequence: a kernel that leaks.
    """

    def __init__(self, ignores_borders: bool = False):
        self.lengths: list[list[int]] = []
        self.ignores_borders = ignores_borders

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool
    ) -> Tensor:
        """Dense attention: q, k and v are (B, T, heads, head size), and so is what it returns."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Tensor,
        max_seqlen_k: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention within each sequence: q, k and v are (tokens, heads, head size)."""
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff()
        assert int(max_seqlen_q) == int(max_seqlen_k) == int(lengths.max())
        self.lengths.append(lengths.tolist())
        sizes = [len(q)] if self.ignores_borders else self.lengths[-1]
        sequences = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        parts = [
            self.flash_attn_func(q[None], k[None], v[None], softmax_scale, causal)[0]
            for q, k, v in sequences
        ]
        return torch.cat(parts)

    flash_attn_with_kvcache = None

    def install(self, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets transformers find this where it looks for the package of `kernel`."""
        package = ModuleType(FLASH[kernel])
        padding = ModuleType(f"{FLASH[kernel]}.bert_padding")
        for module, names in (
            (package, ("flash_attn_func", "flash_attn_varlen_func")),
            (padding, ()),
        ):
            for name in names:
                setattr(module, name, getattr(self, name))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
        padding.pad_input = padding.unpad_input = None  # type: ignore[attr-defined]
        version = int(kernel[-1])
        found = modeling_flash_attention_utils
        monkeypatch.setattr(found, f"is_flash_attn_{version}_available", lambda: True)
        matrix = found.FLASH_ATTENTION_COMPATIBILITY_MATRIX
        monkeypatch.setitem(matrix[version], "general_availability_check", lambda: True)
        # Loaded once in a process; whatever is loaded next is loaded again.
        monkeypatch.setattr(found, "_loaded_implementation", None)


def packed_rows() -> tuple[Tensor, Tensor]:
    """Ids and positions of 3 rows of 24 tokens: 3 documents, 1, and 2 of which one has a token."""
    ids = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(1))
    lengths = [[7, 12, 5], [24], [23, 1]]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return ids, torch.stack(positions)


def document_mask_of(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool: whether a token sees another, written out."""
    document = (position_ids == 0).cumsum(1)
    is_same = document[:, :, None] == document[:, None, :]
    return (is_same & torch.ones_like(is_same).tril())[:, None]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attention_sees_what_a_mask_of_each_pair_shows(
    kernel: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = FlashStandIn()
    flash.install(kernel, monkeypatch)
    dtype = NOT_CAST[model_type]
    model = make_model(model_type, attn_implementation=kernel).to(dtype).eval()
    reference = make_model(model_type, attn_implementation="sdpa").to(dtype).eval().model
    ids, positions = packed_rows()
    with torch.no_grad():
        logits, _ = model(ids, position_ids=positions)
        mask = document_mask_of(positions)
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        unpacked = reference(ids).logits
    assert flash.lengths == [[7, 12, 5, 24, 23, 1]] * 2  # in each of the two layers
    assert (logits - expected).abs().max() < 1e-5
    assert (logits - unpacked).abs().max() > 1e-3  # the mask makes a difference


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attention_keeps_documents_apart(
    kernel: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = FlashStandIn()
    flash.install(kernel, monkeypatch)
    check(make_model(model_type, attn_implementation=kernel), "bf16")
    assert flash.lengths == [[21, 21, 22] * 3] * 4  # before and after the change, two layers each


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attention_that_leaks_is_refused(
    kernel: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FlashStandIn(ignores_borders=True).install(kernel, monkeypatch)
    with pytest.raises(DocumentMaskError, match=f"with {kernel} attention"):
        check(make_model(model_type, attn_implementation=kernel), "bf16")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_flash_attention_of_the_kernels_package_keeps_documents_apart(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where flash_attn is not installed and kernels is, that one's kernel has another name."""
    flash = FlashStandIn()
    for module in (modeling_utils, hub_kernels):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: flash)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    model = make_model(model_type, attn_implementation="flash_attention_2")
    assert model.config._attn_implementation == "kernels-community/flash-attn2"
    check(model, "bf16")
    assert flash.lengths == [[21, 21, 22] * 3] * 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_flash_attention_learns_what_a_mask_of_each_pair_teaches(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients too are those of sdpa, so that rows are put together again in order."""
    FlashStandIn().install("flash_attention_2", monkeypatch)
    ids, positions = packed_rows()
    gradients = []
    for kernel in ("flash_attention_2", "sdpa"):
        model = make_model(model_type, attn_implementation=kernel).to(NOT_CAST[model_type]).eval()
        model(ids, labels=ids, position_ids=positions)[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for flash, sdpa in zip(*gradients, strict=True):
        torch.testing.assert_close(flash, sdpa, rtol=1e-4, atol=1e-4)
