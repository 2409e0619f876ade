"""Proves that a tracker costs the loop nothing, whatever it does, and gets what can be sent.

The tracker is made up: it fails, hangs and is slow when it is told to. Turns are taken one by one
with a clock to set, or by the real thread; nothing is measured.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_training.tracking import TrackingError
from llm_training.tracking import steady_tracker as module
from llm_training.tracking.steady_tracker import HANG_SECONDS, SteadyTracker
from llm_training.tracking.tracked_run import Ending, Point

ROOT = Path(__file__).resolve().parents[1]


class FakeRun:
    """A run in a tracker that fails while `is_down`, and always on a step in `refused`."""

    name = "fake"

    def __init__(self, points_at_once: int = 1) -> None:
        self.points_at_once = points_at_once
        self.is_down = False
        self.refused: set[int] = set()
        self.calls: list[Any] = []  # the steps of each sending, and what came after them
        self.num_tries = 0
        self.threads: set[str] = set()
        self.is_open = threading.Event()
        self.is_open.set()
        self.was_entered = threading.Event()
        self.start_errors: list[Exception] = []
        self.close_errors: list[Exception] = []
        self.before_send: Callable[[], None] = lambda: None

    @property
    def steps(self) -> list[int]:
        return [step for call in self.calls if isinstance(call, list) for step in call]

    def start(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.start_errors:
            raise self.start_errors.pop(0)

    def missing(self, points: Sequence[Point]) -> list[Point]:
        return [point for point in points if point.step % 2]

    def send(self, points: Sequence[Point]) -> None:
        self.num_tries += 1
        self.threads.add(threading.current_thread().name)
        self.was_entered.set()
        self.is_open.wait()
        self.before_send()
        if self.is_down or self.refused & {point.step for point in points}:
            raise ConnectionError("no route to host")
        self.calls.append([point.step for point in points])

    def upload(self, path: Path) -> None:
        self.calls.append(f"upload {path.name}")

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        self.calls += [str(item) for item in [*artifacts, ending.status]]
        return self.close_errors


class Setup:
    """A tracker around a `FakeRun`, with the lines that it says and a clock to set."""

    def __init__(self, points_at_once: int = 1, earlier: Sequence[Point] = ()) -> None:
        self.run = FakeRun(points_at_once)
        self.said: list[str] = []
        self.now = 0.0
        self.logged: list[Point] = []  # what the file has
        self.steady = SteadyTracker(
            self.run,
            self.said.append,
            earlier,
            lambda: self.now,
            read_log=self.read_log,
            remedy="Run sync.",
        )

    def read_log(self, first: float, last: float) -> Iterator[Point]:
        return (point for point in list(self.logged) if first <= point.time <= last)

    def log(self, *steps: int) -> None:
        for step in steps:
            self.logged.append(Point({"train/loss": 1.0}, step, 1.8e9 + step))
            self.steady.log(self.logged[-1])

    def end(self, artifacts: Sequence[Path] = (), seconds: float = 30.0) -> None:
        self.steady.begin_end(Ending("FINISHED"), artifacts, seconds)
        self.steady.turn()
        self.steady.tell_losses()


@pytest.fixture
def hanging() -> Iterator[Setup]:
    """A tracker, on its thread, that never comes back from its first sending."""
    setup = Setup(points_at_once=10)
    setup.run.is_open.clear()
    setup.steady.start(is_required=True)
    yield setup
    setup.run.is_open.set()
    setup.steady.begin_end(Ending("KILLED"), (), 0.0)
    setup.steady._thread.join(10)
    assert not setup.steady._thread.is_alive()


def started(points_at_once: int = 1, earlier: Sequence[Point] = ()) -> Setup:
    """One whose turns the test takes."""
    setup = Setup(points_at_once, earlier)
    setup.steady.turn()
    return setup


# ------------------------------------------------------------------------------------- a slow one


def test_logging_returns_though_the_tracker_never_does(hanging: Setup) -> None:
    hanging.log(0)
    assert hanging.run.was_entered.wait(10)
    hanging.log(*range(1, 1000))  # the test would hang here
    assert hanging.steady.num_unsent == 1000
    assert hanging.run.calls == []


def test_the_end_waits_its_time_and_no_longer(hanging: Setup) -> None:
    hanging.log(0, 1, 2)
    assert hanging.run.was_entered.wait(10)
    hanging.steady.begin_end(Ending("FINISHED"), (), 0.1)
    hanging.steady.wait_for_end(0.1)  # the test would hang here
    (line,) = hanging.said
    lost = "3 logged points and how the run ended are missing there"
    assert line == f"warning: fake does not answer; {lost}. Run sync."


def test_that_a_tracker_hangs_is_told_once(hanging: Setup) -> None:
    hanging.log(0)
    assert hanging.run.was_entered.wait(10)
    hanging.now = HANG_SECONDS
    hanging.log(1)
    assert hanging.said == []
    hanging.now += 1
    hanging.log(2, 3)
    (line,) = hanging.said
    assert line.startswith("warning: fake has not answered for 60 s. Training goes on")


def test_what_a_hang_held_up_follows_in_order_and_before_the_end(hanging: Setup) -> None:
    hanging.log(0)
    assert hanging.run.was_entered.wait(10)
    hanging.log(*range(1, 35))
    hanging.steady.begin_end(Ending("FINISHED"), [Path("result.json")], 30.0)
    hanging.run.is_open.set()
    hanging.steady.wait_for_end(10.0)
    *sent, artifact, status = hanging.run.calls
    assert sent == [[0], [*range(1, 11)], [*range(11, 21)], [*range(21, 31)], [*range(31, 35)]]
    assert (artifact, status) == ("result.json", "FINISHED")
    assert hanging.said == []


def test_one_thread_that_is_not_the_loops_touches_the_tracker(hanging: Setup) -> None:
    hanging.run.is_open.set()
    hanging.log(0, 1)
    hanging.steady.begin_end(Ending("FINISHED"), (), 30.0)
    hanging.steady.wait_for_end(10.0)
    assert hanging.run.threads == {"to fake"}


@pytest.mark.parametrize("last_word", ["sys.exit(3)", "threading.Timer(0.1, sys.exit)"])
def test_a_thread_that_hangs_keeps_no_process_alive(last_word: str) -> None:
    code = f"""
