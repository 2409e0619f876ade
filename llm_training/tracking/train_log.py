"""train_log.jsonl: every metric of a run, one JSON object a line, complete whatever else fails."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from llm_training.tracking.tracked_run import Point

FILE_NAME = "train_log.jsonl"


class TrainLog:
    """The run's own record, which needs no tracker and no network.

    A line is `{"step": 120, "time": 1764500000.123, "train/loss": 4.1, ...}`; `time` is in Unix
    seconds. JSON has no NaN and no infinity: they are the strings "NaN", "Infinity" and
    "-Infinity", which `float()` reads back.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """Opens the log for a run that continues after `resumed_step`; None: for a new run.

        A new run moves a log that it finds aside to train_log.old.jsonl. A resumed one removes the
        lines of later steps, which it will compute again, and what a kill left half written.
        `lines_removed` counts them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self.lines_removed = 0
        if self.path.exists():
            if resumed_step is not None:
                self.lines_removed = _rewind(self.path, resumed_step)
            else:
                self.path.replace(self.path.with_suffix(".old.jsonl"))
        # Unbuffered: a line is one write, and a failed one is not sent again with the next.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._is_torn = False  # whether the last line is

    def write(self, point: Point) -> None:
        """Appends one line; it has reached the operating system when this returns.

        Raises:
            OSError: it has not, or a part of it alone, as on a full disk; the next one is whole.
        """
        line: dict[str, float | str] = {"step": point.step, "time": point.time}
        line |= {name: _to_json(value) for name, value in point.metrics.items()}
        content = b"\n" * self._is_torn + json.dumps(line, allow_nan=False).encode() + b"\n"
        written = self._file.write(content)
        if written < len(content):  # the system says so in place of an error
            self._is_torn = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_torn = False

    def flush(self) -> None:
        """Waits until all lines are on the disk, where not even a power cut takes them away."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; once is enough, twice does no harm."""
        self._file.close()


def read_points(folder: Path, last_step: float) -> list[Point]:
    """What the log in `folder` holds up to a step, oldest first; torn lines are passed over."""
    path = folder / FILE_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_to_point(line) for line in lines if _is_whole_line_up_to(line, last_step)]


def points_between(folder: Path, first: float, last: float) -> Iterator[Point]:
    """The same of what was logged between two Unix times, both included, a line at a time."""
    path = folder / FILE_NAME
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if _is_whole_line_up_to(line, math.inf) and first <= _to_point(line).time <= last:
                yield _to_point(line)


def _to_point(line: bytes) -> Point:
    record = json.loads(line)
    step, time = record.pop("step"), record.pop("time")
    return Point({name: float(value) for name, value in record.items()}, step, time)


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _rewind(path: Path, step: int) -> int:
    """Removes the lines after `step` and torn ones; returns how many.

    Written beside and renamed: a kill in here leaves the old log or the new one, never half of one.
    """
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if _is_whole_line_up_to(line, step)]
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return len(lines) - len(kept)


def _is_whole_line_up_to(line: bytes, step: float) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return bool(record.get("step", 0) <= step)
