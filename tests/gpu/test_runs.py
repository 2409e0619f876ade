"""On a GPU a run is what it is on a CPU: its curve, its masks, its checkpoints, its messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.other import load
from torch import nn

import train_llm
from arguments import OptimizationArguments
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.checkpoint_comparison import compare_checkpoints
from llm_training.optim import build_optimizer
from llm_training.ranks import RankError
from tests.small_runs import curve, open_place, read_log, train_small, weights

pytestmark = pytest.mark.gpu

Train = Callable[..., Path]
CHANGES: dict[str, Any] = {"max_steps": 8, "save_steps": 4, "learning_rate": 1e-3}
# Relative, over 8 steps. fp32 sums in another order; bf16 has 8 bits, fp16 has 11.
FP32, FP16, BF16 = 1e-4, 5e-3, 2e-2
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return partial(train_small, open_place(tmp_path, monkeypatch), **CHANGES)


def require_near(found: Path, wanted: Path, tolerance: float) -> None:
    """Losses within the tolerance, and gradient norms within ten times as much."""
    mine, others = curve(found), curve(wanted)
    assert len(mine) == len(others) >= 8
    for here, there in zip(mine, others, strict=True):
        assert here["train/learning_rate"] == there["train/learning_rate"]
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=tolerance)
        assert here["train/grad_norm"] == pytest.approx(
            there["train/grad_norm"], rel=10 * tolerance
        )


def scale_gradients(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> None:
    """Multiplies the gradient of one forward pass in training, counted from 0, not its loss."""
    forward, counted = CausalLMWithLoss.forward, [0]

    def scaled(self: CausalLMWithLoss, *args: Any, **kwargs: Any) -> Any:
        loss, correct = forward(self, *args, **kwargs)
        if self.training:
            counted[0] += 1
            if counted[0] == number + 1:
                loss = loss + (loss - loss.detach()) * factor
        return loss, correct

    monkeypatch.setattr(CausalLMWithLoss, "forward", scaled)


# -------------------------------------------------------------------------------------- the curve


def test_the_curve_is_that_of_a_cpu(train: Train, device: str) -> None:
    there = train("there", device=device, dropout=0.0, tf32=False)
    require_near(there, train("cpu", dropout=0.0), FP32)


@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 2}, {"chunked_loss": True}])
def test_the_curve_is_the_same_however_a_step_is_computed(
    train: Train, device: str, split: dict[str, Any]
) -> None:
    plain = train("plain", device=device, dropout=0.0, tf32=False)
    require_near(train("split", device=device, dropout=0.0, tf32=False, **split), plain, FP32)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", BF16), ("fp16", FP16)])
def test_16_bits_follow_the_curve_of_32(
    train: Train, device: str, precision: str, tolerance: float
) -> None:
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("fp16 is for GPUs")
    plain = train("plain", device=device, dropout=0.0, tf32=False)
    short = train("short", device=device, dropout=0.0, mixed_precision=precision)
    require_near(short, plain, tolerance)
    assert curve(short) != curve(plain)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_compiled_code_follows_the_same_curve(train: Train, device: str, scope: str) -> None:
    plain = train("plain", device=device, dropout=0.0, tf32=False)
    changes = {"torch_compile": True, "torch_compile_scope": scope, "tf32": False}
    require_near(train("compiled", device=device, dropout=0.0, **changes), plain, FP32)


@pytest.mark.parametrize("kernel", [None, "sdpa", "flex_attention"])
def test_documents_apart_have_the_curve_of_a_cpu(
    train: Train, device: str, kernel: str | None
) -> None:
    if (device, kernel) == ("cpu", "flex_attention"):
        pytest.skip("torch has no backward pass of it on a CPU")
    changes: dict[str, Any] = {
        "model_type": "llama",
        "config_overrides": LLAMA,
        "dropout": None,
        "block_size": 128,
        "global_batch_size": 2,
        "document_separator": "line",
        "document_mask": True,
    }
    cpu = train("cpu", attn_implementation="eager", **changes)
    there = train("there", device=device, attn_implementation=kernel, tf32=False, **changes)
    require_near(there, cpu, FP32)
    mixed = train("mixed", attn_implementation="eager", **changes | {"document_mask": False})
    assert curve(mixed)[0]["train/loss"] != pytest.approx(curve(cpu)[0]["train/loss"], rel=FP32)


# -------------------------------------------------------------------------------- steps left out


def test_an_overflow_in_fp16_leaves_the_schedule_alone(
    train: Train, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [line["train/learning_rate"] for line in curve(train("plain"))]
    scale_gradients(monkeypatch, 2, 1e30)
    folder = train("overflow", device=gpu, mixed_precision="fp16")
    log = curve(folder)
    assert [line["train/learning_rate"] for line in log] == rates
    assert [line["step"] for line in log] == list(range(1, 9))
    # The step that was left out is none of them: its samples are passed over, others follow.
    assert all(math.isfinite(float(line["train/grad_norm"])) for line in log)
    assert log[-1]["train/epoch"] == pytest.approx(
        9 / 8 * curve(folder.parent / "plain")[-1]["train/epoch"]
    )


def test_a_step_with_nan_changes_nothing(
    train: Train, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {}
    for name in (device, "cpu"):
        scale_gradients(monkeypatch, 2, float("nan"))
        folders[name] = train(f"on-{name}", device=name, dropout=0.0, tf32=False, logging_steps=2)
        monkeypatch.undo()
        monkeypatch.chdir(folders[name].parent)
    log = curve(folders[device])
    assert log[-1]["train/skipped_steps"] == 1
    losses = [line["train/loss"] for line in log]
    assert losses == pytest.approx([c["train/loss"] for c in curve(folders["cpu"])], rel=FP32)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_continues_bit_for_bit(
    train: Train, device: str, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    changes = {"device": device, "mixed_precision": precision, "save_steps": 2}
    whole = train("whole", **changes)
    compute = train_llm.compute_gradients

    def die(run: train_llm.Run, *args: Any) -> Any:
        if run.state.step == 5:
            raise RankError("the machine is gone")
        return compute(run, *args)

    monkeypatch.setattr(train_llm, "compute_gradients", die)
    train("parts", code=1, **changes)
    monkeypatch.setattr(train_llm, "compute_gradients", compute)
    parts = train("parts", **changes)
    assert curve(parts) == curve(whole)
    assert weights(parts) == weights(whole)


def test_every_checkpoint_has_the_random_state_of_the_device(train: Train, device: str) -> None:
    folder = train("run", device=device, save_steps=2)  # with dropout
    name = "torch_cuda_manual_seed" if device == "cuda" else "torch_manual_seed"
    states = [
        load(folder / "checkpoints" / f"step-0000000{step}" / "random_states_0.pkl")[name]
        for step in (2, 4)
    ]
    first, second = (state[0] if isinstance(state, list) else state for state in states)
    assert not torch.equal(first, second)


def test_what_is_written_while_the_run_goes_on_is_the_same(train: Train, device: str) -> None:
    plain, other = train("plain", device=device), train("other", device=device, async_save=True)
    for name in ("step-00000004", "step-00000008"):
        found = compare_checkpoints(plain / "checkpoints" / name, other / "checkpoints" / name)
        assert found.num_tensors > 20 and found.differences == []
    assert curve(other) == curve(plain)


# ---------------------------------------------------------------------------- the device as such


def test_adamw_is_one_kernel(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)).to(device)
    optimizer = build_optimizer(model, OptimizationArguments(), device)
    assert all(group["fused"] for group in optimizer.param_groups)
    before = model[1].weight.detach().clone()
    model(torch.arange(8, device=device)).square().sum().backward()
    optimizer.step()
    # The first step of Adam moves every number by the rate, and decay adds its share.
    moved = (before * (1 - 5e-5 * 0.1) - model[1].weight).abs()
    assert torch.allclose(moved, torch.full_like(moved, 5e-5), rtol=1e-2)


def test_too_little_memory_is_told(
    train: Train, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 150 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        # 50 MB of weights, and as much again for gradients and each of two moments.
        sizes = {"n_layer": 1, "n_embd": 1024, "n_head": 2}
        train("large", code=1, device=gpu, config_overrides=sizes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    message = capsys.readouterr().err
    assert "rank 0: the device has no memory left. CUDA out of memory." in message
    assert "At its peak this process held" in message
    assert "--per_device_train_batch_size" in message


def test_utilization_is_logged_where_the_peak_is_known(train: Train, gpu: str) -> None:
    from llm_training.flops import peak_flops

    log = read_log(train("run", device=gpu, mixed_precision="bf16"))
    is_known = peak_flops(torch.cuda.get_device_name(), "bf16") is not None
    assert any("perf/mfu" in line for line in log) == is_known
    assert all(0 < line.get("perf/mfu", 0.5) < 1 for line in log)