import sys, threading
from llm_training.tracking.tracked_run import Point
from tests.test_steady_tracker import FakeRun, SteadyTracker
run = FakeRun()
run.is_open.clear()
tracker = SteadyTracker(run, print)
tracker.start(is_required=True)
tracker.log(Point({{}}, 0, 0.0))
run.was_entered.wait()
{last_word}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == (3 if "3" in last_word else 0)


def test_what_is_logged_during_a_sending_waits_for_the_next() -> None:
    """Else a tracker that takes longer than a step would be sent to at every step."""
    setup = started(points_at_once=10)
    setup.run.before_send = lambda: setup.log(100 + setup.run.num_tries)
    setup.log(*range(15))
    setup.steady.turn()
    assert setup.run.calls == [[*range(10)], [*range(10, 15)]]
    assert setup.steady.num_unsent == 2
    setup.run.before_send = lambda: None
    setup.end()
    assert setup.run.calls[2] == [101, 102]


def test_points_are_gathered_between_two_sendings() -> None:
    setup = started(points_at_once=10)
    for step in range(100):  # ten a second
        setup.now = 0.1 * step
        setup.log(step)
        setup.steady.turn()
    assert len(setup.run.calls) <= 10
    setup.end()
    assert setup.run.steps == [*range(100)]


def test_the_status_does_not_wait_for_all_points_of_a_slow_tracker() -> None:
    setup = started(points_at_once=10)

    def take_five_seconds() -> None:
        setup.now += 5

    setup.run.before_send = take_five_seconds
    setup.log(*range(100))
    setup.end([Path("result.json")], seconds=20.0)
    assert setup.run.calls[-1] == "FINISHED"
    assert "result.json" not in setup.run.calls
    assert setup.run.steps == [*range(30)]  # in 70% of the time
    (line,) = setup.said
    assert line == "warning: fake is too slow; 70 logged points are missing there. Run sync."


# ----------------------------------------------------------------------------------- one that fails


def test_an_outage_costs_few_calls_and_one_warning_and_is_made_up_for() -> None:
    setup = started(points_at_once=100)
    setup.run.is_down = True
    for step in range(1000):  # a step a second
        setup.now = float(step)
        setup.log(step)
        setup.steady.turn()
    assert setup.run.num_tries < 10
    (line,) = setup.said
    assert "fake failed (ConnectionError: no route to host)" in line

    setup.run.is_down = False
    setup.now += 600
    setup.log(1000)
    setup.steady.turn()
    assert sorted(setup.run.steps) == [*range(1001)]
    setup.end()
    assert "no metrics are missing there" in setup.said[-1]


def fail_once(setup: Setup) -> None:
    def fail() -> None:
        if setup.run.num_tries == 1:
            raise ConnectionError("reset by peer")

    setup.run.before_send = fail


def test_what_failed_together_follows_one_by_one_in_order() -> None:
    setup = started(points_at_once=4)
    fail_once(setup)
    setup.log(*range(8))
    setup.steady.turn()
    assert setup.run.calls == [[0], [1], [2], [3], [4, 5, 6, 7]]


