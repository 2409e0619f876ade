"""The learning rate at every step is what the literal tables say, and a pure function of it."""

import pytest

from llm_training.schedules import LearningRateSchedule


def rates(kind: str, **changes: object) -> list[float]:
    settings = {
        "peak": 1.0, "warmup_steps": 2, "decay_steps": None, "total_steps": 10, "min_ratio": 0.0,
    } | changes  # fmt: skip
    schedule = LearningRateSchedule(kind=kind, **settings)  # type: ignore[arg-type]
    return [round(schedule.at(step), 4) for step in range(10)]


TABLES = [
    ("constant", {}, [0.3333, 0.6667, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("constant", {"warmup_steps": 0}, [1] * 10),
    ("linear", {}, [0.3333, 0.6667, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ("linear", {"decay_steps": 4}, [0.3333, 0.6667, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]),
    (
        "linear",
        {"decay_steps": 4, "min_ratio": 0.2, "peak": 2.0},
        [0.6667, 1.3333, 2, 1.6, 1.2, 0.8, 0.4, 0.4, 0.4, 0.4],
    ),
    (
        "cosine",
        {"min_ratio": 0.1},
        [0.3333, 0.6667, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343],
    ),
    ("warmup-stable-decay", {}, [0.3333, 0.6667, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    (
        "warmup-stable-decay",
        {"decay_steps": 4, "min_ratio": 0.2},
        [0.3333, 0.6667, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4],
    ),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), TABLES)
def test_table(kind: str, changes: dict[str, object], expected: list[float]) -> None:
    assert rates(kind, **changes) == expected


def test_a_step_does_not_depend_on_the_steps_asked_for_before() -> None:
    schedule = LearningRateSchedule("cosine", 1.0, 2, None, 10, 0.1)
    alone = LearningRateSchedule("cosine", 1.0, 2, None, 10, 0.1).at(7)
    assert [schedule.at(step) for step in (9, 0, 3, 7)][-1] == alone


def test_the_rate_is_never_zero_at_the_first_step() -> None:
    assert rates("linear", warmup_steps=9)[0] > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup-stable-decay"])
@pytest.mark.parametrize("total", [60, 75, 80, 200])
def test_a_decay_laid_anew_goes_on_from_where_it_stands(kind: str, total: int) -> None:
    before = LearningRateSchedule(kind, 1.0, 10, 40, 80, 0.1)
    after = before.laid_anew(50, total)
    rates = [after.at(step) for step in range(50, total)]
    assert rates[0] == pytest.approx(before.at(50))
    assert rates == sorted(rates, reverse=True)
    assert after.at(total) == pytest.approx(0.1)
    assert after.laid_anew(55, 80).at(55) == pytest.approx(after.at(55))
    plateau = before.laid_anew(5, total)  # nothing has decayed yet
    if kind != "warmup-stable-decay" or total == 200:
        assert plateau == LearningRateSchedule(kind, 1.0, 10, 40, total, 0.1)
