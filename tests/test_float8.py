"""Proves which matrices are multiplied in 8 bits, that all else is refused, and that it trains.

The training needs torchao, which computes 8 bits slowly on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from llm_training import float8, launch
from llm_training.float8 import Float8Error, check_float8, choose_matrices, use_float8
from tests.small_runs import curve, open_place, train_small, weights

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_the_matrices_between_the_first_and_the_last_are_chosen() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, vocab_size=48))
    chosen, num_linear = choose_matrices(model, model.get_output_embeddings())
    assert num_linear == 2 * 7 + 1
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - chosen
    assert left == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"}


def test_odd_sides_and_routers_stay() -> None:
    names = ["first", "odd", "gate", "good", "last", "head"]
    sizes = [(16, 16), (16, 24), (16, 16), (32, 48), (16, 16), (16, 16)]
    model = nn.ModuleDict({n: nn.Linear(*s) for n, s in zip(names, sizes, strict=True)})
    assert choose_matrices(model, model["head"]) == ({"good"}, 6)


def test_a_model_without_such_matrices_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=16, n_head=2))
    accelerator: Any = SimpleNamespace(ao_recipe_handler=SimpleNamespace())
    with pytest.raises(Float8Error, match=r"of the 1 linear layers .* GPT-2"):
        use_float8(accelerator, model, model.get_output_embeddings())


def test_only_gpus_that_multiply_8_bits_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Float8Error, match=r"this run is on cpu. .* bf16"):
        check_float8("cpu", backend="single")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(Float8Error, match=r"NVIDIA A100 has 8.0"):
        check_float8("cuda", backend="single")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_float8("cuda", backend="fsdp")
    with pytest.raises(Float8Error, match="DeepSpeed"):
        check_float8("cuda", backend="deepspeed")
    with pytest.raises(Float8Error, match="tensor parallelism"):
        check_float8("cuda", backend="ddp", tp_size=2)


def test_it_trains_like_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao.float8")
    place = open_place(tmp_path, monkeypatch)
    recipe = float8.float8_recipe(emulate=True)
    how = {"model_type": "llama", "config_overrides": LLAMA, "dropout": None, "max_steps": 6}
    train_small(place, "bf16", **how, mixed_precision="bf16")
    monkeypatch.setattr(launch, "check_float8", lambda *_, **__: None)
    monkeypatch.setattr(launch, "float8_recipe", lambda: recipe)
    monkeypatch.setattr("llm_training.argument_checks.speed_problems", lambda *_: [])
    train_small(place, "fp8", **how, mixed_precision="fp8")
    losses = [[line["train/loss"] for line in curve(place / name)] for name in ("bf16", "fp8")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert weights(place / "fp8").keys() == weights(place / "bf16").keys()