@pytest.mark.parametrize("points_at_once", [1, 4, 100])
def test_a_point_that_is_always_refused_does_not_hold_up_the_others(points_at_once: int) -> None:
    setup = started(points_at_once)
    setup.run.refused = {3}
    setup.log(*range(10))
    for _ in range(4):
        setup.now += 1000
        setup.steady.turn()
    setup.end()
    assert sorted(setup.run.steps) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert "1 logged points are missing" in setup.said[-1]
    assert setup.run.calls[-1] == "FINISHED"


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_POINTS", 5)


@pytest.mark.parametrize("points_at_once", [1, 3, 100])
@pytest.mark.usefixtures("small_queue")
def test_what_the_queue_cannot_hold_follows_from_the_log(points_at_once: int) -> None:
    setup = started(points_at_once)
    setup.run.is_down = True
    for first in range(0, 40, 4):  # the server stays down for many tries
        setup.log(*range(first, first + 4))
        setup.now += 1000
        setup.steady.turn()
        assert len(setup.steady._waiting) <= 5
    assert setup.steady.num_unsent == 40
    setup.run.is_down = False
    setup.now += 1000
    setup.steady.turn()
    assert sorted(setup.run.steps) == [*range(40)]
    assert setup.steady.num_unsent == 0
    setup.end()
    assert "no metrics are missing there" in setup.said[-1]
    assert "Run sync" not in setup.said[-1]


@pytest.mark.usefixtures("small_queue")
def test_points_of_one_instant_are_left_to_the_log_together() -> None:
    setup = started(points_at_once=100)
    setup.run.is_down = True
    for step in range(8):
        for _ in range(2):  # a training and an evaluation
            setup.log(step)
    setup.steady.turn()
    setup.run.is_down = False
    setup.end()
    assert sorted(setup.run.steps) == sorted([*range(8)] * 2)


@pytest.mark.usefixtures("small_queue")
def test_what_neither_queue_nor_log_has_is_counted() -> None:
    setup = started()
    setup.run.is_down = True
    setup.log(*range(8))
    setup.steady.turn()
    setup.logged.clear()  # on a full disk
    setup.run.is_down = False
    setup.end()
    assert "3 logged points are missing there. Run sync." in setup.said[-1]


@pytest.mark.usefixtures("small_queue")
def test_what_comes_back_while_the_queue_is_full_follows_too() -> None:
    setup = started(points_at_once=3)
    setup.run.is_down = True
    setup.run.before_send = lambda: setup.log(*range(10, 15)) if setup.run.num_tries == 1 else None
    setup.log(0, 1, 2)
    setup.steady.turn()
    assert setup.steady.num_unsent == 8
    setup.run.is_down = False
    setup.end()
    assert sorted(setup.run.steps) == [0, 1, 2, *range(10, 15)]


# ---------------------------------------------------------------------------------- at a checkpoint


def test_a_checkpoint_sends_what_waits_and_then_its_files(tmp_path: Path) -> None:
    setup = started(points_at_once=10)
    setup.log(0)
    setup.steady.turn()
    setup.log(1, 2)
    setup.steady.turn()
    assert setup.run.calls == [[0]]  # the next sending is not due
    log = tmp_path / "log.jsonl"
    log.write_text("one line")
    setup.steady.flush([log, tmp_path / "not_there.json"])
    setup.steady.turn()
    assert setup.run.calls == [[0], [1, 2], "upload log.jsonl"]


def test_a_file_is_uploaded_again_only_when_it_changed(tmp_path: Path) -> None:
    setup = started()
    log, other = tmp_path / "log.jsonl", tmp_path / "other.json"
    other.write_text("for good")
    for text in ("one", None, "one and another"):
        if text is not None:
            log.write_text(text)
        setup.steady.flush([log, other])
        setup.steady.turn()
    uploads = ["upload log.jsonl", "upload other.json", "upload log.jsonl"]
    assert setup.run.calls == uploads
    log.write_text("one and another and more")
    setup.end([log, other])
    assert setup.run.calls == [*uploads, str(log), "FINISHED"]


def test_files_that_wait_are_replaced_by_newer_ones(tmp_path: Path) -> None:
    setup = started()
    for name in ("old.json", "new.json"):
        (tmp_path / name).touch()
        setup.steady.flush([tmp_path / name])
    setup.steady.turn()
    assert setup.run.calls == ["upload new.json"]


