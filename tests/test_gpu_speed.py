"""Proves the choices of TF32, attention and Liger for GPUs, with stand-ins where one is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.llama import modeling_llama

from llm_training import gpu_speed
from llm_training.gpu_speed import LigerError, choose_attention, set_tf32, use_liger_kernel

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def keep_tf32() -> Iterator[None]:
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    yield
    matmul.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("asked", "precision", "is_on"),
    [(None, "bf16", True), (None, "fp32", False), (True, "fp32", True), (False, "fp8", False)],
)
def test_tf32_follows_the_precision_unless_asked(
    asked: bool | None, precision: str, is_on: bool, keep_tf32: None, hopper: None
) -> None:
    (line,) = set_tf32(asked, precision=precision, device_type="cuda")
    assert line.startswith("TF32     on:" if is_on else "TF32     off")
    assert torch.backends.cuda.matmul.allow_tf32 is is_on
    assert torch.backends.cudnn.allow_tf32 is is_on
    # What inductor asks, and what torch.get_float32_matmul_precision must still be able to say.
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if is_on else "ieee")
    assert torch.get_float32_matmul_precision() == ("high" if is_on else "highest")


def test_tf32_can_be_read_after_torch_has_compiled(keep_tf32: None, hopper: None) -> None:
    set_tf32(True, precision="bf16", device_type="cuda")
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert torch.get_float32_matmul_precision() == "high"


def test_tf32_is_left_alone_without_a_gpu_and_said_to_be_none_on_old_ones(
    keep_tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set_tf32(True, precision="bf16", device_type="cpu") == []
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "this GPU has none" in set_tf32(True, precision="fp16", device_type="cuda")[0]


def kernel(config: Any, asked: str | None = None, **changes: Any) -> str | None:
    how: dict[str, Any] = {"is_masked": True, "precision": "bf16", "device_type": "cuda"}
    return choose_attention(asked, config, **(how | changes))[0]


def test_attention_under_a_document_mask(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    llama, found = LlamaConfig(), {2: False, 3: False}
    monkeypatch.setattr(gpu_speed, "is_flash_attn_2_available", lambda: found[2])
    monkeypatch.setattr(gpu_speed, "is_flash_attn_3_available", lambda: found[3])
    assert kernel(llama) == "flex_attention"
    assert kernel(LlamaConfig(attention_dropout=0.1)) == "sdpa"
    assert kernel(GPT2Config()) == "sdpa"  # which has no flex attention
    assert kernel(AutoConfig.for_model("bloom")) == "sdpa"
    found[2] = True
    assert kernel(llama) == "flash_attention_2"
    assert kernel(GPT2Config()) == "flash_attention_2"
    assert kernel(llama, precision="fp32") == "flex_attention"
    found[3] = True
    assert kernel(llama) == "flash_attention_3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert kernel(llama) == "flash_attention_2"


@pytest.mark.parametrize("changes", [{"device_type": "cpu"}, {"is_masked": False}])
def test_attention_elsewhere_is_left_to_transformers(changes: dict[str, Any]) -> None:
    how = {"is_masked": True, "precision": "bf16", "device_type": "cuda"} | changes
    assert choose_attention(None, LlamaConfig(), **how) == (None, [])
    assert choose_attention("eager", LlamaConfig(), **how) == ("eager", [])


def test_the_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(gpu_speed, "is_flash_attn_3_available", lambda: False)
    how = {"is_masked": True, "precision": "bf16", "device_type": "cuda"}
    _, (line,) = choose_attention(None, LlamaConfig(), **how)
    assert line.startswith("Kernel   flex_attention attention, for documents apart: ")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that patches as liger-kernel does; what it was called with."""
    calls: list[dict[str, Any]] = []

    def patch(model: Any, **switches: Any) -> None:
        calls.append(switches)
        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", type("Liger", (), {}))
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *given: "rotated")
        for layer in model.model.layers:
            layer.mlp.forward = lambda hidden: hidden * 0

    package = ModuleType("liger_kernel.transformers.monkey_patch")
    vars(package).update(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None}, _apply_liger_kernel_to_instance=patch
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return calls


def test_liger_reaches_this_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    norm, rotate = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    names, ids = list(model.state_dict()), torch.arange(4)[None]
    before = model(ids).logits
    assert "of llama" in use_liger_kernel(model)
    assert calls == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert list(model.state_dict()) == names
    assert not torch.equal(model(ids).logits, before)
    # Another model of the kind, on a CPU, is as transformers has it.
    other = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, before)
    assert modeling_llama.LlamaRMSNorm is norm
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert modeling_llama.apply_rotary_pos_emb(on_gpu, on_gpu, None, None) == "rotated"
    assert modeling_llama.apply_rotary_pos_emb is not rotate


def test_liger_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2))
    with pytest.raises(LigerError, match=r"knows no gpt2. .* use one of llama"):
        use_liger_kernel(model)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(LigerError, match="pip install liger-kernel"):
        use_liger_kernel(model)
