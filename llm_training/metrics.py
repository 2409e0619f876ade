"""What is measured beside the loss: metrics from sums, and those that `evaluate` loads.

`evaluate` takes a second or more to import: that is done when the first metric is computed.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_training.evaluation_checks import LOCAL_METRICS
from llm_training.imports import no_garbage_collection

if TYPE_CHECKING:
    from evaluate import EvaluationModule

# Logged of every evaluation; no metric may give its results these names.
ALWAYS_LOGGED = ("loss", "loss_stderr", "tokens")
# As trackers take them.
RESULT_NAME = re.compile(r"[\w. :/-]+")
# What a metric is tried with: three classes, since tokens are of more than two.
TRIAL_GUESSES, TRIAL_TARGETS = (0, 1, 2, 1), (0, 1, 1, 2)


class MetricError(ValueError):
    """A metric cannot be had or computed; the message says which, why, and what to do."""


@dataclass(frozen=True)
class TokenSums:
    """What the predicted tokens of an evaluation, or of one source in it, add up to.

    Attributes:
        loss: in nats.
        tokens: how many are predicted.
        correct: whose likeliest guess is right; 0 where nobody asked.
        text_bytes: of the text that they stand for, in UTF-8; 0 where nobody knows.
    """

    loss: float
    tokens: int
    correct: int
    text_bytes: int


def are_guesses_needed(names: Sequence[str]) -> bool:
    """Whether these metrics need to know the likeliest tokens."""
    return "token_accuracy" in names or bool(names_of_others(names))


def names_of_others(names: Sequence[str]) -> list[str]:
    """The metrics that are left to `evaluate`."""
    return [name for name in names if name not in LOCAL_METRICS]


def local_values(names: Sequence[str], sums: TokenSums) -> dict[str, float]:
    """The metrics among `names` that follow from sums, in their order.

    Bits per byte are absent where nobody knows the bytes.
    """
    columns: dict[str, dict[str, Any]] = {
        "perplexity": {"loss_sum": sums.loss, "tokens": sums.tokens},
        "bits_per_byte": {"loss_sum": sums.loss, "text_bytes": sums.text_bytes},
        "token_accuracy": {"correct": sums.correct, "tokens": sums.tokens},
    }
    found = {}
    for name in names:
        if name in columns and not (name == "bits_per_byte" and sums.text_bytes == 0):
            metric = _load(name)
            metric.add(**columns[name])
            found[name] = float(metric.compute()[name])
    return found


class IdMetrics:
    """Metrics of `evaluate`, fed with token ids batch by batch, on one process.

    What they are fed with waits in files for temporary data, 16 bytes a token; what a metric does
    with all of it in the end is its own affair.
    """

    def __init__(self, names: Sequence[str]):
        """Takes metrics that `check_metrics` let pass."""
        self._metrics = {name: _load(name) for name in names}
        self._is_empty = True

    def add(self, guesses: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Takes in the likeliest token of some positions and the right one, both (N,)."""
        if len(targets):
            self._is_empty = False
            for metric in self._metrics.values():
                metric.add_batch(predictions=guesses, references=targets)

    def compute(self) -> dict[str, float]:
        """Every number that the metrics return, by its name; afterwards they are empty again.

        Raises:
            MetricError: one of them fails.
        """
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            if not self._is_empty:
                found |= _numbers_of(name, metric)
        self._is_empty = True
        return found

    @staticmethod
    def discard() -> None:
        """Forgets what an evaluation that broke off has fed."""
        _load.cache_clear()


def check_metrics(names: Sequence[str]) -> list[str]:
    """Loads what `evaluate` is to compute and tries it, so that no run ends by it later.

    Returns:
        The names under which the results of all `names` will be logged, without `eval/`.

    Raises:
        MetricError: a metric that cannot be loaded, does not take token ids, or whose results
            cannot be logged by their names.
    """
    keys = [name for name in names if name in LOCAL_METRICS]
    taken = {*ALWAYS_LOGGED, *LOCAL_METRICS}
    for name in names_of_others(names):
        metrics = IdMetrics([name])
        try:
            metrics.add(np.array(TRIAL_GUESSES), np.array(TRIAL_TARGETS))
            results = metrics.compute()
        except Exception as error:  # scripts of other people fail in many ways
            if isinstance(error, MetricError):
                raise
            raise MetricError(
                f"eval_metrics: {name} does not take predictions and references that are token ids"
                f" (integers): {error} Drop it, or wrap it in a metric of your own that does."
            ) from error
        for key in results:
            if key in taken or not RESULT_NAME.fullmatch(key):
                problem = "which is taken already" if key in taken else "which cannot be logged"
                raise MetricError(
                    f"eval_metrics: {name} calls a result {key!r}, {problem}. Drop it, or wrap it"
                    " in a metric of your own that gives the result another name."
                )
        keys += results
        taken |= results.keys()
    return keys


def _numbers_of(name: str, metric: EvaluationModule) -> dict[str, float]:
    try:
        results: Mapping[str, Any] = metric.compute()
    except Exception as error:  # scripts of other people fail in many ways
        raise MetricError(
            f"eval_metrics: {name} cannot be computed from token ids: {error} Drop it, or wrap it"
            " in a metric of your own that can."
        ) from error
    numbers = {key: value for key, value in results.items() if _is_number(value)}
    if not numbers:
        raise MetricError(
            f"eval_metrics: {name} returns no number that could be logged ({', '.join(results)})."
            " Drop it."
        )
    return {key: float(value) for key, value in numbers.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


@functools.cache
def _load(name: str) -> EvaluationModule:
    """A metric by its name, loaded once: it is empty again whenever it was computed.

    Raises:
        MetricError: it cannot be loaded.
    """
    with no_garbage_collection():
        import evaluate

        from llm_training.local_metrics import LOCAL_CLASSES
    if name in LOCAL_CLASSES:
        return LOCAL_CLASSES[name](cache_dir=_folder(), keep_in_memory=True)
    try:
        path = str(Path(name).expanduser())
        return evaluate.load(path, module_type="metric", cache_dir=_folder())
    except Exception as error:  # scripts of other people fail in many ways
        raise MetricError(
            f"eval_metrics: {name} cannot be loaded: {error} Give the path of a metric's Python"
            " file, or of a folder that holds a file of its name; a bare name is one of"
            f" {', '.join(LOCAL_METRICS)}, or is looked for on the Hugging Face hub, which must be"
            " reachable."
        ) from error


@functools.cache
def _folder() -> str:
    """Where metrics keep what they are fed with; it goes when this process ends."""
    _folders.append(tempfile.TemporaryDirectory(prefix="eval_metrics_"))
    return _folders[-1].name


_folders: list[tempfile.TemporaryDirectory[str]] = []
