"""Finds the places at which the host asks the device for a number, and would wait on a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A number for Python; what has a length that only the device knows; a comparison for Python.
WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)


class HostWaits(TorchDispatchMode):
    """Inside, `places` gets the line of our code or of a library for every such question.

    Args:
        beside: a function whose questions do not count, since its tensors lie on the host.
    """

    def __init__(self, beside: str = "") -> None:
        super().__init__()
        self.beside = beside
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            if self.beside not in {frame.name for frame in frames}:
                self.places.append(f"{frames[-2].filename}:{frames[-2].lineno}")
        return func(*args, **(kwargs or {}))

    def take(self) -> list[str]:
        """What was found since the last call."""
        places, self.places = self.places, []
        return places
