"""Proves that adapters train beside a base in 4 bits (QLoRA), and that what is written is theirs.

On the CPU, by the very operations that a GPU runs. Each needs the package bitsandbytes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import train_llm
from llm_training.export import ExportError
from llm_training.flops import model_flops_per_token
from llm_training.frozen_dtype import FourBitLinear, held_bytes, hold_alike
from llm_training.milestones import export
from llm_training.modeling import count_parameters, count_trained, model_fingerprint
from tests import test_memory_needs as memory
from tests.small_runs import curve
from tests.test_frozen_dtype import assert_same, weights_of
from tests.test_lora import build, logits_of, place, train_adapters

pytest.importorskip("bitsandbytes")
__all__ = ["place"]  # a fixture
NF4: dict[str, Any] = {"frozen_dtype": "nf4"}
# The numbers that 4 bits stand for: arXiv:2305.14314, appendix E, to four digits.
LEVELS = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
LEVELS += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def linear(rows: int = 24, columns: int = 32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(columns, rows).requires_grad_(False)


def in_four_bits(layer: nn.Module, dtype: torch.dtype = torch.float32) -> FourBitLinear:
    return FourBitLinear(layer, dtype, torch.device("cpu"))


# ---------------------------------------------------------------------------------- the layer


def test_each_number_becomes_the_nearest_level_of_its_block() -> None:
    plain = linear()
    levels = torch.tensor(LEVELS)
    blocks = plain.weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)] * scales
    found = in_four_bits(plain).matrix(torch.float32).T.reshape(-1, 64)
    # The scales themselves are held in 8 bits.
    torch.testing.assert_close(found, nearest, rtol=0.04, atol=1e-4)
    parts = (found / found.abs().amax(1, keepdim=True)).round(decimals=3)
    assert len({*parts.flatten().tolist()}) == len(LEVELS)


@pytest.mark.parametrize("size", [(24, 32), (7, 9)], ids=["even", "odd"])
def test_the_product_and_its_gradient_are_those_of_that_matrix(size: tuple[int, int]) -> None:
    plain = linear(*size)
    layer = in_four_bits(plain)
    hidden = torch.randn(2, 3, size[1], requires_grad=True)
    found = layer(hidden)
    assert plain.bias is not None
    torch.testing.assert_close(found, hidden @ layer.matrix(torch.float32) + plain.bias)
    (gradient,) = torch.autograd.grad(found.square().sum(), hidden)
    torch.testing.assert_close(gradient, 2 * found @ layer.matrix(torch.float32).T)


def test_a_matrix_stored_the_other_way_round_keeps_its_shape() -> None:
    plain = Conv1D(24, 32).requires_grad_(False)
    layer, hidden = in_four_bits(plain), torch.randn(5, 32)
    difference = torch.linalg.vector_norm(layer(hidden) - plain(hidden))
    assert 0 < difference < 0.15 * torch.linalg.vector_norm(plain(hidden))
    assert count_parameters(layer)[0] == 24 * 32 + 24


def test_half_precision_rounds_the_same_matrix() -> None:
    plain, hidden = linear(), torch.randn(5, 32)
    whole, half = in_four_bits(plain), in_four_bits(plain, torch.bfloat16)
    assert torch.equal(half.matrix(torch.bfloat16), whole.matrix(torch.float32).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert half(hidden).dtype == torch.bfloat16
        torch.testing.assert_close(half(hidden).float(), whole(hidden).float(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_train_near_the_curve_beside_float32(
    precision: str, model: str, place: Path
) -> None:
    common = {"model": model, "max_steps": 8, "mixed_precision": precision}
    plain, packed = (train_adapters(place, n, **common, **s) for n, s in (("p", {}), ("q", NF4)))
    losses = [[line["train/loss"] for line in curve(run)] for run in (plain, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1] != losses[0]
    assert losses[1][-1] < 0.995 * losses[1][0]
    moved = [name for name, t in weights_of(packed).items() if "lora_B" in name and t.any()]
    assert len(moved) == (8 if model == "gpt2" else 14)


def test_what_is_written_computes_the_same_beside_the_same_base(place: Path) -> None:
    """And beside the whole base about the same."""
    run = build(model="llama", max_steps=8, **NF4)
    train_llm.train(run)
    live = logits_of(run.network)
    export(run, run.output.final)
    opened = AutoModelForCausalLM.from_pretrained("built/final")
    whole = logits_of(opened)
    hold_alike(opened, run.network)
    torch.testing.assert_close(logits_of(opened), live, rtol=0, atol=1e-6)
    apart = torch.linalg.vector_norm(whole - live) / torch.linalg.vector_norm(live)
    assert 1e-3 < apart < 0.2


def test_the_check_looks_at_the_base_in_4_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(model="llama", **NF4)
    train_llm.train(run)
    monkeypatch.setattr("llm_training.export.hold_alike", lambda *_: None)
    with pytest.raises(ExportError, match="computes other logits"):  # those of the whole base
        export(run, run.output.final)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_stopped_run_goes_on_bit_for_bit(model: str, place: Path) -> None:
    form = NF4 | {"model": model, "lora_dropout": 0.2, "gradient_checkpointing": True}
    whole = train_adapters(place, "whole", **form)
    start = str(whole / "checkpoints" / "step-00000002")
    again = train_adapters(place, "again", resume_from_checkpoint=start, **form)
    assert curve(again) == curve(whole)[2:]
    assert_same(weights_of(again), weights_of(whole))
    kept = load_file(whole / "checkpoints" / "step-00000004" / "model.safetensors")
    assert kept and all(".lora_" in name for name in kept)


def test_a_finished_run_is_merged_into_the_whole_base(place: Path) -> None:
    run = train_adapters(place, model="llama", **NF4)
    opened = AutoModelForCausalLM.from_pretrained("run/final")
    before = logits_of(opened)
    train_adapters(place, model="llama", merge_adapter=True)
    assert not (run / "final" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained("run/final")
    torch.testing.assert_close(logits_of(merged), before, rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 2},
    ],
    ids=["bf16", "recomputed"],
)
def test_a_step_takes_the_memory_that_was_told(changes: dict[str, Any]) -> None:
    arguments = memory.settings("llama", lora_rank=4, **NF4, **changes)
    need = memory.computed(arguments)
    assert need.peak == pytest.approx(memory.measured(arguments), rel=0.15)
    whole = memory.computed(dataclasses.replace(arguments, frozen_dtype="float32"))
    assert need.weights < 0.75 * whole.weights  # embedding and head are a large part here


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_counts_and_identity_are_those_of_the_whole_matrices(model: str, place: Path) -> None:
    plain, packed = (build(model=model, **settings) for settings in ({}, NF4))
    for count in (count_parameters, count_trained, model_fingerprint):
        assert count(packed.model) == count(plain.model)
    flops = [model_flops_per_token(r.model, r.network.config, 32) for r in (plain, packed)]
    assert flops[0] == flops[1] is not None


def test_the_log_says_what_is_held(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24)
    line = f"Frozen   {count:,} parameters in 14 matrices are held in 4 bits (NF4), with their"
    run = build(model="llama", **NF4)
    said = capsys.readouterr().out
    assert line in said
    packed = [m for m in run.network.modules() if isinstance(m, FourBitLinear)]
    assert len(packed) == 14 and type(run.network.get_output_embeddings()) is nn.Linear
    others = sum(
        p.nbytes for p in run.network.parameters() if not p.requires_grad and p.dtype != torch.uint8
    )
    scales = sum(m.scale_bytes for m in packed)
    assert held_bytes(run.network) == count // 2 + scales + others
    assert scales == sum(_measured_scales(m) for m in packed)
    train_adapters(place, model="llama", dry_run=True, **NF4)
    assert line in capsys.readouterr().out


def _measured_scales(layer: FourBitLinear) -> int:
    return layer._scales.absmax.nbytes + layer._scales.state2.absmax.nbytes
