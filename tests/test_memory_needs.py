"""Proves that the memory told before a run is what a step takes: measured here, within 15%.

Measured is every piece of memory that torch's allocator hands out on the CPU in the second step of
a run (the first makes the moments), and the sizes of weights and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from arguments import Arguments, BatchSizes, resolve_batch_sizes
from llm_training.launch_settings import LaunchSettings
from llm_training.memory_needs import (
    MemoryNeed,
    backend_of,
    estimate_memory,
    gathered_parameters,
    memory_problems,
    offloads,
    optimizer_bytes,
)
from llm_training.modeling import load_config
from llm_training.needs import outline_of
from llm_training.network import build_network
from llm_training.optim import build_optimizer

BLOCK_SIZE = 128
VOCAB_SIZE = 2048
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_embd": 128, "n_head": 4},
    "llama": {
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}
ALONE = LaunchSettings()


def settings(kind: str, **changes: Any) -> Arguments:
    values: dict[str, Any] = {
        "model_type": kind,
        "config_overrides": MODELS[kind] | {"vocab_size": VOCAB_SIZE},
        "dropout": None if kind == "llama" else 0.0,
        "mixed_precision": "fp32",
        "per_device_train_batch_size": 8,
        "device": "cpu",
    }
    return Arguments(**(values | changes))


def stand_in_for(arguments: Arguments) -> Accelerator:
    """What a network asks of an Accelerator; a real one keeps the precision of the first."""
    precision = {"fp32": "no"}.get(arguments.mixed_precision, arguments.mixed_precision)
    found = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
    return cast(Accelerator, found)


def build_for(arguments: Arguments, accelerator: Accelerator) -> Callable[..., nn.Module]:
    batch = resolve_batch_sizes(arguments, 1)

    def build(plain: Arguments, alone: LaunchSettings, config: Any) -> nn.Module:
        return build_network(accelerator, plain, alone, config, batch, BLOCK_SIZE)[0]

    return build


def computed(
    arguments: Arguments, launch: LaunchSettings = ALONE, *, document_mask: bool = False
) -> MemoryNeed:
    config = load_config(arguments, None)
    build = build_for(arguments, stand_in_for(arguments))
    return estimate_memory(
        outline_of(build, arguments, launch, config, "cpu"),
        arguments,
        launch,
        resolve_batch_sizes(arguments, launch.data_parallel_size),
        BLOCK_SIZE,
        precision=arguments.mixed_precision,
        document_mask=document_mask,
    )


def measured(arguments: Arguments, *, document_mask: bool = False) -> int:
    """Bytes at the peak of a step."""
    batch = resolve_batch_sizes(arguments, 1)
    build = build_for(arguments, stand_in_for(arguments))
    network = build(arguments, ALONE, load_config(arguments, None))
    optimizer = build_optimizer(network, arguments, "cpu")
    rows = make_rows(batch, document_mask=document_mask)
    step(network, optimizer, rows, batch, arguments)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(network, optimizer, rows, batch, arguments)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    steady = sum(t.nbytes for t in [*network.parameters(), *state])
    return steady + peak_of(profiler)


def make_rows(batch: BatchSizes, *, document_mask: bool) -> dict[str, Tensor]:
    ids = torch.arange(batch.per_device * BLOCK_SIZE).view(-1, BLOCK_SIZE) % VOCAB_SIZE
    rows = {"input_ids": ids, "labels": ids.clone()}
    if document_mask:
        rows["position_ids"] = (torch.arange(BLOCK_SIZE) % (BLOCK_SIZE // 2)).expand_as(ids)
    return rows


def step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: dict[str, Tensor],
    batch: BatchSizes,
    arguments: Arguments,
) -> None:
    for _ in range(batch.accumulation):
        is_half = arguments.mixed_precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss, _ = network(**rows)
        (loss * 1e-3).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_of(profiler: profile) -> int:
    """The most bytes that were allocated at once since it began."""
    kineto: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("gpt2", {"mixed_precision": "bf16", "chunked_loss": True, "dropout": 0.1}),
        ("gpt2", {"attn_implementation": "eager", "optim": "muon"}),
        ("llama", {"mixed_precision": "bf16"}),
        ("llama", {"gradient_checkpointing": True, "chunked_loss": True}),
        ("llama", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("llama", {"per_device_train_batch_size": 1}),
        ("llama", {"mixed_precision": "bf16", "lora_rank": 4}),
        ("llama", {"mixed_precision": "bf16", "lora_rank": 4, "frozen_dtype": "bfloat16"}),
        (
            "gpt2",
            {
                "mixed_precision": "bf16",
                "lora_rank": 4,
                "frozen_dtype": "bfloat16",
                "per_device_train_batch_size": 1,
            },
        ),
    ],
)
def test_a_step_takes_what_was_told(kind: str, changes: dict[str, Any]) -> None:
    arguments = settings(kind, **changes)
    assert computed(arguments).peak == pytest.approx(measured(arguments), rel=0.15)


def test_so_it_does_under_a_document_mask() -> None:
    arguments = settings("llama")
    need = computed(arguments, document_mask=True)
    assert need.peak == pytest.approx(measured(arguments, document_mask=True), rel=0.15)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_optimizer_keeps_so_much(optim: str) -> None:
    arguments = settings("llama", optim=optim, per_device_train_batch_size=1)
    network = build_for(arguments, Accelerator(cpu=True))(
        arguments, ALONE, load_config(arguments, None)
    )
    optimizer = build_optimizer(network, arguments, "cpu")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [t.nbytes for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
    assert optimizer_bytes(network, optim) == sum(kept)


def test_8_bit_moments_are_those_of_large_matrices_alone() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
    assert optimizer_bytes(model, "adamw_8bit") == 8 * (6400 + 128) + 4096 * (2 + 8 / 256)


def zero(stage: int, **more: Any) -> LaunchSettings:
    config = {"zero_optimization": {"stage": stage, **more}}
    return LaunchSettings("deepspeed", num_processes=2, deepspeed_config=config)


def test_the_launch_says_what_is_cut() -> None:
    assert backend_of(ALONE) == "single"
    assert backend_of(LaunchSettings("ddp", num_processes=2)) == "ddp"
    assert backend_of(LaunchSettings("fsdp", num_processes=2)) == "fsdp"
    assert [backend_of(zero(stage)) for stage in (1, 2, 3)] == ["zero1", "zero2", "zero3"]
    assert not offloads(zero(3))
    assert offloads(zero(3, offload_param={"device": "cpu"}))


def test_pieces_are_smaller_but_blocks_are_whole_for_a_moment() -> None:
    arguments = settings("llama", per_device_train_batch_size=4)
    alone, ddp = computed(arguments), computed(arguments, LaunchSettings("ddp", num_processes=2))
    fsdp = computed(arguments, LaunchSettings("fsdp", num_processes=2))
    assert ddp.exchange == ddp.weights and ddp.peak == alone.peak + ddp.exchange
    assert (2 * fsdp.weights, 2 * fsdp.optimizer) == (alone.weights, alone.optimizer)
    assert 0 < fsdp.gathered < alone.weights + fsdp.gathered // 2
    assert fsdp.activations == alone.activations
    kept = computed(arguments, zero(3, offload_param={"device": "cpu"}))
    count = alone.weights // 4
    assert kept.on_host == 24 * count // 2  # docs/launching.md: 24 / N in fp32
    assert kept.peak == kept.gathered + (kept.activations or 0)


def test_backends_that_compute_with_weights_in_16_bits_keep_fewer_activations() -> None:
    arguments = settings("llama", mixed_precision="bf16")
    alone = computed(arguments)
    for launch in (LaunchSettings("fsdp", num_processes=2), zero(1), zero(2), zero(3)):
        need = computed(arguments, launch)
        assert need.remark == ""
        assert 0 < (need.activations or 0) < 0.9 * (alone.activations or 0)
    split = computed(arguments, LaunchSettings("ddp", num_processes=2, tp_size=2))
    assert (split.activations, split.gathered) == (alone.activations, 0)
    assert "fewer" in split.remark


def test_two_blocks_and_what_is_outside_are_whole() -> None:
    arguments = settings("llama")
    network = build_for(arguments, Accelerator(cpu=True))(
        arguments, ALONE, load_config(arguments, None)
    )
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128
    assert gathered_parameters(network) == 2 * VOCAB_SIZE * 128 + 128 + 2 * block


def test_what_does_not_fit_names_what_to_change() -> None:
    arguments = settings("llama", chunked_loss=False)
    need = computed(arguments)
    assert list(memory_problems(need, need.peak, arguments, ALONE, "cpu")) == []
    (problem,) = memory_problems(need, need.peak - 1, arguments, ALONE, "cuda")
    for advice in ("per_device_train_batch_size", "gradient_checkpointing", "chunked_loss"):
        assert f"--{advice}" in problem
    small = settings("llama", per_device_train_batch_size=1, gradient_checkpointing=True)
    ddp = LaunchSettings("ddp", num_processes=2)
    (problem,) = memory_problems(computed(small, ddp), 0, small, ddp, "cuda")
    assert "accelerate_configs/fsdp.yaml" in problem


def test_an_evaluation_with_more_rows_counts() -> None:
    alike = computed(settings("gpt2", per_device_train_batch_size=1))
    large = settings("gpt2", per_device_train_batch_size=1, per_device_eval_batch_size=64)
    assert computed(large).peak > 2 * alike.peak
