"""Metrics as local `evaluate.Metric` classes that take sums and counts and need no hub.

Each takes rows of sums, one for a batch or for a whole evaluation, so a validation set of any
length takes no memory to speak of. Importing `evaluate` takes a second or more: import this module
only when a metric is asked for.
"""

from __future__ import annotations

import math
from typing import ClassVar

import datasets
import evaluate

# Beyond any loss of a model that works, e to its power would overflow.
LARGEST_LOSS = 700.0


class _SumMetric(evaluate.Metric):
    """A metric that is fed with `columns` of sums and returns a number by its own name."""

    columns: ClassVar[dict[str, str]]

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value(dtype) for name, dtype in self.columns.items()}
        return evaluate.MetricInfo(
            description=str(self.__doc__), citation="", features=datasets.Features(columns)
        )


class Perplexity(_SumMetric):
    """e to the power of the mean loss; infinite where that overflows."""

    columns: ClassVar = {"loss_sum": "float64", "tokens": "int64"}

    def _compute(self, loss_sum: list[float], tokens: list[int]) -> dict[str, float]:
        loss = sum(loss_sum) / max(1, sum(tokens))
        # A NaN is no larger than anything, and stays one.
        return {"perplexity": math.inf if loss > LARGEST_LOSS else math.exp(loss)}


class BitsPerByte(_SumMetric):
    """The loss in bits over the bytes of the text that is predicted, in UTF-8.

    It does not depend on the tokenizer, so models with different ones can be compared. What stands
    for no text, such as the end of a document, is predicted too: its loss counts, with no byte.
    """

    columns: ClassVar = {"loss_sum": "float64", "text_bytes": "int64"}

    def _compute(self, loss_sum: list[float], text_bytes: list[int]) -> dict[str, float]:
        return {"bits_per_byte": sum(loss_sum) / math.log(2) / sum(text_bytes)}


class TokenAccuracy(_SumMetric):
    """Share of the predicted tokens whose likeliest guess is right."""

    columns: ClassVar = {"correct": "int64", "tokens": "int64"}

    def _compute(self, correct: list[int], tokens: list[int]) -> dict[str, float]:
        return {"token_accuracy": sum(correct) / max(1, sum(tokens))}


LOCAL_CLASSES: dict[str, type[_SumMetric]] = {
    "perplexity": Perplexity,
    "bits_per_byte": BitsPerByte,
    "token_accuracy": TokenAccuracy,
}
