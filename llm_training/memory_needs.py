"""What a run needs of each device's memory, before any of it is taken.

docs/planning.md says how each number comes about, and how near it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from arguments import Arguments, BatchSizes
from llm_training.footprint import Backend, format_bytes, frozen_bytes, state_parts
from llm_training.frozen_dtype import held_bytes
from llm_training.launch_settings import LaunchSettings
from llm_training.optim import block_matrices, split_by_decay
from llm_training.traced_memory import Outline, Passes, TracedBytes, TraceError

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# adamw_8bit: two moments of a byte, and a scale of 4 bytes for each block of 256 numbers; smaller
# tensors stay in 32 bits.
EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)
EIGHT_BIT_FROM = 4096


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one device when they are most, computed.

    Attributes:
        weights, gradients, optimizer: of the model's state.
        exchange: buffers in which gradients travel.
        gathered: weights that are whole for a moment.
        activations: kept for the backward pass and at work; None where they are not known.
        peak: of all together; gradients come while activations go.
        on_host: in the memory of the CPU instead, where a backend offloads.
        remark: what the numbers leave out.
    """

    weights: int
    gradients: int
    optimizer: int
    exchange: int
    gathered: int
    activations: int | None
    peak: int
    on_host: int = 0
    remark: str = ""

    def line(self, free: int | None) -> str:
        """For a person, beside what the device has free."""
        names = ("weights", "gradients", "optimizer", "exchange", "gathered", "activations")
        parts = [f"{n} {format_bytes(size)}" for n in names if (size := getattr(self, n))]
        parts += [f"in the CPU's memory {format_bytes(self.on_host)}"] if self.on_host else []
        of = f" of {format_bytes(free)} free" if free is not None else ""
        remark = f"; {self.remark}" if self.remark else ""
        return f"Memory   {format_bytes(self.peak)} a device{of}: {', '.join(parts)}{remark}"


def estimate_memory(
    outline: Outline,
    arguments: Arguments,
    launch: LaunchSettings,
    batch: BatchSizes,
    block_size: int,
    *,
    precision: str,
    document_mask: bool = False,
) -> MemoryNeed:
    """What each device needs for a step and for an evaluation.

    Args:
        outline: of the network.
        precision: bf16, fp16, fp8 or fp32.
        document_mask: whether documents of a row do not see each other.
    """
    backend, half, model = backend_of(launch), HALF_TYPES.get(precision), outline.model
    count = _count([p for p in model.parameters() if p.requires_grad])
    accumulates = batch.accumulation > 1
    is_cut = backend in ("fsdp", "zero3") and launch.tp_size == 1
    num_pieces = max(launch.num_processes, launch.tp_size)
    frozen_weights = _frozen_bytes(model, backend, num_pieces, is_half=half is not None)
    state = state_parts(
        backend,
        num_pieces,
        is_half=half is not None,
        accumulates=accumulates,
        moments=optimizer_bytes(model, arguments.optim) / count,
    )
    gathered = gathered_parameters(model) * (2 if half else 4) if is_cut else 0
    passes = Passes(
        batch.per_device,
        block_size // launch.cp_size,
        half=half,
        weights_are_half=half is not None and (is_cut or backend in ("zero1", "zero2")),
        document_mask=document_mask,
    )
    steady, gradients = state.total * count + frozen_weights, state.gradients * count
    training, evaluating, remark = _trace(outline, passes, arguments.per_device_eval_batch_size)
    if training and backend in ("single", "ddp") and not accumulates:
        peak = max(steady, steady - gradients + training.with_gradients)
    else:
        peak = steady + gathered + (training.activations if training else 0)
    if evaluating:
        peak = max(peak, steady - gradients + gathered + evaluating.activations)
    on_host = 0.0
    if offloads(launch):
        on_host = steady + 4 * count / launch.num_processes
        peak -= steady
    if launch.tp_size > 1:
        remark = remark or "activations as on one device, with more they are fewer"
    return MemoryNeed(
        weights=round(state.weights * count + frozen_weights),
        gradients=round(gradients),
        optimizer=round(state.optimizer * count),
        exchange=round(state.buffers * count),
        gathered=gathered,
        activations=training.activations if training else None,
        peak=round(peak),
        on_host=round(on_host),
        remark=remark,
    )


