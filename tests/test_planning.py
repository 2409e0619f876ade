"""The plan says before step 0 how long the run is, or why it cannot be."""

import numpy as np
import pytest

from arguments import BatchSizes, OptimizationArguments
from llm_training.data.dataset import TokenRows
from llm_training.planning import Plan, PlanError, make_plan

BATCH = BatchSizes(per_device=2, accumulation=2, processes=2, global_batch=8)


def plan(num_tokens: int = 403, **settings: object) -> Plan:
    rows = TokenRows(np.zeros(num_tokens, np.uint16), 4, keep_last=False)
    return make_plan(OptimizationArguments(**settings), BATCH, rows)  # type: ignore[arg-type]


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
def test_length(settings: dict[str, object], steps: int, samples: int) -> None:
    made = plan(**settings)
    assert (made.total_steps, made.num_samples) == (steps, samples)
    assert made.schedule.total_steps == steps


def test_leftover_tokens_are_said() -> None:
    assert any("3 tokens at the end fill no row" in line for line in plan().lines())


def test_less_than_one_row_is_refused() -> None:
    with pytest.raises(PlanError, match="has 3 tokens, less than one row of 4"):
        plan(num_tokens=3)


def test_a_warmup_without_an_end_is_refused() -> None:
    with pytest.raises(PlanError, match="--warmup_steps 13 leaves nothing of the 13 steps"):
        plan(warmup_steps=13)
