"""Windows for a GPU: the next one read and pinned while a step computes, copied without waiting.

A GPU stands idle whenever it has done all that the host has launched so far. So a step should begin
with its rows at hand, and no copy should keep the host from launching what follows it.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_training.data.rows.store_rows import Batch
from llm_training.data.rows.streaming import StreamWindows
from llm_training.data.rows.windows import TrainingWindows

CLOSE_SECONDS = 0.9


class Windows(Protocol):
    """What the loop asks of its training data; each as of `TrainingWindows`."""

    @property
    def document_mask(self) -> bool: ...

    def window(self, position: int) -> list[Batch]: ...

    def sample_ids(self, position: int) -> NDArray[np.int64]: ...

    def run_until(self, num_samples: int) -> None: ...

    def state(self, position: int) -> dict[str, Any] | None: ...

    def account_lines(self) -> list[str]: ...

    def close(self) -> None: ...


def prepare_for_device(windows: TrainingWindows | StreamWindows, device: torch.device) -> Windows:
    """The same windows in the form in which `device` gets them soonest.

    Only a GPU gains. A CPU computes with the cores that would read ahead, and has no copy to make;
    what it reads costs it next to nothing, as the token store is mapped into memory.
    """
    if device.type != "cuda":
        return windows
    if isinstance(windows, StreamWindows):
        # A stream's window is an exchange between all ranks, which no other thread may start
        # beside those of the loop; a thread of its own reads the documents ahead anyway.
        return PinnedWindows(windows)
    return WindowsAhead(windows, torch.cuda.current_device())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; what is pinned is copied while the host goes on.

    Without that, each copy would wait for all that the GPU still has to compute. The pinned tensors
    need not be kept: torch notes the stream that copies from them, and uses their memory again only
    once that stream has done so.

    Source: ATen/core/CachingHostAllocator.h, note "HostAllocator design"; `copy_kernel_cuda` in
        ATen/native/cuda/Copy.cu, which records the stream.
    """
    return {
        name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in batch.items()
    }


def pin(tensor: Tensor) -> Tensor:
    """A copy in memory that never moves, which a GPU reads by itself; the same where it is that."""
    return tensor.pin_memory()


class PinnedWindows:
    """Windows whose batches are pinned by the thread that asks for them.

    Args:
        windows: the same, not pinned.
    """

    _windows: Windows

    def __init__(self, windows: Windows):
        self._windows = windows

    @property
    def document_mask(self) -> bool:
        """Whether tokens see their own document alone."""
        return self._windows.document_mask

    def window(self, position: int) -> list[Batch]:
        """As of the windows within, in pinned memory."""
        return _read(self._windows, position)

    def sample_ids(self, position: int) -> NDArray[np.int64]:
        """As of the windows within."""
        return self._windows.sample_ids(position)

    def run_until(self, num_samples: int) -> None:
        """Moves the end of the run."""
        self._windows.run_until(num_samples)

    def state(self, position: int) -> dict[str, Any] | None:
        """As of the windows within."""
        return self._windows.state(position)

    def account_lines(self) -> list[str]:
        """As of the windows within."""
        return self._windows.account_lines()

    def close(self) -> None:
        """Nothing can be read any more."""
        self._windows.close()


class WindowsAhead(PinnedWindows):
    """Pinned windows, of which a thread reads the one that most likely comes next.

    That is the one behind the last that was given, and with it the numbers of its samples. Any
    other is read when it is asked for, and the one read ahead is thrown away, so what is given
    never depends on the thread. It draws no random number. The threads share the rows, which nobody
    changes; the windows themselves are replaced when the run's end moves, and not changed, so that
    the thread needs no lock on them.

    Args:
        windows: the same, neither pinned nor read ahead.
        device: number of the GPU that they are for; None: no GPU, as in tests.
    """

    _windows: TrainingWindows

    def __init__(self, windows: TrainingWindows, device: int | None):
        super().__init__(replace(windows))
        self._device = device
        self._step_size = windows.num_ranks * windows.num_micro_batches * windows.micro_batch_size
        self._ahead: _Reading | None = None  # of the window that most likely comes next
        self._ids: _SampleIds | None = None  # of the last window that was given
        self._orders: SimpleQueue[_Reading | None] = SimpleQueue()
        # A daemon: a file system that hangs must not keep the process from ending. It knows its
        # orders only, so that it keeps nothing else in memory.
        self._thread = threading.Thread(
            target=_carry_out, args=(self._orders,), name="windows", daemon=True
        )
        self._thread.start()

    def window(self, position: int) -> list[Batch]:
        """As of the windows within, in pinned memory.

        Raises:
            Exception: whatever reading this window raised, on whichever thread it was.
        """
        assert self._thread.is_alive(), "the windows are closed"
        ahead, self._ahead, self._ids = self._ahead, None, None
        if ahead is not None and ahead.is_of(self._windows, position):
            window, self._ids = ahead.result.result()
        else:
            if ahead is not None:
                ahead.result.cancel()  # where it has not begun, it need not be read at all
            window = _read(self._windows, position)
        self._read_ahead(position + self._step_size)
        return window

    def _read_ahead(self, position: int) -> None:
        if position < self._windows.num_samples:
            self._ahead = _Reading(self._windows, position, self._device)
            self._orders.put(self._ahead)

    def sample_ids(self, position: int) -> NDArray[np.int64]:
        """The row numbers of the whole step that begins at `position`, over all ranks."""
        if self._ids is not None and self._ids.is_of(self._windows, position):
            return self._ids.rows
        return super().sample_ids(position)

    def run_until(self, num_samples: int) -> None:
        """Moves the end of the run, when samples were passed over and others take their place."""
        if num_samples != self._windows.num_samples:
            self._windows = replace(self._windows, num_samples=num_samples)

    def close(self) -> None:
        """Ends reading ahead; nothing can be read any more."""
        if self._ahead is not None:
            self._ahead.result.cancel()
            self._ahead = None
        self._orders.put(None)
        self._thread.join(CLOSE_SECONDS)
        super().close()


@dataclass(frozen=True)
class _Place:
    """A step of the windows as they were when it was read."""

    windows: TrainingWindows
    position: int

    def is_of(self, windows: TrainingWindows, position: int) -> bool:
        """Whether it is the step at `position` of these windows, unchanged since."""
        return self.windows is windows and self.position == position


@dataclass(frozen=True)
class _SampleIds(_Place):
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Reading(_Place):
    """One step to be read: ordered by the loop, carried out by the thread."""

    device: int | None
    result: Future[tuple[list[Batch], _SampleIds]] = field(default_factory=Future)

    def carry_out(self) -> None:
        """Reads the step, unless it was called off; an error goes to who waits for it."""
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            if self.device is not None:
                # A new thread stands on the first GPU, and would take memory there on every rank.
                torch.cuda.set_device(self.device)
            ids = _SampleIds(self.windows, self.position, self.windows.sample_ids(self.position))
            self.result.set_result((_read(self.windows, self.position), ids))
        except BaseException as error:
            self.result.set_exception(error)


def _read(windows: Windows, position: int) -> list[Batch]:
    return [
        {name: pin(tensor) for name, tensor in batch.items()} for batch in windows.window(position)
    ]


def _carry_out(orders: SimpleQueue[_Reading | None]) -> None:
    while (order := orders.get()) is not None:
        order.carry_out()
        del order  # and with it its window, before the next order is waited for
