"""A model that is told what its rows hold computes the same, and asks the device for nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training.packed_rows import rows_known
from tests.host_waits import HostWaits

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    "llama": SIZES,
    "qwen3": SIZES,
}
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = {
    False: None,
    True: torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5], [*range(12)]]),
}


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=50, **CONFIGS[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("are_packed", [False, True])
def test_the_logits_are_those_of_a_model_that_looks(kind: str, are_packed: bool) -> None:
    model, logits, waits = model_of(kind), {}, {}
    for name, told in (("looks", nullcontext()), ("is told", rows_known(are_packed))):
        with told, HostWaits() as spy, torch.no_grad():
            output = model(IDS, position_ids=POSITIONS[are_packed], use_cache=False)
            logits[name], waits[name] = output.logits, spy.take()
    assert torch.equal(logits["looks"], logits["is told"])
    assert waits["looks"] and not waits["is told"]


def test_what_was_said_ends_with_the_block() -> None:
    model = model_of("llama")
    plain = model(IDS, position_ids=POSITIONS[True], use_cache=False).logits
    with pytest.raises(RuntimeError, match="meanwhile"), rows_known(False):
        wrong = model(IDS, position_ids=POSITIONS[True], use_cache=False).logits
        raise RuntimeError("meanwhile")
    assert not torch.allclose(plain, wrong)
    again = model(IDS, position_ids=POSITIONS[True], use_cache=False).logits
    assert torch.equal(plain, again)
