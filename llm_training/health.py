"""Judges each step by its loss and its gradient norm: whether to apply it, leave it out, or stop.

Pure logic over plain numbers. They must be the same on every rank, so that all ranks judge alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from llm_training.durable import write_json

MAD_TO_DEVIATION = 1.4826  # of normally distributed values
# A curve without noise has deviations of nothing; below 1% of the median nothing is a spike.
SMALLEST_DEVIATION = 0.01
# fp16's loss scale halves at every overflow; this often in a row, the numbers are broken.
MAX_OVERFLOWS = 50

HELPS = (
    "What usually helps: a lower --learning_rate, more --warmup_steps, --max_grad_norm 1.0, or"
    " --mixed_precision bf16 or fp32 in place of fp16."
)


class UnhealthyError(ArithmeticError):
    """Too many steps in a row had to be left out; the weights are those of the last good step."""


class NonFiniteError(UnhealthyError):
    """The loss or the gradient norm is NaN or infinite; the weights are those of the last step."""


class Kind(Enum):
    """What a step is."""

    OK = "ok"
    NON_FINITE = "non-finite"
    LOSS_SPIKE = "loss spike"
    NORM_SPIKE = "norm spike"
    EMPTY = "empty"


@dataclass(frozen=True)
class Verdict:
    """What a step is, and the number that says so, in words for the log ("" where it is OK)."""

    kind: Kind
    reason: str = ""

    @property
    def is_ok(self) -> bool:
        return self.kind is Kind.OK


OK = Verdict(Kind.OK)


@dataclass
class HealthState:
    """What the monitor must know to go on; `dataclasses.asdict` of it goes into checkpoints.

    Attributes:
        num_skipped: steps left out in all.
        skipped_in_row: of them those since the last good step.
        row_step, row_sample: where that row began: its first step and sample; None without one.
        overflows_in_row: steps that fp16's loss scaler has left out since the last good step.
        losses, norms: of the last good steps, oldest first.
        rewinds: how often the run went back to a checkpoint and passed over samples.
        passed_over: their ranges, each [from, to) in the order of the run.
    """

    num_skipped: int = 0
    skipped_in_row: int = 0
    row_step: int | None = None
    row_sample: int | None = None
    overflows_in_row: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rewinds: int = 0
    passed_over: list[list[int]] = field(default_factory=list)


class HealthMonitor:
    """Holds each step against the good ones before it.

    For each step: `judge`, or `judge_loss` and after the backward pass `judge_norm`; then one of
    `note_good`, `note_skipped` and `note_overflow`.

    Args:
        state: where the run stands; it is changed in place.
        max_skipped: steps in a row that may be left out; 0 stops the run at the first.
        spike_deviations: robust standard deviations above the median from which on a finite value
            is a spike; None: none is.
        window: good steps that are looked back on.
        min_history: good steps before which nothing finite is a spike.
    """

    def __init__(
        self,
        state: HealthState,
        max_skipped: int,
        spike_deviations: float | None,
        window: int = 128,
        min_history: int = 32,
    ):
        self.state = state
        self.max_skipped = max_skipped
        self.spike_deviations = spike_deviations
        self.window = window
        self.min_history = min_history

    def judge(self, loss: float, norm: float) -> Verdict:
        """Judges a step whose loss and gradient norm are both known."""
        verdict = self.judge_loss(loss)
        return self.judge_norm(norm) if verdict.is_ok else verdict

    def judge_loss(self, loss: float) -> Verdict:
        """Judges the mean loss of a step, in nats per token over all ranks."""
        return self._judge("loss", loss, self.state.losses, Kind.LOSS_SPIKE)

    def judge_norm(self, norm: float) -> Verdict:
        """Judges the gradient norm of a step, as it was before clipping."""
        return self._judge("gradient norm", norm, self.state.norms, Kind.NORM_SPIKE)

    def _judge(self, name: str, value: float, history: list[float], kind: Kind) -> Verdict:
        if not math.isfinite(value):
            return Verdict(Kind.NON_FINITE, f"{name} {value}")
        if value <= self._ceiling(history):
            return OK
        median, deviations = statistics.median(history), deviations_above(value, history)
        return Verdict(kind, f"{name} {value:.4g}, {deviations:.1f} deviations above {median:.4g}")

    def ceilings(self) -> tuple[float, float]:
        """The loss and the gradient norm above which the next step is a spike, if any is."""
        return self._ceiling(self.state.losses), self._ceiling(self.state.norms)

    def _ceiling(self, history: list[float]) -> float:
        if self.spike_deviations is None or len(history) < self.min_history:
            return math.inf
        # So many in a row are no spike but another level.
        if self.state.skipped_in_row >= self.window // 2:
            return math.inf
        median, deviation = robust_deviation(history)
        return median + self.spike_deviations * deviation if deviation else math.inf

    def note_good(self, loss: float, norm: float) -> None:
        """Takes in a step that was applied; the rows of the others end with it."""
        state = self.state
        if state.skipped_in_row >= self.window // 2:
            state.losses, state.norms = [], []  # of the level before
        state.losses = [*state.losses, loss][-self.window :]
        state.norms = [*state.norms, norm][-self.window :]
        self._end_rows()

    def note_skipped(
        self, step: int, samples: tuple[int, int], verdict: Verdict, last_checkpoint: str
    ) -> str:
        """Takes in a step that was left out; returns a line for the log.

        Args:
            step: its number, as the log counts.
            samples: its range [from, to) in the order of the run.
            last_checkpoint: for a person; "" where there is none.

        Raises:
            NonFiniteError, UnhealthyError: more than `max_skipped` in a row.
        """
        state = self.state
        state.num_skipped += 1
        state.skipped_in_row += 1
        if state.row_step is None or state.row_sample is None:
            state.row_step, state.row_sample = step, samples[0]
        if state.skipped_in_row > self.max_skipped:
            error = NonFiniteError if verdict.kind is Kind.NON_FINITE else UnhealthyError
            steps, of_samples = span(state.row_step, step), span(state.row_sample, samples[1] - 1)
            raise error(
                f"{verdict.reason[:1].upper()}{verdict.reason[1:]} in step {step}:"
                f" {state.skipped_in_row} in a row had to be left out (steps {steps}, samples"
                f" {of_samples}), and {self.max_skipped} may be. None of them was applied."
                f" {_about(last_checkpoint)} {HELPS}"
            )
        return (
            f"step {step} left out: {verdict.reason} (samples {span(samples[0], samples[1] - 1)};"
            f" {state.skipped_in_row} in a row, {state.num_skipped} in all)"
        )

    def note_overflow(self, step: int, samples: tuple[int, int], last_checkpoint: str) -> str:
        """Takes in a step that fp16's loss scaler has left out; returns a line for the log.

        These are usual, above all in the beginning, and count for themselves.

        Raises:
            NonFiniteError: `MAX_OVERFLOWS` in a row.
        """
        self.state.overflows_in_row += 1
        if self.state.overflows_in_row >= MAX_OVERFLOWS:
            raise NonFiniteError(
                f"The gradients overflowed in {MAX_OVERFLOWS} steps in a row, up to step {step}"
                f" (samples to {samples[1] - 1}), whatever the loss scale. None of them was"
                f" applied. {_about(last_checkpoint)} {HELPS}"
            )
        return (
            f"step {step} left out: fp16 overflow, the loss scale falls (samples"
            f" {span(samples[0], samples[1] - 1)}; {self.state.overflows_in_row} in a row)"
        )

    def _end_rows(self) -> None:
        state = self.state
        state.skipped_in_row = state.overflows_in_row = 0
        state.row_step = state.row_sample = None


def deviations_above(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median; below it, less than 0.

    Of a history of zeros nothing is said: 0.
    """
    median, deviation = robust_deviation(history)
    return (value - median) / deviation if deviation else 0.0


