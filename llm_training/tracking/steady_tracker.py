"""A tracker whose failures, and whose slowness, cost a warning and not the training."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llm_training.tracking.errors import TrackingError, first_line
from llm_training.tracking.tracked_run import Ending, Point, TrackedRun

# How long the start of a run waits for a tracker, whatever the tracker's own limits are.
START_SECONDS = 60.0
# What is logged meanwhile goes in one transaction: one for each point costs MLflow's SQLite store
# milliseconds of Python, which the loop would wait for even though another thread spends them.
SEND_INTERVAL_SECONDS = 10.0
# After a failure a tracker is left alone for a while.
FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 600.0
MAX_WAITING_POINTS = 20_000  # about 20 MB
HANG_SECONDS = 60.0  # longer than any tracker waits by itself for what does not answer
POINTS_SHARE = 0.7  # of the time that is left at the end; the rest is for artifacts and status


class SteadyTracker:
    """Sends the points of one run to one tracker, from a thread of its own.

    `log` and `flush` only queue: a tracker that is slow, fails or hangs for hours costs the loop
    nothing. When it fails the points wait, and follow when it answers; of more than fit into the
    queue the oldest are read from train_log.jsonl then. The thread alone touches the tracker; it is
    a daemon, so one that hangs does not keep the process from ending.
    """

    def __init__(
        self,
        run: TrackedRun,
        say: Callable[[str], None],
        earlier: Sequence[Point] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        read_log: Callable[[float, float], Iterable[Point]] = lambda first, last: (),
        remedy: str = "",
    ) -> None:
        """Takes a run that is to be started.

        Args:
            run: the tracker's side of it.
            say: where to warn; called from any thread.
            earlier: what was logged before a resume, of which the tracker may lack a part.
            clock: in seconds.
            read_log: what was logged between two Unix times, both included, from the log.
            remedy: what the user can do about what is missing at the end, as a sentence.
        """
        self.name = run.name
        self._run = run
        self._say = say
        self._earlier = earlier
        self._clock = clock
        self._read_log = read_log
        self._remedy = remedy
        self._changed = threading.Condition()
        self._waiting: deque[Point] = deque()
        self._in_flight: list[Point] = []
        self._num_earlier = 0  # of those waiting at first, beyond what the queue may hold
        self._num_single = 0  # points to be sent alone: one of them spoilt a transaction
        self._dropped: tuple[float, float] | None = None  # times of the first and the last
        self._num_dropped = 0
        self._from_log: Iterator[Point] = iter(())  # of those dropped
        self._uploads: Sequence[Path] = ()
        self._uploaded: dict[Path, tuple[int, int] | None] = {}
        self._num_failures = 0
        self._is_end_whole = False
        self._is_required = False
        self._is_started = False
        self._is_told = False
        self._start_error: Exception | None = None
        self._was_tried = threading.Event()
        self._busy_since: float | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._is_left_alone = False
        self._next_at = -math.inf
        self._end: tuple[Ending, Sequence[Path]] | None = None
        self._send_until = math.inf
        self._thread = threading.Thread(target=self._work, name=f"to {self.name}", daemon=True)

    # ---------------------------------------------------------------------- for the loop's thread

    def start(self, *, is_required: bool) -> None:
        """Waits until the run is started, the first try has failed, or START_SECONDS are over.

        Raises:
            Exception: as `run.start` did, where it is required or a mistake in the settings, or
                TimeoutError. Else it is told and tried again later.
        """
        self._is_required = is_required
        self._thread.start()
        if not self._was_tried.wait(START_SECONDS):
            self._note_start_error(TimeoutError(f"no answer within {START_SECONDS:.0f} s"))
        if self._start_error and self._must_end_for(self._start_error):
            # Should it answer after all, it is told at once that nothing comes of it.
            self.begin_end(Ending("FAILED"), (), 0.0)
            raise self._start_error

    def log(self, point: Point) -> None:
        """Queues a point; of too many, the oldest are left to the log."""
        with self._changed:
            self._waiting.append(point)
            self._drop_oldest()
            if len(self._waiting) == 1:
                self._changed.notify()
        busy_since = self._busy_since
        if busy_since is not None and self._clock() - busy_since > HANG_SECONDS:
            self._warn(f"has not answered for {HANG_SECONDS:.0f} s")

    def flush(self, files: Sequence[Path]) -> None:
        """Asks the thread to send now what waits, and to upload these files after it.

        Files that still wait to be uploaded are replaced by these. A tracker that is left alone
        after a failure stays so.
        """
        with self._changed:
            self._uploads = files
            if not self._is_left_alone:
                self._next_at = self._clock()
            self._changed.notify()

    @property
    def num_unsent(self) -> int:
        """How many points wait or are on their way, those left to the log included."""
        with self._changed:
            return len(self._waiting) + len(self._in_flight) + self._num_dropped

    def begin_end(self, ending: Ending, artifacts: Sequence[Path], seconds: float) -> None:
        """Asks for the end: within `seconds`, first what waits, then artifacts and status."""
        with self._changed:
            self._end = ending, artifacts
            self._send_until = self._clock() + POINTS_SHARE * seconds
            self._changed.notify()

    def wait_for_end(self, seconds: float) -> None:
        """Waits so long for the end that was asked for, and tells what is missing then."""
        self._thread.join(max(0.0, seconds))
        self.tell_losses()

    def tell_losses(self) -> None:
        """At the end: how often the tracker failed, what it is missing, and what to do about it."""
        num_missing = self.num_unsent
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
        is_whole = self._is_end_whole and not missing
        remedy = f". {self._remedy}" if self._remedy and not is_whole else ""
        self._say(f"warning: {self.name} {reason}; {what} are missing there{remedy}")

    # -------------------------------------------------------------------- on the tracker's thread

    def _work(self) -> None:
        try:
            self._try_to_start()
        finally:
            self._was_tried.set()
        if not self._is_started and self._start_error and self._must_end_for(self._start_error):
            return
        while (pause := self.turn()) is not None:
            with self._changed:
                is_idle = not (self._waiting or self._uploads)
                if self._end is None and (pause or is_idle):
                    self._changed.wait(pause or None)

    def turn(self) -> float | None:
        """Does what is due; returns the seconds until the next turn.

        0 is as soon as something is logged, None after the end.
        """
        if self._end is not None:
            self._finish(*self._end)
            return None
        if self._clock() >= self._next_at and (self._is_started or self._try_to_start()):
            if not (self._waiting or self._uploads):
                return 0.0
            if self.send_waiting() and self._upload_waiting():
                self._next_at = self._clock() + SEND_INTERVAL_SECONDS
        return max(0.01, self._next_at - self._clock())

    def _try_to_start(self) -> bool:
        self._busy_since = self._clock()
        try:
            self._run.start()
            missing = self._run.missing(self._earlier)
        except Exception as error:  # of whatever library
            self._leave_alone()
            self._note_start_error(error)
            return False
        finally:
            self._busy_since = None
        if self._start_error and not self._must_end_for(self._start_error):
            self._say(f"{self.name} answers now, and gets what was logged before")
        with self._changed:
            self._waiting.extendleft(reversed(missing))
            self._num_earlier = len(missing)
        self._earlier = ()
        self._is_started = True
        self._is_left_alone = False
        return True

    def _note_start_error(self, error: Exception) -> None:
        with self._changed:
            is_first, self._start_error = self._start_error is None, error
        if is_first and not self._must_end_for(error):
            self._is_told = True
            self._say(
                f"warning: {self.name} could not be started ({first_line(error)}). Training goes on"
                f" with train_log.jsonl alone, and {self.name} is tried again later."
            )

    def _must_end_for(self, error: Exception) -> bool:
        return self._is_required or isinstance(error, TrackingError)

    def send_waiting(self) -> bool:
        """Sends what waits, the oldest first, until all is sent (true) or the tracker fails.

        What is logged meanwhile is left to the next time: where a sending takes longer than a step,
        it would never end.
        """
        with self._changed:
            left = len(self._waiting)
        while self._clock() < self._send_until:
            points, is_from_log = self._take_points(left)
            if not points:
                return True
            if self.attempt(partial(self._run.send, points)):
                self._note_sent(len(points), is_from_log=is_from_log)
                left -= 0 if is_from_log else len(points)
                continue
            self._put_back(points, is_from_log=is_from_log)
            if len(points) == 1:
                self._leave_alone()
                return False
            self._num_single = len(points)  # one of them may be at fault and not the tracker
        return False

    def _take_points(self, left: int) -> tuple[list[Point], bool]:
        """The next points to send, `left` of those that wait at most; whether the log had them."""
        size = 1 if self._num_single else self._run.points_at_once
        if not self._num_single and (points := self._read_from_log(size)):
            return points, True
        with self._changed:
            take = min(size, left, len(self._waiting))
            self._in_flight = [self._waiting.popleft() for _ in range(take)]
            return self._in_flight, False

    def _read_from_log(self, size: int) -> list[Point]:
        try:
            return list(islice(self._from_log, size))
        except OSError as error:
            self._from_log = iter(())
            self._warn(f"lacks points that are in the log ({first_line(error)})")
            return []

    def _note_sent(self, num_points: int, *, is_from_log: bool) -> None:
        self._pause_seconds, self._is_left_alone = FIRST_PAUSE_SECONDS, False
        self._num_single = max(0, self._num_single - 1)
        with self._changed:
            self._in_flight = []
            if is_from_log:
                self._num_dropped = max(0, self._num_dropped - num_points)
            # The tracker answers: what was left to the log comes before what waits.
            if self._dropped and not self._num_single:
                left = self._read_log(*self._dropped)
                self._from_log, self._dropped = chain(self._from_log, left), None

    def _put_back(self, points: list[Point], *, is_from_log: bool) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(points))
            if len(points) == 1:
                # Should this one be at fault itself, it must not hold up the others next time.
                self._waiting.rotate(-1)
            self._in_flight = []
            if is_from_log:
                self._num_dropped = max(0, self._num_dropped - len(points))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Leaves to the log what the queue cannot hold, and what was logged in the same instant."""
        waiting, room = self._waiting, MAX_WAITING_POINTS + self._num_earlier
        while len(waiting) > room or (
            waiting and self._dropped and waiting[0].time == self._dropped[1]
        ):
            time_logged = waiting.popleft().time
            first, last = self._dropped or (time_logged, time_logged)
            self._dropped = min(first, time_logged), max(last, time_logged)
            self._num_dropped += 1

    def _upload_waiting(self) -> bool:
        """Uploads the files that wait and changed since the last time; whether it went well."""
        with self._changed:
            files, self._uploads = self._uploads, ()
        for path in files:
            if self._is_uploaded(path) or not path.exists():
                continue
            if self._end is not None:  # which brings newer ones
                return True
            if not self._upload(path):
                self._leave_alone()
                return False
        return True

    def _is_uploaded(self, path: Path) -> bool:
        return path in self._uploaded and self._uploaded[path] == mark(path)

    def _upload(self, path: Path) -> bool:
        before = mark(path)
        if not self.attempt(partial(self._run.upload, path)):
            return False
        self._uploaded[path] = before
        return True

    def _leave_alone(self) -> None:
        self._is_left_alone = True
        self._next_at = self._clock() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _finish(self, ending: Ending, artifacts: Sequence[Path]) -> None:
        if not (self._is_started or self._try_to_start()):
            return
        is_answering = self.send_waiting()
        files = [path for path in artifacts if not self._is_uploaded(path)]
        errors = list[Exception]()

        def close() -> None:
            errors.extend(self._run.close(ending, files if is_answering else ()))

        is_closed = self.attempt(close)
        for error in errors:
            self._note_failure(error)
        self._is_end_whole = is_closed and not errors and (is_answering or not files)

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Whether the call went through; the first that does not is told."""
        self._busy_since = self._clock()
        try:
            call()
        except Exception as error:  # whatever it is: the training is worth more
            self._note_failure(error)
            return False
        finally:
            self._busy_since = None
        return True

    def _note_failure(self, error: Exception) -> None:
        self._num_failures += 1
        self._warn(f"failed ({first_line(error)})")

    def _warn(self, what: str) -> None:
        if not self._is_told:
            self._is_told = True
            self._say(
                f"warning: {self.name} {what}. Training goes on, train_log.jsonl stays complete,"
                " and the metrics are sent again later."
            )


def mark(path: Path) -> tuple[int, int] | None:
    """What changes with a file's content: when it was written, in nanoseconds, and its size."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
