"""A tracker whose failures cost a warning, not the training."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_training.tracking.errors import first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# After a failure a tracker is left alone for a while: an outage costs one slow call now and then.
FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 600.0
MAX_WAITING_POINTS = 20_000  # about 20 MB


class SteadyTracker:
    """One of Accelerate's trackers. When it fails the points wait, and follow when it answers."""

    def __init__(
        self,
        tracker: GeneralTracker,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes a started tracker, where to warn, and a clock in seconds."""
        self.name = str(tracker.name)
        self.tracker = tracker
        self._say = say
        self._clock = clock
        self._waiting: deque[tuple[dict[str, float], int]] = deque()
        self._num_failures = 0
        self._num_lost = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._retry_at = -math.inf

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Sends the metrics of a step, or lets them wait while the tracker is left alone."""
        self._waiting.append((metrics, step))
        if len(self._waiting) > MAX_WAITING_POINTS:
            self._waiting.popleft()
            self._num_lost += 1
        if self._clock() >= self._retry_at:
            self.send_waiting()

    def send_waiting(self) -> bool:
        """Sends what waits, the oldest first, until nothing does (true) or the tracker fails."""
        while self._waiting:
            if not self.attempt(partial(self.tracker.log, *self._waiting[0])):
                # Should this point be at fault itself, it must not hold up the others next time.
                self._waiting.rotate(-1)
                self._retry_at = self._clock() + self._pause_seconds
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
                return False
            self._waiting.popleft()
            self._pause_seconds = FIRST_PAUSE_SECONDS
        return True

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Whether the call went through; the first that does not is told."""
        try:
            call()
        except Exception as error:  # whatever it is: the training is worth more
            self._num_failures += 1
            if self._num_failures == 1:
                self._say(
                    f"warning: {self.name} failed ({first_line(error)}). Training goes"
                    " on, train_log.jsonl stays complete, and the metrics are sent again later."
                )
            return False
        return True

    def tell_losses(self) -> None:
        """At the end: how often the tracker failed, and what it is missing."""
        if self._num_failures:
            num_missing = len(self._waiting) + self._num_lost
            missing = f"{num_missing} logged points are" if num_missing else "no metrics are"
            self._say(
                f"warning: {self.name} failed {self._num_failures} times; {missing} missing there"
            )
