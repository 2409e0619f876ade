"""A tracker whose failures, and whose slowness, cost a warning and not the training."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm_training.tracking.errors import TrackingError, first_line
from llm_training.tracking.tracked_run import Point, Status, TrackedRun

# What is logged meanwhile goes in one transaction: one for each point costs MLflow's SQLite store
# milliseconds of Python, which the loop would wait for even though another thread spends them.
SEND_INTERVAL_SECONDS = 2.0
# After a failure a tracker is left alone for a while.
FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 600.0
MAX_WAITING_POINTS = 20_000  # about 20 MB
HANG_SECONDS = 60.0  # longer than any tracker waits by itself for what does not answer
POINTS_SHARE = 0.7  # of the time that is left at the end; the rest is for artifacts and status


class SteadyTracker:
    """Sends the points of one run to one tracker, from a thread of its own.

    `log` only queues: a tracker that is slow, fails or hangs for hours costs the loop nothing. When
    it fails the points wait, and follow when it answers. The thread alone touches the tracker; it
    is a daemon, so one that hangs does not keep the process from ending.
    """

    def __init__(
        self,
        run: TrackedRun,
        say: Callable[[str], None],
        earlier: Sequence[Point] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes a run that is to be started.

        Args:
            run: the tracker's side of it.
            say: where to warn; called from any thread.
            earlier: what was logged before a resume, of which the tracker may lack a part.
            clock: in seconds.
        """
        self.name = run.name
        self._run = run
        self._say = say
        self._earlier = earlier
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Point] = deque()
        self._in_flight: list[Point] = []
        self._num_earlier = 0  # of those waiting at first, beyond what the queue may hold
        self._num_single = 0  # points to be sent alone: one of them spoilt a transaction
        self._num_failures = 0
        self._num_lost = 0
        self._is_required = False
        self._is_started = False
        self._is_told = False
        self._start_error: Exception | None = None
        self._was_tried = threading.Event()
        self._busy_since: float | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._next_at = -math.inf
        self._end: tuple[Status, Sequence[Path]] | None = None
        self._send_until = math.inf
        self._thread = threading.Thread(target=self._work, name=f"to {self.name}", daemon=True)

    # ---------------------------------------------------------------------- for the loop's thread

    def start(self, *, is_required: bool) -> None:
        """Waits until the run is started, or the first try has failed.

        Raises:
            Exception: as `run.start` did, where it is required or a mistake in the settings. Else
                it is told and tried again later.
        """
        self._is_required = is_required
        self._thread.start()
        self._was_tried.wait()
        if self._start_error and self._must_end_for(self._start_error):
            raise self._start_error

    def log(self, point: Point) -> None:
        """Queues a point; drops the oldest of too many."""
        with self._changed:
            self._waiting.append(point)
            self._drop_oldest()
            if len(self._waiting) == 1:
                self._changed.notify()
        busy_since = self._busy_since
        if busy_since is not None and self._clock() - busy_since > HANG_SECONDS:
            self._warn(f"has not answered for {HANG_SECONDS:.0f} s")

    @property
    def num_unsent(self) -> int:
        """How many points wait or are on their way."""
        with self._changed:
            return len(self._waiting) + len(self._in_flight)

    def begin_end(self, status: Status, artifacts: Sequence[Path], seconds: float) -> None:
        """Asks for the end: within `seconds`, first what waits, then artifacts and status."""
        with self._changed:
            self._end = status, artifacts
            self._send_until = self._clock() + POINTS_SHARE * seconds
            self._changed.notify()

    def wait_for_end(self, seconds: float) -> None:
        """Waits so long for the end that was asked for, and tells what is missing then."""
        self._thread.join(max(0.0, seconds))
        self.tell_losses()

    def tell_losses(self) -> None:
        """At the end: how often the tracker failed, and what it is missing."""
        num_missing = self.num_unsent + self._num_lost
        is_silent = self._thread.is_alive()
        if not (self._num_failures or num_missing or is_silent or self._start_error):
            return
        missing = [f"{num_missing} logged points"] if num_missing else []
        if is_silent:
            reason = "does not answer"
            missing.append("how the run ended")
        elif not self._is_started:
            reason = "could not be started"
        elif self._num_failures or self._start_error:
            reason = f"failed {self._num_failures + bool(self._start_error)} times"
        else:
            reason = "is too slow"
        what = " and ".join(missing) or "no metrics"
        self._say(f"warning: {self.name} {reason}; {what} are missing there")

    # -------------------------------------------------------------------- on the tracker's thread

    def _work(self) -> None:
        try:
            self._try_to_start()
        finally:
            self._was_tried.set()
        if self._start_error and self._must_end_for(self._start_error):
            return
        while (pause := self.turn()) is not None:
            with self._changed:
                if self._end is None and (pause or not self._waiting):
                    self._changed.wait(pause or None)

    def turn(self) -> float | None:
        """Does what is due; returns the seconds until the next turn.

        0 is as soon as something is logged, None after the end.
        """
        if self._end is not None:
            self._finish(*self._end)
            return None
        if self._clock() >= self._next_at and (self._is_started or self._try_to_start()):
            if not self._waiting:
                return 0.0
            if self.send_waiting():
                self._next_at = self._clock() + SEND_INTERVAL_SECONDS
        return max(0.01, self._next_at - self._clock())

    def _try_to_start(self) -> bool:
        self._busy_since = self._clock()
        try:
            self._run.start()
            missing = self._run.missing(self._earlier)
        except Exception as error:  # of whatever library
            is_first = self._start_error is None
            self._start_error = error
            self._leave_alone()
            if is_first and not self._must_end_for(error):
                self._is_told = True
                self._say(
                    f"warning: {self.name} could not be started ({first_line(error)}). Training"
                    f" goes on with train_log.jsonl alone, and {self.name} is tried again later."
                )
            return False
        finally:
            self._busy_since = None
        if self._start_error:
            self._say(f"{self.name} answers now, and gets what was logged before")
        with self._changed:
            self._waiting.extendleft(reversed(missing))
            self._num_earlier = len(missing)
        self._earlier = ()
        self._is_started = True
        return True

    def _must_end_for(self, error: Exception) -> bool:
        return self._is_required or isinstance(error, TrackingError)

    def send_waiting(self) -> bool:
        """Sends what waits, the oldest first, until nothing does (true) or the tracker fails."""
        while self._clock() < self._send_until:
            size = 1 if self._num_single else self._run.points_at_once
            with self._changed:
                take = min(size, len(self._waiting))
                points = self._in_flight = [self._waiting.popleft() for _ in range(take)]
            if not points:
                return True
            if self.attempt(partial(self._run.send, points)):
                self._in_flight = []
                self._num_single = max(0, self._num_single - 1)
                self._pause_seconds = FIRST_PAUSE_SECONDS
                continue
            self._put_back(points)
            if len(points) == 1:
                self._leave_alone()
                return False
            self._num_single = len(points)  # one of them may be at fault and not the tracker
        return False

    def _put_back(self, points: list[Point]) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(points))
            if len(points) == 1:
                # Should this one be at fault itself, it must not hold up the others next time.
                self._waiting.rotate(-1)
            self._in_flight = []
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._waiting) > MAX_WAITING_POINTS + self._num_earlier:
            self._waiting.popleft()
            self._num_lost += 1

    def _leave_alone(self) -> None:
        self._next_at = self._clock() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _finish(self, status: Status, artifacts: Sequence[Path]) -> None:
        if not (self._is_started or self._try_to_start()):
            return
        is_answering = self.send_waiting()
        for call in self._run.closing_calls(status, artifacts if is_answering else ()):
            self.attempt(call)

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Whether the call went through; the first that does not is told."""
        self._busy_since = self._clock()
        try:
            call()
        except Exception as error:  # whatever it is: the training is worth more
            self._num_failures += 1
            self._warn(f"failed ({first_line(error)})")
            return False
        finally:
            self._busy_since = None
        return True

    def _warn(self, what: str) -> None:
        if not self._is_told:
            self._is_told = True
            self._say(
                f"warning: {self.name} {what}. Training goes on, train_log.jsonl stays complete,"
                " and the metrics are sent again later."
            )
