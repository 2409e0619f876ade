"""What passes between a run's record and a tracker, and what a tracker must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Point(NamedTuple):
    """What was logged at once: the metrics of a step, and when, in Unix seconds."""

    metrics: dict[str, float]
    step: int
    time: float


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        status: for the tracker.
        error: the last lines of the traceback, without secrets; empty where there was none.
        reason: such as the signal that ended it; empty where it came to its end.
    """

    status: Status
    error: str = ""
    reason: str = ""


class TrackedRun(Protocol):
    """One run in one tracker: MLflow's, TensorBoard's, W&B's.

    All methods may raise anything and take any time. They are called on one thread, that of a
    `SteadyTracker`.
    """

    name: str
    points_at_once: int  # of `send`, where the tracker takes many in one transaction

    def start(self) -> None:
        """Reaches the tracker and begins the run there, or goes on with it.

        It is tried again after a failure, and leaves nothing behind that says FINISHED.
        """

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """What the tracker is to get of these points, which an earlier start may have sent."""

    def send(self, points: Sequence[Point]) -> None:
        """Sends them; after a failure all of them come again."""

    def upload(self, path: Path) -> None:
        """Keeps a copy of a file there, in place of an earlier one of its name.

        A tracker that keeps no files does nothing.
        """

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        """Uploads the artifacts and ends the run there.

        A part that fails does not keep the next from it; returns what went wrong.
        """


def attempt_all(calls: Iterable[Callable[[], Any]]) -> list[Exception]:
    """Makes all the calls, whatever becomes of those before; returns what was raised."""
    errors: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:  # of whatever library
            errors.append(error)
    return errors
