"""The plan says before step 0 how long the run is, or why it cannot be."""

from typing import Any

import numpy as np
import pytest

from arguments import BatchSizes, OptimizationArguments
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import StreamRows
from llm_training.data.tokens.token_store import TokenArray
from llm_training.deadline import DeadlineState
from llm_training.planning import Plan, PlanError, make_plan
from llm_training.schedules import LearningRateSchedule

BATCH = BatchSizes(per_device=2, accumulation=2, processes=2, global_batch=8)


def plan(
    num_tokens: int = 403,
    *,
    done_steps: int = 0,
    done_samples: int = 0,
    decay_from: int | None = None,
    **settings: Any,
) -> Plan:
    rows = StreamRows(TokenArray(np.zeros(num_tokens, np.uint16)), 4)
    arguments = OptimizationArguments(**settings)
    where: dict[str, Any] = {
        "done_steps": done_steps,
        "done_samples": done_samples,
        "decay_from": decay_from,
    }
    return make_plan(arguments, BATCH, rows, 4, **where)


@pytest.mark.parametrize(
    ("settings", "steps", "samples"),
    [
        ({"num_train_epochs": 1.0}, 13, 100),  # 12 full steps and one of 4 rows
        ({"num_train_epochs": 2.0}, 25, 200),  # windows run on over the end of an epoch
        ({"num_train_epochs": 0.5}, 7, 50),
        ({"max_steps": 5}, 5, 40),
        ({"max_steps": 5, "num_train_epochs": 9.0}, 5, 40),
    ],
)
def test_length(settings: dict[str, Any], steps: int, samples: int) -> None:
    made = plan(**settings)
    assert (made.total_steps, made.num_samples) == (steps, samples)
    assert made.schedule.total_steps == steps


def test_a_resumed_run_ends_where_it_should_though_its_steps_had_another_size() -> None:
    rows = StreamRows(TokenArray(np.zeros(403, np.uint16)), 4)
    done = {"done_steps": 3, "done_samples": 12}
    by_steps = make_plan(OptimizationArguments(max_steps=5), BATCH, rows, 4, **done)
    assert (by_steps.total_steps, by_steps.num_samples) == (5, 12 + 2 * 8)
    by_epochs = make_plan(OptimizationArguments(), BATCH, rows, 4, **done)
    assert (by_epochs.total_steps, by_epochs.num_samples) == (3 + 11, 100)


def test_a_stream_needs_a_number_of_steps() -> None:
    made = make_plan(OptimizationArguments(max_steps=5), BATCH, None, 4)
    assert (made.total_steps, made.num_samples, made.epoch(40)) == (5, 40, None)
    assert made.lines()[0] == "Rows     a stream of 4 tokens"
    with pytest.raises(PlanError, match="give --max_steps"):
        make_plan(OptimizationArguments(), BATCH, None, 4)


def test_a_mixture_says_how_often_each_source_is_read() -> None:
    sources = {name: StreamRows(TokenArray(np.zeros(40, np.uint16)), 4) for name in ("a", "b")}
    rows = MixtureRows(sources, {"a": 3, "b": 1})
    lines = make_plan(OptimizationArguments(max_steps=5), BATCH, rows, 4).lines()
    assert "Mixture  a 75.0% = 3.00 epochs; b 25.0% = 1.00 epochs" in lines


def test_less_than_one_row_is_refused() -> None:
    with pytest.raises(PlanError, match="has 3 tokens and makes not one row of 4"):
        plan(num_tokens=3)


def test_a_warmup_without_an_end_is_refused() -> None:
    with pytest.raises(PlanError, match="--warmup_steps 13 leaves nothing of the 13 steps"):
        plan(warmup_steps=13)


def test_the_decay_can_begin_at_once() -> None:
    shape = "warmup-stable-decay"
    settings: dict[str, Any] = {"lr_scheduler_type": shape, "max_steps": 20, "lr_decay_steps": 4}
    planned, early = plan(10_000, **settings), plan(10_000, **settings, decay_from=9)
    assert (early.total_steps, early.num_samples) == (13, 13 * 8)
    ends = [planned.schedule.at(step) for step in range(16, 20)]
    assert [early.schedule.at(step) for step in range(9, 13)] == ends
    assert early.schedule.at(8) == planned.schedule.at(8)
    done = {"done_steps": 10, "done_samples": 96}  # 16 samples were passed over
    later = plan(10_000, **settings, **done, decay_from=9)
    assert (later.schedule, later.num_samples) == (early.schedule, 96 + 3 * 8)
    late = plan(10_000, **settings, decay_from=16)  # by then it begins anyway
    assert (late.schedule, late.num_samples) == (planned.schedule, planned.num_samples)
    cosine = plan(10_000, max_steps=20, decay_from=9)
    assert (cosine.total_steps, cosine.num_samples) == (20, 20 * 8)


def test_hours_go_on_through_the_data_until_the_steps_are_known() -> None:
    open_plan = plan(max_train_hours=2.0, num_train_epochs=1.0)
    assert open_plan.is_open
    assert open_plan.lines()[-1] == "Length   2 hours of training: the steps are counted on the way"
    arguments = OptimizationArguments(max_train_hours=2.0, max_steps=900)
    rows = StreamRows(TokenArray(np.zeros(403, np.uint16)), 4)
    laid = DeadlineState(2.0, total_steps=500, anchor=(100, 0.25))
    made = make_plan(arguments, BATCH, rows, 4, laid=laid, done_steps=100, done_samples=800)
    assert (made.total_steps, made.num_samples, made.is_open) == (500, 900 * 8, False)
    assert made.schedule.at(100) == LearningRateSchedule(
        "cosine", arguments.learning_rate, 0, None, 400, 0.1
    ).at(100)
    assert make_plan(arguments, BATCH, None, 4).total_steps == 900
    assert make_plan(OptimizationArguments(max_train_hours=2.0), BATCH, None, 4).is_open
