"""Proves that the time of a whole run follows from what a trial measured."""

from __future__ import annotations

import dataclasses
import math

import pytest

from arguments import Arguments, BatchSizes
from llm_training.planning import make_plan
from llm_training.trial import Measured, measured_from, trial_arguments, trial_lines

BATCH = BatchSizes(per_device=2, accumulation=2, processes=2, global_batch=8)
MEASURED = Measured(step=0.5, slowest=1.0, num_steps=4, evaluation=10.0, save=2.0)


def test_the_first_steps_do_not_count() -> None:
    found = measured_from([0.0, 9.0, 10.0, 11.0, 14.0], 16.0, None)
    assert found == Measured(step=1.0, slowest=3.0, num_steps=3, evaluation=None, save=2.0)
    assert math.isnan(measured_from([], 1.0, None).step)


@pytest.mark.parametrize(
    ("measured", "time"),
    [
        # 1000 steps, 10 saves, and 1 + 20 evaluations.
        (MEASURED, "12:10 for all 1,000 steps, 3:50 of it for 10 saves and 21 evaluations"),
        (
            dataclasses.replace(MEASURED, evaluation=None),
            "8:40 for all 1,000 steps, 0:20 of it for 10 saves and 0 evaluations",
        ),
    ],
)
def test_the_whole_run_takes(measured: Measured, time: str) -> None:
    arguments = Arguments(max_steps=1000, save_steps=100, eval_steps=50)
    plan = make_plan(arguments, BATCH, None, 64)
    speed, whole = trial_lines(measured, arguments, plan)
    assert "2 steps/s, 1k tokens/s; save 2.00 s" in speed
    assert time in whole


def test_of_a_run_of_hours_the_steps_are_told() -> None:
    arguments = Arguments(max_train_hours=1.0)
    plan = make_plan(arguments, BATCH, None, 64)
    _, time = trial_lines(MEASURED, arguments, plan)
    assert "about 7,200 steps fit into 1 hours" in time


def test_a_trial_is_the_run_with_few_steps() -> None:
    arguments = Arguments(max_train_hours=1.0, warmup_steps=50, dry_run_steps=5, block_size=32)
    trial = trial_arguments(arguments, "beside")
    assert (trial.max_steps, trial.warmup_steps, trial.report_to) == (7, 0, ["none"])
    assert (trial.output_dir, trial.block_size, trial.max_train_hours) == ("beside", 32, None)
