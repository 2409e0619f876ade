"""The memory that a model's own passes take, found without taking it.

The model computes on tensors that have a shape and no content, while every piece of memory that
it would have taken is counted from its birth to its end. So the number holds for every
architecture, attention kernel and loss, and with recomputed activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NONZERO = torch.ops.aten.nonzero.default


class TraceError(RuntimeError):
    """The model cannot compute without content; the message says why."""


@dataclass(frozen=True)
class TracedBytes:
    """Peaks of one forward and backward pass, weights not counted.

    Attributes:
        activations: what is kept for the backward pass and what is at work, gradients of the
            weights left out.
        with_gradients: the same and the gradients, which come while activations go.
    """

    activations: int
    with_gradients: int


@dataclass(frozen=True)
class Passes:
    """What is computed.

    Attributes:
        rows, positions: the shape of `input_ids`, of one device.
        half: the type of matrix products; None for float32.
        weights_are_half: whether a backend has put the weights into that type already.
        document_mask: whether positions begin anew within a row.
        is_training: whether a backward pass follows.
    """

    rows: int
    positions: int
    half: torch.dtype | None = None
    weights_are_half: bool = False
    document_mask: bool = False
    is_training: bool = True

    def of_evaluation(self, rows: int) -> Passes:
        """The same without a backward pass, with so many rows."""
        return replace(self, rows=rows, is_training=False)


class Outline:
    """A model without content, which `build` makes as it would make a real one."""

    def __init__(self, build: Callable[[], nn.Module]):
        """Calls `build`; neither memory nor a random number is taken."""
        self._mode = FakeTensorMode()
        with torch.random.fork_rng(devices=[]), self._mode:
            self.model = build()

    def trace(self, passes: Passes) -> TracedBytes:
        """Counts what these passes take.

        Raises:
            TraceError: the model looks at the content of its tensors.
        """
        try:
            with torch.random.fork_rng(devices=[]), self._mode:
                return _trace(self.model, passes)
        # Models are made by others, and fail here in as many ways as there are operations.
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise TraceError(f"{type(error).__name__}: {reason}") from error


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that are made inside, while they live."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self._sizes = {_key(tensor): 0 for tensor in known}
        self._gradients: set[int] = set()
        self._now = self._now_gradients = 0
        self.peak = self.peak_with_gradients = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is NONZERO:  # how many there are is content: all of them, as in full rows
            made = torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        else:
            made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return made

    def take_gradient(self, parameter: Tensor) -> None:
        """Lets the gradient of a parameter count as one, now that it is whole."""
        if parameter.grad is not None and (key := _key(parameter.grad)) not in self._gradients:
            self._gradients.add(key)
            self._now -= self._sizes.get(key, 0)
            self._now_gradients += self._sizes.get(key, 0)

    def _note(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        self.peak_with_gradients = max(self.peak_with_gradients, self._now + self._now_gradients)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.discard(key)
            self._now_gradients -= size
        else:
            self._now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _trace(model: nn.Module, passes: Passes) -> TracedBytes:
    if passes.weights_are_half:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(passes.half)
    shape = (passes.rows, passes.positions)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
    if passes.document_mask:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    live = _LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])
    hooks = [
        parameter.register_post_accumulate_grad_hook(live.take_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    computes_half = passes.half is not None
    try:
        with live, torch.set_grad_enabled(passes.is_training):
            with torch.autocast("cpu", passes.half or torch.bfloat16, enabled=computes_half):
                loss, _ = model(**batch)
            if passes.is_training:
                (loss * 0.5).backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return TracedBytes(live.peak, live.peak_with_gradients)
