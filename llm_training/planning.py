"""What is known before step 0: how long the run is, and what it will do with its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from arguments import BatchSizes, OptimizationArguments
from llm_training.data.dataset import TokenRows
from llm_training.schedules import LearningRateSchedule


class PlanError(ValueError):
    """The data and the settings make no run; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """The length and shape of a run.

    Attributes:
        total_steps: optimizer steps.
        num_samples: rows of the whole run; the last step is shorter if they do not divide.
        num_rows: rows of one epoch, `block_size` tokens each.
        leftover_tokens: tokens at the end of the stream that fill no row.
    """

    batch: BatchSizes
    block_size: int
    num_rows: int
    leftover_tokens: int
    total_steps: int
    num_samples: int
    schedule: LearningRateSchedule

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one full step reads over all processes."""
        return self.batch.global_batch * self.block_size

    def lines(self) -> list[str]:
        """The plan for a person, before the run begins."""
        batch = self.batch
        return [
            f"Rows     {self.num_rows:,} of {self.block_size} tokens;"
            f" {self.leftover_tokens} tokens at the end fill no row",
            f"Batch    {batch.global_batch} rows = {batch.per_device} per device"
            f" x {batch.accumulation} accumulated x {batch.processes} processes"
            f" = {self.tokens_per_step:,} tokens a step",
            f"Length   {self.total_steps:,} steps = {self.num_samples / self.num_rows:.2f} epochs"
            f" = {self.num_samples * self.block_size:,} tokens",
        ]


def make_plan(
    arguments: OptimizationArguments,
    batch: BatchSizes,
    rows: TokenRows,
) -> Plan:
    """Lays the run out.

    Windows run on over the end of an epoch; only the last step of a run that is measured in
    epochs can be short.

    Raises:
        PlanError: no row, or a schedule that does not fit into the steps.
    """
    if rows.num_rows == 0:
        raise PlanError(
            f"The training data has {rows.num_leftover_tokens} tokens, less than one row of"
            f" {rows.block_size}. Give more text or a smaller --block_size."
        )
    if arguments.max_steps is not None:
        total_steps = arguments.max_steps
        num_samples = total_steps * batch.global_batch
    else:
        num_samples = max(1, round(arguments.num_train_epochs * rows.num_rows))
        total_steps = math.ceil(num_samples / batch.global_batch)
    if arguments.warmup_steps >= total_steps and arguments.warmup_steps > 0:
        raise PlanError(
            f"--warmup_steps {arguments.warmup_steps} leaves nothing of the {total_steps} steps of"
            " this run. Give fewer, or a longer run (--max_steps, --num_train_epochs)."
        )
    schedule = LearningRateSchedule(
        kind=arguments.lr_scheduler_type,
        peak=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        decay_steps=arguments.lr_decay_steps,
        total_steps=total_steps,
        min_ratio=arguments.min_lr_ratio,
    )
    return Plan(
        batch=batch,
        block_size=rows.block_size,
        num_rows=rows.num_rows,
        leftover_tokens=rows.num_leftover_tokens,
        total_steps=total_steps,
        num_samples=num_samples,
        schedule=schedule,
    )
