"""Proves that the meter measures steady speed only, and that its numbers read well."""

from __future__ import annotations

import pytest

from llm_training.throughput import Reading, Throughput, format_count, format_duration


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0  # far from 0, so a division by the time itself would show

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run_steps(
    meter: Throughput, clock: Clock, steps: int, seconds: float, tokens: int = 100
) -> None:
    for _ in range(steps):
        clock.now += seconds
        meter.update(tokens)


def tokens_per_second(meter: Throughput) -> float:
    reading = meter.read()
    assert reading is not None
    return reading.tokens_per_second


def test_a_reading_covers_the_steps_since_the_last_one(clock: Clock) -> None:
    meter = Throughput(clock)
    run_steps(meter, clock, steps=10, seconds=2.0)
    assert tokens_per_second(meter) == pytest.approx(50.0)
    run_steps(meter, clock, steps=5, seconds=0.5)
    assert tokens_per_second(meter) == pytest.approx(200.0)


def test_time_before_start_is_left_out(clock: Clock) -> None:
    meter = Throughput(clock)
    clock.now += 500  # the model is built
    meter.start()
    run_steps(meter, clock, steps=1, seconds=1.0)
    assert tokens_per_second(meter) == pytest.approx(100.0)


def test_pauses_are_left_out_nested_ones_once(clock: Clock) -> None:
    meter = Throughput(clock)
    clock.now += 0.5
    with meter.paused():
        clock.now += 30
        with meter.paused():
            clock.now += 7
        clock.now += 3
    clock.now += 0.5
    meter.update(100)
    assert tokens_per_second(meter) == pytest.approx(100.0)


def test_a_pause_ends_when_its_work_fails(clock: Clock) -> None:
    meter = Throughput(clock)
    with pytest.raises(OSError), meter.paused():
        clock.now += 30
        raise OSError("disk full")
    run_steps(meter, clock, steps=1, seconds=1.0)
    assert tokens_per_second(meter) == pytest.approx(100.0)


def step(meter: Throughput, clock: Clock, wait: float, work: float) -> None:
    with meter.waiting():
        clock.now += wait
    clock.now += work
    meter.update(100)


def test_waiting_for_data_is_a_share_of_the_steps_time(clock: Clock) -> None:
    meter = Throughput(clock)
    clock.now += 50
    meter.start()
    for _ in range(4):
        step(meter, clock, wait=0.5, work=1.5)
    assert meter.read() == Reading(tokens_per_second=50, step_seconds=2, data_wait_ratio=0.25)
    step(meter, clock, wait=0.0, work=1.0)
    assert meter.read() == Reading(tokens_per_second=100, step_seconds=1, data_wait_ratio=0)


def test_a_pause_makes_no_share_smaller(clock: Clock) -> None:
    meter = Throughput(clock)
    step(meter, clock, wait=1.0, work=1.0)
    with meter.paused():
        clock.now += 100
    reading = meter.read()
    assert reading is not None and reading.data_wait_ratio == pytest.approx(0.5)


def test_a_wait_counts_in_the_interval_of_its_step(clock: Clock) -> None:
    meter = Throughput(clock)
    step(meter, clock, wait=0.0, work=1.0)
    with meter.waiting():  # for the window of a step that is not counted yet
        clock.now += 3
    reading = meter.read()
    assert reading is not None and reading.data_wait_ratio == 0
    clock.now += 1
    meter.update(100)
    reading = meter.read()
    assert reading is not None and reading.data_wait_ratio == pytest.approx(0.75)


def test_a_wait_that_fails_is_counted_too(clock: Clock) -> None:
    meter = Throughput(clock)
    with pytest.raises(OSError), meter.waiting():
        clock.now += 1
        raise OSError("the disk is gone")
    clock.now += 1
    meter.update(100)
    reading = meter.read()
    assert reading is not None and reading.data_wait_ratio == pytest.approx(0.5)


def test_without_steps_there_is_no_rate_and_no_estimate(clock: Clock) -> None:
    meter = Throughput(clock)
    clock.now += 5
    assert meter.read() is None
    assert meter.seconds_left(10) is None


def test_no_time_is_no_division_by_zero(clock: Clock) -> None:
    meter = Throughput(clock)
    meter.update(100)
    assert meter.read() is None


def test_the_estimate_ignores_one_slow_interval(clock: Clock) -> None:
    meter = Throughput(clock)
    for seconds in (60.0, 1.0, 1.0):  # the first step compiles
        run_steps(meter, clock, steps=4, seconds=seconds)
        meter.read()
    assert meter.seconds_left(30) == pytest.approx(30.0)


def test_the_estimate_follows_a_lasting_change(clock: Clock) -> None:
    meter = Throughput(clock)
    for seconds in [1.0] * 20 + [3.0] * 5:
        run_steps(meter, clock, steps=2, seconds=seconds)
        meter.read()
    assert meter.seconds_left(10) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (112, "1:52"),
        (3599.9, "1:00:00"),
        (7384, "2:03:04"),
        (86400 * 3 + 3600 * 4 + 59, "3 d 04 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.52, "0.5"),
        (950, "950"),
        (999.7, "1k"),
        (9_123, "9.1k"),
        (123_456, "123k"),
        (999_700, "1M"),
        (1_310_000, "1.3M"),
        (2_000_000_000, "2B"),
        (15.2e12, "15.2T"),
        (4e15, "4000T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text
