"""Proves that a model which looks ahead is found out by trying it, and that no other is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_training.causal_lm import CausalLMWithLoss
from llm_training.causality import brings_its_code, check_causality
from llm_training.pretrained import ModelError
from tests.test_document_mask import GPT2, LLAMA

SEEING = {key: size for key, size in LLAMA.items() if key != "num_key_value_heads"}


def make_model(model_type: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=300, **ends, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def check(model: PreTrainedModel, precision: str) -> None:
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    wrapped = CausalLMWithLoss(model)
    check_causality(
        accelerator, accelerator.prepare(wrapped), batch_size=3, block_size=64, vocab_size=300
    )
    assert wrapped.training


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", LLAMA),
        ("gpt2", GPT2),
        ("mixtral", LLAMA | {"num_local_experts": 4}),  # shared out anew with other tokens
        ("mamba", {"num_hidden_layers": 2, "hidden_size": 32}),
        ("bert", SEEING | {"is_decoder": True}),
    ],
)
def test_who_sees_nothing_passes(model_type: str, sizes: dict[str, Any], precision: str) -> None:
    check(make_model(model_type, sizes), precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model_type", ["bert", "electra", "roformer"])
def test_who_looks_ahead_is_refused_though_it_has_learned_nothing(
    model_type: str, precision: str
) -> None:
    with pytest.raises(ModelError, match="no causal language model: its code lets"):
        check(make_model(model_type, SEEING), precision)


def test_logits_that_are_no_numbers_prove_nothing() -> None:
    """That a model is broken, the first step tells."""
    model = make_model("llama", LLAMA)
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    check(model, "no")


def test_kinds_that_are_known_are_not_tried() -> None:
    model = make_model("gpt2", GPT2)
    assert not brings_its_code(model)
    assert brings_its_code(type("Own", (type(model),), {})(model.config))