def robust_deviation(history: Sequence[float]) -> tuple[float, float]:
    """The median, and how far values usually lie from it.

    That is 1.4826 times the median absolute deviation, which single outliers do not move, and at
    least 1% of the median.

    Source: Leys et al. 2013, "Detecting outliers: Do not use standard deviation around the mean,
        use absolute deviation around the median" (doi:10.1016/j.jesp.2013.03.013).
    """
    median = statistics.median(history)
    spread = statistics.median(abs(known - median) for known in history)
    return median, max(MAD_TO_DEVIATION * spread, SMALLEST_DEVIATION * abs(median))


def span(first: int, last: int) -> str:
    """`7` or `7-9`."""
    return str(first) if first == last else f"{first}-{last}"


def _about(last_checkpoint: str) -> str:
    if not last_checkpoint:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {last_checkpoint}; the same command continues from it."


# ----------------------------------------------------------------------------------------- rewind


def plan_rewind(
    state: HealthState, *, checkpoint_sample: int, end: int, margin: int, max_rewinds: int
) -> tuple[int, int] | None:
    """The samples to pass over when the run goes back to a checkpoint; None: it must stop instead.

    What spoilt the run may lie before the first step that was left out, hence the margin.

    Args:
        state: as it was when too many steps had been left out.
        checkpoint_sample: position of the checkpoint to go back to, in samples.
        end: position behind the last step that was left out.
        margin: samples before the first of them that are passed over as well, full steps.
        max_rewinds: how often a run may do so.

    Source: Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), sec. 5.1.
    """
    if state.row_sample is None or state.rewinds >= max_rewinds:
        return None
    return max(checkpoint_sample, state.row_sample - margin), end


def note_rewind(at_checkpoint: HealthState, before: HealthState, passed: tuple[int, int]) -> None:
    """Changes the state that the checkpoint kept: what happened after it stays counted."""
    at_checkpoint.num_skipped = before.num_skipped
    at_checkpoint.rewinds = before.rewinds + 1
    at_checkpoint.passed_over = [*before.passed_over, list(passed)]


def next_position(position: int, step_size: int, passed_over: Sequence[Sequence[int]]) -> int:
    """Where the next step reads: the first place from `position` on where it meets no such range.

    Args:
        position: samples behind the run.
        step_size: samples of a step.
        passed_over: ranges [from, to).
    """
    for start, end in sorted(map(tuple, passed_over)):
        if position < end and position + step_size > start:
            position = end
    return position


# ------------------------------------------------------------------------------------------- dump


def write_dump(
    path: Path,
    *,
    step: int,
    sample_ids: Sequence[int],
    losses: Sequence[float],
    norms_by_layer: dict[str, float],
    texts: Sequence[str],
) -> None:
    """Writes what is known of a bad step as JSON; on rank 0.

    Args:
        sample_ids: the rows of the step, in the order of the run.
        losses: mean loss of each micro-batch or row that this rank knows, nats per token.
        norms_by_layer: `updates.norms_by_layer`; empty where the loss alone was judged.
        texts: the rows as text, where there is a tokenizer.
    """
    content: dict[str, Any] = {
        "step": step,
        "sample_ids": [int(number) for number in sample_ids],
        "losses": [_for_json(loss) for loss in losses],
        "norms_by_layer": {layer: _for_json(norm) for layer, norm in norms_by_layer.items()},
        "texts": list(texts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _for_json(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as words."""
    return float(value) if math.isfinite(value) else str(float(value))