def test_a_checkpoint_does_not_ask_a_tracker_that_is_left_alone(tmp_path: Path) -> None:
    setup = started()
    setup.run.is_down = True
    setup.log(0)
    setup.steady.turn()
    setup.run.is_down = False
    setup.steady.flush([tmp_path])
    setup.steady.turn()
    assert setup.run.calls == []
    setup.now += 1000
    setup.steady.turn()
    assert setup.run.calls == [[0], f"upload {tmp_path.name}"]


def test_a_checkpoint_returns_though_the_tracker_never_does(hanging: Setup) -> None:
    hanging.log(0)
    assert hanging.run.was_entered.wait(10)
    hanging.steady.flush([Path("log.jsonl")])  # the test would hang here
    assert hanging.run.calls == []


def test_the_thread_wakes_for_a_checkpoint(hanging: Setup, tmp_path: Path) -> None:
    uploaded = threading.Event()
    hanging.run.is_open.set()
    hanging.run.upload = lambda path: uploaded.set()  # type: ignore[method-assign]
    hanging.steady.flush([tmp_path])
    assert uploaded.wait(10)


# --------------------------------------------------------------------------------------- the start


def test_earlier_points_that_are_missing_come_first_however_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_POINTS", 5)
    setup = Setup(points_at_once=100, earlier=[Point({}, step, 0.0) for step in range(40)])
    setup.log(40, 41)
    fail_once(setup)
    setup.steady.turn()
    assert setup.run.steps == [*range(1, 40, 2), 40, 41]


def test_a_required_tracker_that_does_not_start_is_an_error() -> None:
    setup = Setup()
    setup.run.start_errors = [ConnectionError("no route")]
    with pytest.raises(ConnectionError, match="no route"):
        setup.steady.start(is_required=True)
    setup.steady._thread.join(10)
    assert not setup.steady._thread.is_alive()
    assert setup.said == []


def test_an_optional_one_is_tried_again_and_gets_everything() -> None:
    setup = Setup(points_at_once=100, earlier=[Point({}, 1, 0.0)])
    setup.run.start_errors = [ConnectionError("no route"), ConnectionError("no route")]
    for step in range(2, 200):
        setup.now += 1
        setup.log(step)
        setup.steady.turn()
    assert setup.run.start_errors == []
    setup.end()
    assert setup.run.steps == [*range(1, 200)]
    first, second, third = setup.said
    assert "fake could not be started (ConnectionError: no route)" in first
    assert "Training goes on with train_log.jsonl alone" in first
    assert second == "fake answers now, and gets what was logged before"
    assert "no metrics are missing there" in third


def test_what_fails_at_the_end_is_told_though_the_run_is_ended() -> None:
    setup = started(points_at_once=10)
    setup.run.close_errors = [OSError("no space"), OSError("again")]
    setup.log(1)
    setup.end([Path("result.json")])
    assert setup.run.calls == [[1], "result.json", "FINISHED"]
    first, last = setup.said
    assert "failed (OSError: no space)" in first
    assert last == "warning: fake failed 2 times; no metrics are missing there. Run sync."


def test_a_mistake_of_the_user_is_an_error_though_the_tracker_is_optional() -> None:
    setup = Setup()
    setup.run.start_errors = [TrackingError("choose another name")]
    with pytest.raises(TrackingError, match="another name"):
        setup.steady.start(is_required=False)


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    """A tracker that is not started within the time that a start may take."""
    monkeypatch.setattr(module, "START_SECONDS", 0.05)
    setup = Setup(points_at_once=100)
    start = setup.run.start

    def start_late() -> None:
        assert setup.run.is_open.wait(30)
        start()

    setup.run.start = start_late  # type: ignore[method-assign]
    setup.run.is_open.clear()
    yield setup
    setup.run.is_open.set()
    setup.steady._thread.join(10)
    assert not setup.steady._thread.is_alive()


def test_a_start_is_waited_for_so_long_and_no_longer(slow_start: Setup) -> None:
    with pytest.raises(TimeoutError, match="no answer within"):
        slow_start.steady.start(is_required=True)  # the test would hang here
    slow_start.run.is_open.set()
    slow_start.steady._thread.join(10)
    assert slow_start.run.calls == ["FAILED"]  # what was begun there after all does not stay so
    assert slow_start.said == []


def test_an_optional_one_that_starts_late_gets_everything(slow_start: Setup) -> None:
    slow_start.steady.start(is_required=False)
    slow_start.log(1, 2)
    slow_start.run.is_open.set()
    slow_start.steady.begin_end(Ending("FINISHED"), (), 30.0)
    slow_start.steady.wait_for_end(10.0)
    assert slow_start.run.calls == [[1, 2], "FINISHED"]
    assert "fake could not be started (TimeoutError: no answer" in slow_start.said[0]
