"""On a GPU: TF32, determinism, fp8, Liger, attention and torch.compile do what they say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import curve, open_place, train_small, weights

pytestmark = pytest.mark.gpu

Train = Callable[..., Path]
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# Relative, over 8 steps: fp32 in another order, bf16 with 8 bits, fp8 with 4.
FP32, BF16, FP8 = 1e-4, 2e-2, 5e-2


@pytest.fixture
def train(gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    how = {"model_type": "llama", "config_overrides": LLAMA, "dropout": None}
    place = open_place(tmp_path, monkeypatch)
    return partial(train_small, place, **how, device=gpu, max_steps=8)


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in curve(folder)]


def test_tf32_rounds_and_can_be_turned_off(train: Train) -> None:
    train("off", tf32=False)
    exact = torch.ones(64, 64, device="cuda") * (1 + 2**-12) @ torch.eye(64, device="cuda")
    assert float(exact[0, 0]) == 1 + 2**-12
    train("on", tf32=True)
    if torch.cuda.get_device_capability() >= (8, 0):
        rounded = torch.ones(64, 64, device="cuda") * (1 + 2**-12) @ torch.eye(64, device="cuda")
        assert float(rounded[0, 0]) == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_run_gives_the_same_bits(precision: str, train: Train) -> None:
    first = train("first", mixed_precision=precision)
    second = train("second", mixed_precision=precision)
    assert curve(first) == curve(second) and weights(first) == weights(second)


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs", "reduce-overhead"])
@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_compiled_code_computes_the_same(scope: str, mode: str, train: Train) -> None:
    if scope == "blocks" and mode == "reduce-overhead":
        pytest.skip("refused: blocks of one code would share the memory of their graphs")
    torch._dynamo.reset()
    how: dict[str, Any] = {"eval_steps": 2, "validation_split_percentage": 20}
    plain = train("plain", **how)
    compiled = train(
        "compiled",
        **how,
        torch_compile=True,
        torch_compile_scope=scope,
        torch_compile_mode=mode,
    )
    for ours, theirs in zip(curve(compiled), curve(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=FP32)
    assert weights(compiled).keys() == weights(plain).keys()


def test_documents_stay_apart_with_the_kernel_that_is_chosen(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = train("chosen", document_mask=True, mixed_precision="bf16")
    assert "Kernel   fl" in capsys.readouterr().out  # flash or flex
    plain = train("plain", document_mask=True, mixed_precision="bf16", attn_implementation="sdpa")
    assert losses(chosen) == pytest.approx(losses(plain), rel=BF16)


def test_liger_computes_the_same(train: Train) -> None:
    pytest.importorskip("liger_kernel")
    liger, plain = train("liger", use_liger_kernel=True), train("plain")
    assert losses(liger) == pytest.approx(losses(plain), rel=FP32)
    assert weights(liger).keys() == weights(plain).keys()


def test_fp8_trains_like_bf16(train: Train) -> None:
    pytest.importorskip("torchao.float8")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU multiplies no 8 bits")
    ours = train("fp8", mixed_precision="fp8")
    assert losses(ours) == pytest.approx(losses(train("bf16", mixed_precision="bf16")), rel=FP8)