def _trace(
    outline: Outline, passes: Passes, eval_rows: int | None
) -> tuple[TracedBytes | None, TracedBytes | None, str]:
    """Of training; of an evaluation, where that has more rows at once; and why there is none."""
    try:
        training, evaluating = outline.trace(passes), None
        if eval_rows is not None and eval_rows > passes.rows:
            evaluating = outline.trace(passes.of_evaluation(eval_rows))
    except TraceError as error:
        return None, None, f"activations of this model are not known ({error})"
    return training, evaluating, ""


def backend_of(launch: LaunchSettings) -> Backend:
    """What cuts the state in pieces; tensor parallelism does so like FSDP2."""
    if launch.backend == "deepspeed":
        zero = (launch.deepspeed_config or {}).get("zero_optimization", {})
        stage = zero.get(
            "stage", launch.given["zero_stage"].value if "zero_stage" in launch.given else 2
        )
        stages: dict[int, Backend] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return stages.get(int(stage), "ddp")
    if launch.tp_size > 1 or launch.backend == "fsdp":
        return "fsdp"
    return "ddp" if launch.num_processes > 1 else "single"


def offloads(launch: LaunchSettings) -> bool:
    """Whether the state lies in the memory of the CPU."""
    zero = (launch.deepspeed_config or {}).get("zero_optimization", {})
    device = zero.get("offload_param", {}).get("device", "none")
    return launch.backend == "deepspeed" and device != "none"


def optimizer_bytes(model: nn.Module, optim: str) -> float:
    """Bytes that the optimizer keeps of all parameters, before they are cut in pieces."""
    decayed, kept = split_by_decay(model)
    if optim == "muon":  # one momentum in place of two moments
        return 8 * _count([*decayed, *kept]) - 4 * _count(block_matrices(model))
    if optim == "adamw_8bit":
        tables = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        small = [
            p for p in [*decayed, *kept] if id(p) not in tables and p.numel() >= EIGHT_BIT_FROM
        ]
        return 8 * _count([*decayed, *kept]) - (8 - EIGHT_BIT_BYTES) * _count(small)
    return 8 * _count([*decayed, *kept])


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _frozen_bytes(model: nn.Module, backend: Backend, num_pieces: int, *, is_half: bool) -> float:
    """What this process holds of weights that are not trained."""
    per_parameter = frozen_bytes(backend, num_pieces, is_half=is_half)
    if backend in ("zero1", "zero2", "zero3"):  # in the engine's type, whatever the model's is
        return per_parameter * _count([p for p in model.parameters() if not p.requires_grad])
    return per_parameter / 4 * held_bytes(model)  # of a number in float32


def gathered_parameters(model: nn.Module) -> int:
    """Of weights in pieces, those that are whole at once: two blocks, and all outside of blocks."""
    kinds = getattr(model, "_no_split_modules", None) or ()
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    inside = {id(p): p.numel() for block in blocks for p in block.parameters()}
    largest = max((_count(list(block.parameters())) for block in blocks), default=0)
    return _count(list(model.parameters())) - sum(inside.values()) + 2 * largest


def free_memory(device: torch.device, processes_here: int) -> int:
    """Bytes that one process can still take on its device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available) // processes_here


def memory_problems(
    need: MemoryNeed, free: int, arguments: Arguments, launch: LaunchSettings, device_type: str
) -> Iterator[str]:
    """Where the device is too small, with what to change: at most one sentence."""
    needed = need.peak + (need.on_host if device_type == "cpu" else 0)
    if needed <= free:
        return
    advice = []
    if (need.activations or 0) > need.peak / 4:
        advice.append(
            "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps"
        )
        if not arguments.gradient_checkpointing:
            advice.append("--gradient_checkpointing true")
        if arguments.chunked_loss is False:
            advice.append("--chunked_loss true")
    if need.weights + need.gradients + need.optimizer > need.peak / 4:
        if launch.num_processes > 1 and backend_of(launch) in ("ddp", "zero1", "zero2"):
            advice.append("accelerate_configs/fsdp.yaml")
        elif launch.num_processes == 1 and device_type != "cpu":
            advice.append("more devices with accelerate_configs/fsdp.yaml")
        advice.append("a smaller model")
    yield (
        f"Memory: each process needs about {format_bytes(needed)} of the {device_type}'s memory,"
        f" and {format_bytes(free)} are free ({need.line(None).partition(': ')[2]}). Try"
        f" {', or '.join(advice)}."
    )
