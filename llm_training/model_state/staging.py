"""Memory of this machine into which the tensors of a checkpoint are copied, while the run waits.

New memory is slow: the system clears every page at its first touch, which takes many times as long
as the copy. So it is kept from one checkpoint to the next, and asked for in large pages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from llm_training.model_state.form import SaveError

ALIGNMENT = 64  # bytes, as torch's own allocator gives
MEMORY_INFO = Path("/proc/meminfo")

Place = tuple[Any, ...]


class StagingMemory:
    """Copies of trees of tensors, by name; each is as long as the next copy under its name is not.

    It keeps as many bytes as the largest tree of each name had.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Any] = {}  # of bytes, writable

    def copy(self, name: str, tree: Any) -> Any:
        """The same tree with tensors in this memory, which nothing else changes.

        What shares memory in the tree shares it in the copy too, so that both make the same file.

        Raises:
            SaveError: there is too little memory.
        """
        tensors = {_place(tensor): tensor for tensor in _tensors(tree)}
        offsets, size = {}, 0
        for place, tensor in tensors.items():
            offsets[place] = size
            size += -(-_num_bytes(tensor) // ALIGNMENT) * ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        buffer = self._buffer(name, size, on_gpu)
        copies = {
            place: _copy_into(buffer, offsets[place], tensor) for place, tensor in tensors.items()
        }
        # Two tensors on one memory stay two: a pickle tells them from one that is there twice.
        made = {id(tensor): copies[_place(tensor)].detach() for tensor in _tensors(tree)}
        return tree_map(lambda leaf: made[id(leaf)] if isinstance(leaf, Tensor) else leaf, tree)

    def _buffer(self, name: str, size: int, on_gpu: bool) -> Any:
        kept = self._buffers.get(name)
        if kept is not None and len(kept) >= size:
            return kept
        self._buffers.pop(name, None)
        free = free_memory()
        if free is not None and free < size:
            raise SaveError(
                f"--async_save needs {size:,} bytes of memory for {name}, and {free:,} are free."
                " Leave --async_save out, or give the run more memory."
            )
        self._buffers[name] = _allocate(max(size, 1), on_gpu)
        return self._buffers[name]


def free_memory() -> int | None:
    """Bytes that this machine can give without taking any away; None where it does not say."""
    try:
        lines = MEMORY_INFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _allocate(size: int, on_gpu: bool) -> Any:
    if on_gpu:  # locked pages: a GPU copies into others at a fraction of the speed
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
    buffer = mmap.mmap(-1, size)
    with suppress(AttributeError, OSError):  # only Linux, and not every one
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> Place:
    """The same for tensors that are one in memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _copy_into(buffer: Any, offset: int, tensor: Tensor) -> Tensor:
    """A copy with a storage of its own, which `torch.save` writes and nothing beside it."""
    if tensor.numel() == 0:
        return torch.empty_like(tensor, device="cpu")
    flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    # `empty_like` keeps the order of the dimensions in memory, as a file would.
    strides = torch.empty_like(tensor, device="meta").stride()
    return flat.as_strided(tensor.shape, strides).copy_(tensor.detach())
