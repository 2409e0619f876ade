"""Where a run stands: plain data that a checkpoint keeps as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_training.durable import write_json


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
    evals_without_better: int = 0
    evaluated_step: int = -1
    decay_from: int | None = None
    deadline: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    logged_loss_sum: float = 0.0
    logged_tokens: int = 0

    def note_evaluation(self, loss: float, min_delta: float) -> bool:
        """Takes in a validation loss in nats per token; true if it is the best so far.

        A loss that is lower by less than `min_delta` still counts as an evaluation without a
        better one, so that creeping gains cannot hold off early stopping for ever.
        """
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        is_better = self.best_loss is None or loss < self.best_loss - min_delta
        if math.isnan(loss) or not is_better:
            self.evals_without_better += 1
            return False
        self.best_loss, self.best_step = loss, self.step
        self.evals_without_better = 0
        return True

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
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no state of a run: {error}") from error
