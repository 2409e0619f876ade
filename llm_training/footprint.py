"""What a run needs of each device and of the links between them, before it begins: plain numbers.

Estimates for planning: weights, gradients and moments are exact, activations within some 20%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class StateParts:
    """Bytes for each parameter on each process.

    Attributes:
        weights: those that are updated, and those that compute where they are others.
        buffers: in which gradients travel.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its needs.

    Attributes:
        parameters: all of them.
        layers, hidden, intermediate: blocks, width of the stream, width of the feed-forward part.
        matrices_in_mlp: 2 for GPT-2, 3 for Llama's gated form.
        vocabulary: rows of the embedding table.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    matrices_in_mlp: int
    vocabulary: int

    @property
    def largest_block(self) -> int:
        """Parameters of one block, all others alike."""
        return 4 * self.hidden**2 + self.matrices_in_mlp * self.hidden * self.intermediate


def state_bytes_per_parameter(
    backend: Backend, processes: int, *, is_half: bool = True, accumulates: bool = False
) -> float:
    """Bytes of weights, gradients and AdamW's moments on each process, for each parameter.

    The numbers of docs/launching.md, measured there for two processes.

    Args:
        is_half: whether the forward pass computes in bf16 or fp16; the weights stay fp32.
        accumulates: whether a step has several micro-batches.
    """
    return state_parts(backend, processes, is_half=is_half, accumulates=accumulates).total


def state_parts(
    backend: Backend,
    processes: int,
    *,
    is_half: bool = True,
    accumulates: bool = False,
    moments: float = 8.0,
) -> StateParts:
    """The same bytes by what they are for.

    Args:
        moments: bytes of an optimizer for each parameter, before they are cut in pieces: AdamW's
            two in fp32 take 8.
    """
    n, computing = processes, 2 if is_half else 4  # DeepSpeed keeps weights to compute with
    match backend:
        case "single":
            return StateParts(4, 4, moments)
        case "ddp":
            return StateParts(4, 4, moments, buffers=4)
        case "fsdp":
            return StateParts(4 / n, 4 if accumulates else 4 / n, moments / n)
        case "zero1":
            return StateParts(computing + 4 / n, computing, moments / n)
        case "zero2":
            return StateParts(computing + 4 / n, computing / n, moments / n)
        case "zero3":
            return StateParts((computing + 4) / n, computing / n, moments / n)


def frozen_bytes(backend: Backend, processes: int, *, is_half: bool = True) -> float:
    """Bytes on each process for each parameter that is not trained: weights alone."""
    computing = 2 if is_half else 4
    per_backend = {
        "fsdp": 4 / processes,
        "zero1": computing,
        "zero2": computing,
        "zero3": computing / processes,
    }
    return per_backend.get(backend, 4)


def working_bytes(shape: ModelShape, backend: Backend, *, is_half: bool = True) -> float:
    """Bytes of weights that are whole for a moment: of the block at work and the next one."""
    if backend not in ("fsdp", "zero3"):
        return 0.0
    table = shape.vocabulary * shape.hidden  # of the outermost part, whole throughout
    return (2 * shape.largest_block + table) * (2 if is_half else 4)


def activation_bytes(
    shape: ModelShape, tokens: int, *, is_half: bool = True, checkpointing: bool = False
) -> float:
    """Bytes kept for the backward pass of `tokens` tokens, with attention that keeps no scores.

    Each block keeps, for each token, the inputs of its norms and matrices: 34 bytes a dimension of
    the stream where the feed-forward part is four times as wide, in 16 bits. With checkpointing
    each keeps its input alone, and one block at a time is whole.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
    (arXiv:2205.05198), section 4.1, without the terms of the scores and the dropout masks.
    """
    width = 2 if is_half else 4
    streams = 8 * shape.hidden  # two norms in and out, q, k, v, and what attention gives
    inner = shape.matrices_in_mlp * shape.intermediate  # and their activation's input and output
    whole = width * (streams + inner) * tokens
    if not checkpointing:
        return shape.layers * whole
    return shape.layers * width * shape.hidden * tokens + whole


def exchanged_bytes(
    shape: ModelShape,
    backend: Backend,
    processes: int,
    *,
    micro_batches: int = 1,
    is_half: bool = True,
) -> float:
    """Bytes that each process sends in one step, by rings, as NCCL counts bus traffic.

    Weights travel in the precision that computes. Gradients travel in fp32 under DDP and FSDP2, as
    this project sets it, and in the precision that computes under DeepSpeed.
    """
    share = (processes - 1) / processes
    weights = shape.parameters * (2 if is_half else 4)
    whole = 4 * shape.parameters
    match backend:
        case "single":
            return 0.0
        case "ddp":  # all-reduce
            return 2 * share * whole
        case "fsdp":  # weights forward and backward in each micro-batch; gradients once
            return share * (2 * micro_batches * weights + whole)
        case "zero1":  # all-reduce of gradients, all-gather of weights
            return share * (2 * weights + weights)
        case "zero2":  # reduce-scatter in each backward pass, all-gather of weights
            return share * (micro_batches * weights + weights)
        case "zero3":
            return share * micro_batches * 3 * weights


def format_bytes(count: float) -> str:
    """Bytes for the eye, in powers of ten: `950 kB`, `1.25 GB`, `139 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"
