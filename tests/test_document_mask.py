"""Proves that a document mask is tried on the real model, and that no leak passes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training.document_mask import DocumentMaskError, check_document_mask
from llm_training.modeling import CausalLMWithLoss

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
    def leaking(self: CausalLMWithLoss, input_ids: Any, position_ids: Any) -> Any:
        mask = torch.ones_like(input_ids)  # as a tokenizer gives it: all are there, all are seen
        return self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask
        ).logits

    monkeypatch.setattr(CausalLMWithLoss, "_logits", leaking)
    with pytest.raises(DocumentMaskError, match="a change in one document changed the loss"):
        check(make_model(model_type), precision)


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


def test_flash_attention_is_given_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells documents apart in a batch of one only; what comes back has the batch's shape."""
    model = make_model("llama")
    seen = []

    class Outputs:
        def __init__(self, shape: torch.Size):
            self.logits = torch.zeros(*shape, 300)

    def forward(input_ids: Any, position_ids: Any, use_cache: bool) -> Outputs:
        seen.append((tuple(input_ids.shape), tuple(position_ids.shape), use_cache))
        return Outputs(input_ids.shape)

    monkeypatch.setattr(
        model, "config", type("C", (), {"_attn_implementation": "flash_attention_2"})
    )
    monkeypatch.setattr(model.model, "forward", forward)
    ids = torch.zeros(3, 8, dtype=torch.int64)
    logits, _ = model(ids, position_ids=torch.arange(8).expand(3, -1).contiguous())
    assert seen == [((1, 24), (1, 24), False)]
    assert logits.shape == (3, 8, 300)
