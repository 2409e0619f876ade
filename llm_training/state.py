"""Where a run stands: plain data that a checkpoint keeps as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_training.durable import write_json


@dataclass(frozen=True)
class Aim:
    """What makes one evaluation better than another.

    Attributes:
        metric: as it is logged, such as `eval/loss`.
        rises: whether it should rise.
        min_delta: by how much it must be better for early stopping, in its own units or, with
            `in_standard_errors`, in those of the difference.
    """

    metric: str = "eval/loss"
    rises: bool = False
    min_delta: float = 0.0
    in_standard_errors: bool = False


@dataclass(frozen=True)
class Result:
    """What an evaluation came to in the metric that decides.

    Attributes:
        metric, rises: as in `Aim`; results of another aim are not held against each other.
        rows: what it was measured on; nor are results of other rows. "": nobody noted it.
        group_losses: nats of each group of rows, where standard errors are asked for.
        group_tokens: predicted tokens of each.
    """

    metric: str
    rises: bool
    value: float
    step: int
    rows: str = ""
    group_losses: tuple[float, ...] = ()
    group_tokens: tuple[int, ...] = ()

    def is_comparable(self, other: Result) -> bool:
        """Whether the two measure the same on the same rows, as far as it was noted."""
        is_same_aim = (self.metric, self.rises) == (other.metric, other.rises)
        return is_same_aim and ("" in (self.rows, other.rows) or self.rows == other.rows)

    def is_better(self, before: Result, by: float = 0.0) -> bool:
        """Whether it is better than `before` by more than `by`; NaN is better than nothing."""
        if self.rises:
            return self.value > before.value + by
        return self.value < before.value - by

    def summary(self) -> dict[str, str | float]:
        """What a person is told of it."""
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def is_paired_with(self, other: Result) -> bool:
        """Whether the two know the losses of the same groups."""
        return bool(self.group_tokens) and self.group_tokens == other.group_tokens


# (difference, its standard error) of two evaluations of the same groups, from what each lost in
# every group, now and before, and from the tokens in it.
Paired = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]], tuple[float, float]
]


@dataclass
class TrainState:
    """All that the loop must know to go on; weights, optimizer and random state lie beside it.

    Attributes:
        step: optimizer steps done.
        samples: rows consumed over all ranks: the position in the data.
        tokens: predicted tokens over all ranks.
        sample_hash: SHA-256 over the numbers of all rows consumed so far, in their order; the same
            for every split of the steps over ranks and micro-batches.
        stream: of streamed data, what it takes to go on from this position (`StreamWindows`).
        first_loss, last_loss: validation loss in nats per token, at the start and most recently.
        best_loss: the lowest validation loss so far, reached at `best_step`.
        best: the best result so far in the metric that decides, which may be another.
        reference: the result that later ones must beat by the aim's `min_delta`.
        evals_without_better: evaluations in a row that did not beat it.
        evaluated_step: of the last evaluation that was done; -1: none.
        decay_from: step at which a person had the final decay begin; None: where it was planned.
        deadline: what `Deadline` keeps, as plain values; None: there are no hours to keep to.
        health: what `HealthMonitor` keeps, as plain values.
        seed: of weights, order and dropout.
        logged_loss_sum, logged_tokens: loss in nats and predicted tokens since the last line of
            the log, so that a resumed run logs the same mean.
    """

    seed: int
    step: int = 0
    samples: int = 0
    tokens: int = 0
    sample_hash: str = ""
    stream: dict[str, Any] | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    best: Result | None = None
    reference: Result | None = None
    evals_without_better: int = 0
    evaluated_step: int = -1
    decay_from: int | None = None
    deadline: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    logged_loss_sum: float = 0.0
    logged_tokens: int = 0

    def note_loss(self, loss: float) -> None:
        """Takes in a validation loss in nats per token."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        if not math.isnan(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, self.step

    def note_result(self, result: Result, aim: Aim, paired: Paired) -> bool:
        """Takes in what an evaluation came to; true if it is the best so far.

        One that is better than the reference by no more than `min_delta` still counts as an
        evaluation without a better one, so that creeping gains cannot hold off early stopping for
        ever. Where another metric decides than before, or other rows, the count begins anew.
        """
        if self.best is not None and not result.is_comparable(self.best):
            self.best = None
        if self.reference is not None and not result.is_comparable(self.reference):
            self.reference, self.evals_without_better = None, 0
        if math.isnan(result.value):
            self.evals_without_better += 1
            return False
        if self.reference is None or _is_beaten(self.reference, result, aim, paired):
            self.reference, self.evals_without_better = result, 0
        else:
            self.evals_without_better += 1
        is_best = self.best is None or result.is_better(self.best)
        if is_best:
            self.best = dataclasses.replace(result, group_losses=(), group_tokens=())
        return is_best

    def note_samples(self, ids: NDArray[np.int64]) -> None:
        """Takes the rows of one step, (N,) int64 in the order of the run, into `sample_hash`."""
        content = bytes.fromhex(self.sample_hash) + ids.astype("<i8").tobytes()
        self.sample_hash = hashlib.sha256(content).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the state as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> TrainState:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is no JSON object of these fields.
        """
        try:
            fields = dict(**json.loads(path.read_text(encoding="utf-8")))
            return cls(**fields | {name: _read_result(name, fields) for name in _RESULTS})
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no state of a run: {error}") from error


_RESULTS = ("best", "reference")


def _read_result(name: str, fields: dict[str, Any]) -> Result | None:
    """One of `_RESULTS`; checkpoints of before there were any went by the validation loss alone."""
    if name not in fields and fields.get("best_loss") is not None:
        return Result("eval/loss", False, fields["best_loss"], fields["best_step"])
    content = fields.get(name)
    if content is None:
        return None
    groups = {key: tuple(content[key]) for key in ("group_losses", "group_tokens")}
    return Result(**content | groups)


def _is_beaten(reference: Result, result: Result, aim: Aim, paired: Paired) -> bool:
    """Whether `result` is better by more than what the aim asks for."""
    # By how much infinity was beaten has no error.
    if not aim.in_standard_errors or math.isinf(reference.value):
        return result.is_better(reference, aim.min_delta)
    if not result.is_paired_with(reference):  # it was noted before standard errors were asked for
        return True
    difference, error = paired(
        np.array(result.group_losses),
        np.array(reference.group_losses),
        np.array(result.group_tokens, np.int64),
    )
    gain = difference if aim.rises else -difference
    return gain > aim.min_delta * error
