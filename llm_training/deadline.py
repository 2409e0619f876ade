"""How many steps fit into the hours of a run, measured on the way.

The clock of rank 0 counts. At some steps, which all ranks know, its readings go to all, and all
come to the same number of steps (`Deadline.review`). What was decided lies in every checkpoint, so
that a resumed run goes on with it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

# Steps of a run whose length is not known yet; more than any run has.
OPEN_STEPS = 10**9
REVIEW_SECONDS = 10.0  # between two reviews, about
KNOWN_STEPS, KNOWN_SHARE = 20, 0.02  # steps, or share of the hours, that tell how fast a run is
RECENT_REVIEWS = 6  # the speed is that between so many of them
# Checkpoints and models are expected to be written so fast, until one is.
DISK_BYTES_PER_SECOND = 1e8
RESERVE = 1.2  # the end may take so many times what its parts took before


@dataclass
class DeadlineState:
    """What a checkpoint keeps of it.

    Attributes:
        hours: as they were asked for.
        seconds: of training, over all starts, up to this checkpoint.
        total_steps: of the run, as they were laid out last; None: too little is known yet.
        anchor: `LearningRateSchedule.anchor`.
        latest_step: where a person lets the run end at the latest (the file DECAY), if one does.
        evaluation_seconds, save_seconds, export_seconds: of the last one; None: there was none.
    """

    hours: float
    seconds: float = 0.0
    total_steps: int | None = None
    anchor: tuple[int, float] | None = None
    latest_step: int | None = None
    evaluation_seconds: float | None = None
    save_seconds: float | None = None
    export_seconds: float | None = None

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> DeadlineState | None:
        """What `dataclasses.asdict` made of it, also after a way through JSON."""
        if values is None:
            return None
        state = cls(**values)
        state.anchor = None if state.anchor is None else (state.anchor[0], state.anchor[1])
        return state


@dataclass(frozen=True)
class Readings:
    """What rank 0 has measured.

    Attributes:
        seconds: of training over all starts.
        busy_seconds: of them, those of steps alone, since this start.
        evaluation_seconds, save_seconds, export_seconds: of one.
    """

    seconds: float
    busy_seconds: float
    evaluation_seconds: float
    save_seconds: float
    export_seconds: float


@dataclass(frozen=True)
class Pauses:
    """After how many steps a run evaluates and saves; None: only at the end, if at all."""

    eval_steps: int | None
    save_steps: int | None


class Deadline:
    """The hours of a run, and how many steps they hold.

    Args:
        state: where the run stands; None: its hours are not limited, and nothing here does a thing.
        hours: as they are asked for now; a resumed run may be given others.
        evaluates: whether the run ends with an evaluation.
        checkpoint_bytes, model_bytes: about what will be written.
        clock: in seconds.
    """

    def __init__(
        self,
        state: DeadlineState | None = None,
        *,
        hours: float = math.inf,
        evaluates: bool = True,
        checkpoint_bytes: float = 0.0,
        model_bytes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_set = state is not None
        self.state = state or DeadlineState(hours)
        self.has_other_hours = self.state.hours != hours
        self.state.hours = hours
        self._evaluates = evaluates
        self._save_seconds = checkpoint_bytes / DISK_BYTES_PER_SECOND
        self._export_seconds = model_bytes / DISK_BYTES_PER_SECOND
        self._clock = clock
        self._earlier_seconds = self.state.seconds
        self.start(0)

    @classmethod
    def of_run(cls, hours: float | None, kept: dict[str, Any] | None, **more: Any) -> Self:
        """The deadline of a run: new, or as its checkpoint has `kept` it; none without `hours`."""
        if hours is None:
            return cls(None, **more)
        return cls(DeadlineState.of(kept) or DeadlineState(hours), hours=hours, **more)

    # ------------------------------------------------------------------------------- measuring

    def start(self, step: int) -> None:
        """Begins to count: call it where training begins, `step` steps being done."""
        self._began = self._clock()
        self._paused = 0.0
        self._depth = 0
        self._first_step = step
        self._marks: deque[tuple[int, float]] = deque(maxlen=RECENT_REVIEWS)
        self._next_review = step + 1

    @property
    def seconds(self) -> float:
        """Of training so far, over all starts, by this process's clock."""
        return self._earlier_seconds + self._clock() - self._began

    @property
    def seconds_left(self) -> float:
        """Until the hours are over."""
        return 3600 * self.state.hours - self.seconds

    @contextmanager
    def pause(self, kind: str | None = None) -> Iterator[None]:
        """Takes the time of what is no step: an "evaluation", a "save", an "export", or another."""
        began = self._clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            seconds = self._clock() - began
            self._paused += seconds if self._depth == 0 else 0.0
        if kind is not None:
            setattr(self.state, f"{kind}_seconds", seconds)

    def readings(self) -> Readings:
        """What this process has measured."""
        state = self.state

        def known(seconds: float | None, guess: float) -> float:
            return guess if seconds is None else seconds

        return Readings(
            seconds=self.seconds,
            busy_seconds=self._clock() - self._began - self._paused,
            evaluation_seconds=known(state.evaluation_seconds, 0.0),
            save_seconds=known(state.save_seconds, self._save_seconds),
            export_seconds=known(state.export_seconds, self._export_seconds),
        )

    def to_keep(self) -> dict[str, Any] | None:
        """What `TrainState.deadline` takes."""
        if not self.is_set:
            return None
        return dataclasses.asdict(dataclasses.replace(self.state, seconds=self.seconds))

    # -------------------------------------------------------------------------------- deciding

    def is_due(self, step: int) -> bool:
        """Whether the length is reviewed after this step; the same on every rank."""
        is_last = self.state.total_steps is not None and step >= self.state.total_steps
        return self.is_set and step >= self._next_review and not is_last

    def review(
        self, step: int, at: Readings, pauses: Pauses, max_steps: int | None, *, least: int = 1
    ) -> int | None:
        """How many steps the run has, seen from after `step`; the same on every rank.

        Args:
            at: what rank 0 reads now.
            least: steps that are done in any case, since they have begun.

        Returns:
            The steps of the whole run; None: too little is known yet.
        """
        seconds_per_step = self._measure(step, at)
        left = 3600 * self.state.hours - at.seconds - self._end_seconds(at)
        fitting = None
        if left <= 0:
            fitting = 0
        elif seconds_per_step is not None:
            fitting = fitting_steps(step, left, seconds_per_step, at, pauses)
        total = self.state.total_steps
        if fitting is not None:
            total = step + max(least, fitting)
            total = min([total, *filter(None, [max_steps, self.state.latest_step])])
        self._set_next_review(step, seconds_per_step, total)
        return total

    def note(self, total_steps: int | None, anchor: tuple[int, float] | None) -> None:
        """Keeps what was decided; None: the length is open."""
        self.state.total_steps, self.state.anchor = total_steps, anchor

    def _measure(self, step: int, at: Readings) -> float | None:
        """Seconds of a step of late; None while that is not known."""
        done = step - self._first_step
        self._marks.append((step, at.busy_seconds))
        is_known = done >= KNOWN_STEPS or at.seconds - self._earlier_seconds >= (
            KNOWN_SHARE * 3600 * self.state.hours
        )
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if not is_known or last == first:
            return None
        return max(1e-9, (ended - began) / (last - first))

    def _end_seconds(self, at: Readings) -> float:
        """What comes after the last step."""
        evaluation = at.evaluation_seconds if self._evaluates else 0.0
        return RESERVE * (evaluation + at.save_seconds + at.export_seconds)

    def _set_next_review(
        self, step: int, seconds_per_step: float | None, total: int | None
    ) -> None:
        """Soon after the start and before the end, else after some seconds."""
        wait = max(1, step - self._first_step)
        if seconds_per_step is not None:
            wait = min(wait, math.ceil(REVIEW_SECONDS / seconds_per_step))
        if total is not None:
            wait = min(wait, (total - step) // 2)
        self._next_review = step + max(1, wait)


def fitting_steps(
    step: int, left: float, seconds_per_step: float, at: Readings, pauses: Pauses
) -> int:
    """Steps after `step` that fit into the seconds left, with the pauses between them.

    What is due after `step` itself is still to come; what is due after the last belongs to the end.
    """

    def needed(count: int) -> float:
        seconds = count * seconds_per_step
        for interval, each in (
            (pauses.eval_steps, at.evaluation_seconds),
            (pauses.save_steps, at.save_seconds),
        ):
            if interval:
                times = (step + count - 1) // interval - (step - 1) // interval
                seconds += max(0, times) * each
        return seconds

    low, high = 0, min(OPEN_STEPS, math.floor(left / seconds_per_step))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= left else (low, middle - 1)
    return low
