"""How fast a run goes, and how long it will take: plain numbers in, plain numbers out."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Steady speed over one logging interval, pauses left out.

    Attributes:
        tokens_per_second: of all processes.
        step_seconds: mean of the steps, each from the end of the one before.
        data_wait_ratio: share of that time in which this process's loop stood still for its next
            window, 0 to 1. It is the host's wait: what a GPU still had to compute meanwhile is not
            taken off, so there it is the most that faster data could save, and near 0 means that
            data costs nothing.
    """

    tokens_per_second: float
    step_seconds: float
    data_wait_ratio: float


class Throughput:
    """A meter of steady training speed, read once per logging interval.

    A reading covers the steps since the one before it and nothing else: neither the start of the
    process nor the time inside `paused()`. Where the device works asynchronously, the caller waits
    for it before the last `update` of an interval; fetching the loss does.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Takes a clock in seconds; tests bring their own."""
        self._clock = clock
        self._recent_seconds_per_step: deque[float] = deque(maxlen=9)
        self.start()

    def start(self) -> None:
        """Begins to measure now: call it right before the first step."""
        self._mark = self._clock()
        self._tokens = 0
        self._steps = 0
        self._seconds = 0.0
        self._waited_seconds = 0.0
        self._open_wait_seconds = 0.0  # in the step that is not counted yet

    def update(self, tokens: int) -> None:
        """Counts one finished optimizer step over `tokens` tokens (of all processes)."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now
        self._waited_seconds += self._open_wait_seconds
        self._open_wait_seconds = 0.0
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts its time as waiting for data; not for use inside `paused()`."""
        began = self._clock()
        try:
            yield
        finally:
            self._open_wait_seconds += self._clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of evaluating, saving and the like; may be nested."""
        mark, began = self._mark, self._clock()
        try:
            yield
        finally:
            self._mark = mark + self._clock() - began

    def read(self) -> Reading | None:
        """The speed since the last reading, and a new interval begins.

        None where no step was counted, or no time passed.
        """
        tokens, steps, seconds = self._tokens, self._steps, self._seconds
        waited_seconds = self._waited_seconds
        self._tokens, self._steps, self._seconds, self._waited_seconds = 0, 0, 0.0, 0.0
        if steps == 0 or seconds <= 0:
            return None
        step_seconds = seconds / steps
        self._recent_seconds_per_step.append(step_seconds)
        return Reading(tokens / seconds, step_seconds, waited_seconds / seconds)

    def seconds_left(self, steps_left: int) -> float | None:
        """Seconds that so many more steps take, pauses not included; None before a reading.

        The median of the last intervals: one slow interval (compilation, a busy machine) does not
        move it, a lasting change of speed does.
        """
        if not self._recent_seconds_per_step:
            return None
        return steps_left * statistics.median(self._recent_seconds_per_step)


def format_duration(seconds: float) -> str:
    """Seconds for the eye: `1:52`, `2:03:04`, `3 d 04 h`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def format_count(count: float) -> str:
    """A count or a rate for the eye: `950`, `9.1k`, `123k`, `1.3M`, `2B`."""
    units = ["", "k", "M", "B", "T"]
    # 999.5 and not 1000: what would be rounded to 1000k is 1M.
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    digits = f"{count:.1f}" if abs(count) < 99.95 else f"{count:.0f}"
    return digits.removesuffix(".0") + units[0]
