"""What is known before step 0: how long the run is, and what it will do with its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from arguments import BatchSizes, OptimizationArguments
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import Rows
from llm_training.deadline import OPEN_STEPS, DeadlineState
from llm_training.schedules import LearningRateSchedule


class PlanError(ValueError):
    """The data and the settings make no run; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """The length and shape of a run.

    Attributes:
        block_size: tokens of a row.
        rows: the rows of one epoch; None for a stream, whose length nobody knows.
        total_steps: optimizer steps; of a run that is limited by hours, as they are laid out by
            now, `OPEN_STEPS` before anything is known.
        num_samples: rows of the whole run; the last step is shorter if they do not divide. With
            hours, it is those that `max_steps` would take, if given, else more than any run has.
        hours: of training, where they limit the run.
    """

    batch: BatchSizes
    block_size: int
    rows: Rows | None
    total_steps: int
    num_samples: int
    schedule: LearningRateSchedule
    hours: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is not known yet how many steps the run has."""
        return self.total_steps >= OPEN_STEPS

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one full step reads over all processes."""
        return self.batch.global_batch * self.block_size

    def epoch(self, samples: int) -> float | None:
        """Passes over the data after so many samples; None for a stream."""
        return samples / self.rows.num_rows if self.rows else None

    def lines(self) -> list[str]:
        """The plan for a person, before the run begins."""
        batch = self.batch
        rows = f"{self.rows.num_rows:,}" if self.rows else "a stream"
        lines = [f"Rows     {rows} of {self.block_size} tokens"]
        if isinstance(self.rows, MixtureRows):
            parts = self.rows.describe(self.num_samples)
            if self.is_open:
                parts = [part.partition(" = ")[0] for part in parts]
            lines.append(f"Mixture  {'; '.join(parts)}")
        return [
            *lines,
            f"Batch    {batch.global_batch} rows = {batch.per_device} per device"
            f" x {batch.accumulation} accumulated x {batch.processes} processes"
            f" = {self.tokens_per_step:,} tokens a step",
            f"Length   {self.length()}",
            *self.rate_lines((0, self.schedule.warmup_steps, self.total_steps - 1)),
        ]

    def rate_lines(self, steps: Sequence[int]) -> list[str]:
        """The learning rate at these steps, from 0; nothing while the length is not known.

        Of a schedule that was laid anew, only what comes after that is known. Told are the numbers
        that the steps have in the log.
        """
        if self.is_open:
            return []
        first = self.schedule.anchor[0] if self.schedule.anchor else 0
        known = sorted({max(step, first) for step in steps})
        rates = [f"{self.schedule.at(step):.2e} at step {step + 1:,}" for step in known]
        return [f"Rate     {', '.join(rates)}"]

    def length(self) -> str:
        """Steps, epochs and tokens of the whole run, or its hours, for a person."""
        if self.hours is None:
            epochs = f"{self.epoch(self.num_samples):.2f} epochs = " if self.rows else ""
            tokens = self.num_samples * self.block_size
            return f"{self.total_steps:,} steps = {epochs}{tokens:,} tokens"
        if self.is_open:
            return f"{self.hours:g} hours of training: the steps are counted on the way"
        return f"{self.hours:g} hours of training, or {self.total_steps:,} steps as it looks now"


def make_plan(
    arguments: OptimizationArguments,
    batch: BatchSizes,
    rows: Rows | None,
    block_size: int,
    *,
    done_steps: int = 0,
    done_samples: int = 0,
    decay_from: int | None = None,
    laid: DeadlineState | None = None,
) -> Plan:
    """Lays the run out.

    Windows run on over the end of an epoch; only the last step of a run that is measured in
    epochs can be short. A run that is limited by hours goes on through as many epochs as they hold.

    Args:
        rows: of one epoch; None for a stream.
        done_steps, done_samples: where a resumed run stands; its steps may have been of another
            size, and samples passed over.
        decay_from: step at which the decay of warmup-stable-decay begins, if that is sooner than
            by the settings; the run ends with it. With hours, `laid` tells it.
        laid: with max_train_hours, how many steps were found to fit, and where the decay stands.

    Raises:
        PlanError: no row, or a schedule that does not fit into the steps.
    """
    if rows is not None and rows.num_rows == 0:
        tokens = sum(account.tokens for account in rows.accounts().values())
        raise PlanError(
            f"The training data has {tokens:,} tokens and makes not one row of {block_size}. Give"
            " more text or a smaller --block_size."
        )
    if arguments.max_train_hours is not None:
        most_steps = arguments.max_steps or OPEN_STEPS
        total_steps = min(most_steps, (laid and laid.total_steps) or OPEN_STEPS)
        num_samples = done_samples + (most_steps - done_steps) * batch.global_batch
    elif arguments.max_steps is not None:
        total_steps = arguments.max_steps
        num_samples = done_samples + (total_steps - done_steps) * batch.global_batch
    elif rows is not None:
        num_samples = max(1, round(arguments.num_train_epochs * rows.num_rows))
        left = max(0, num_samples - done_samples)
        total_steps = done_steps + math.ceil(left / batch.global_batch)
    else:
        raise PlanError("A stream has no end that is known beforehand: give --max_steps.")
    is_fixed = laid is None or laid.total_steps is None
    if is_fixed and arguments.warmup_steps >= total_steps and arguments.warmup_steps > 0:
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
        anchor=laid.anchor if laid else None,
    )
    if decay_from is not None and arguments.max_train_hours is None:
        schedule = schedule.decay_now(decay_from)
        total_steps = schedule.total_steps
        left = (total_steps - done_steps) * batch.global_batch
        num_samples = min(num_samples, done_samples + left)
    return Plan(
        batch=batch,
        block_size=block_size,
        rows=rows,
        total_steps=total_steps,
        num_samples=num_samples,
        schedule=schedule,
        hours=arguments.max_train_hours,
    )
