"""Whether processes that should hold the same weights do: compared to the bit, by checksums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_training.model_state.form import plain_name

# Integers of the width of an element, to look at its bits.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = 2**22  # bounds the memory: a chunk is widened to 64 bits
CPU_CHUNK_ELEMENTS = 2**16  # fits into the cache of a core, which is five times as fast
CHUNK_FACTOR = 0x5851F42D4C957F2D  # odd, of Knuth's generator MMIX: multiplying loses no bit


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights do not: what they train is no one model any more."""


def has_replicas(accelerator: Accelerator) -> bool:
    """Whether any weights lie on several ranks as a whole, and could come to differ."""
    if accelerator.num_processes == 1:
        return False
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return int(accelerator.state.deepspeed_plugin.zero_stage) < 3
    if accelerator.distributed_type == DistributedType.FSDP:
        split = accelerator.parallelism_config
        return split is not None and split.dp_replicate_size > 1
    return True


def require_equal_replicas(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Passes where copies of the weights are equal; every rank must call this.

    Raises:
        ReplicaError: on every rank alike, naming what differs and what usually helps.
    """
    if (problem := differing_replicas(accelerator, model)) is not None:
        raise ReplicaError(
            f"After step {step}, {problem}. They trained different models since, so nothing was"
            " saved of it. The same command continues from the newest checkpoint; if it happens"
            " again, look at the memory and the device of that rank."
        )


@torch.no_grad()
def differing_replicas(accelerator: Accelerator, model: nn.Module) -> str | None:
    """Compares parameters and buffers over the ranks that should hold the same; all must call this.

    Args:
        model: as Accelerate has prepared it.

    Returns:
        In words, the first difference and how many tensors differ; the same on every rank. None:
        there is no difference, or there are no copies.
    """
    if not has_replicas(accelerator):
        return None
    named = [*model.named_parameters(), *model.named_buffers()]
    marks = torch.stack([mark(tensor, accelerator.device) for _, tensor in named])
    every = accelerator.gather(marks).view(accelerator.num_processes, len(named), 2)
    differing = [
        (plain_name(name), ranks)
        for (name, _), of_ranks in zip(named, every.unbind(1), strict=True)
        if (ranks := first_difference(of_ranks.tolist())) is not None
    ]
    if not differing:
        return None
    name, (rank, other) = differing[0]
    more = f" ({len(differing)} of {len(named)} tensors differ)" if len(differing) > 1 else ""
    return f"rank {rank} holds other values of {name} than rank {other}{more}"


def first_difference(of_ranks: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The first rank whose checksum is not that of the first rank with the same part, and that one.

    Args:
        of_ranks: `mark` of one tensor, rank by rank.
    """
    firsts: dict[int, tuple[int, int]] = {}
    for rank, (part, checksum) in enumerate(of_ranks):
        first, expected = firsts.setdefault(part, (rank, checksum))
        if checksum != expected:
            return rank, first
    return None


def mark(tensor: Tensor, device: torch.device) -> Tensor:
    """Which part of a tensor this rank holds, and the checksum of it: (2,) int64."""
    part = 0
    if isinstance(tensor, DTensor):
        part, tensor = part_number(tensor), tensor.to_local()
    return torch.stack([torch.tensor(part, device=device), checksum(tensor).to(device)])


def part_number(tensor: DTensor) -> int:
    """Numbers the parts of a tensor: ranks that hold copies of one part have the same number."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every rank holds a part of every weight
    number = 0
    for place, position, size in zip(tensor.placements, coordinate, mesh.shape, strict=True):
        if not place.is_replicate():
            number = number * size + position
    return number


def checksum(tensor: Tensor) -> Tensor:
    """A number of all bits of a tensor, () int64 on its device, modulo 2^64.

    Each element counts with an odd factor of its own: one that changes always shows, and so do two
    of a chunk that change places. Changes of many elements hide only where they cancel out.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in _chunks(tensor.detach().contiguous().view(-1)):
        factors = torch.arange(1, 2 * len(chunk), 2, device=tensor.device)
        total = total * CHUNK_FACTOR + (chunk * factors).sum()
    return total


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    """The bits of a flat tensor as integers, a chunk at a time."""
    size = CPU_CHUNK_ELEMENTS if flat.device.type == "cpu" else CHUNK_ELEMENTS
    bits = flat.view(BITS[flat.element_size()])
    for i in range(math.ceil(len(bits) / size)):
        yield bits[i * size : (i + 1) * size]
