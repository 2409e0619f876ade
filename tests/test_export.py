"""The exported folder is a plain Hugging Face model with the live model's numbers."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from llm_training.data.tokenizers import train_tokenizer
from llm_training.export import export_model
from llm_training.modeling import CausalLMWithLoss


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer("byte", ["abc"], 300)


def make(accelerator: Accelerator) -> tuple[CausalLMWithLoss, GPT2LMHeadModel]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=300, n_positions=8)
    network = GPT2LMHeadModel(config)
    return accelerator.prepare(CausalLMWithLoss(network)), network


def test_it_opens_offline_with_the_live_models_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, network = make(accelerator)
    export_model(accelerator, model, network, tokenizer, tmp_path / "final")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(8)[None]
    assert torch.equal(opened(ids).logits, network.eval()(ids).logits)
    assert opened.lm_head.weight is opened.transformer.wte.weight
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids
        == tokenizer("abc").input_ids
    )
    GenerationConfig.from_pretrained(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_the_names_are_the_models_own_when_it_is_compiled(tmp_path: Path) -> None:
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    export_model(accelerator, *make(accelerator), None, tmp_path / "final")
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "final").state_dict()
    names = set(load_file(tmp_path / "final" / "model.safetensors"))
    assert names == set(plain) - {"lm_head.weight"}
