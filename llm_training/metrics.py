"""Metrics as local `evaluate.Metric` classes that take sums and counts and need no hub.

Importing `evaluate` takes seconds: import this module only when a metric is asked for.
"""

from __future__ import annotations

import datasets
import evaluate


class TokenAccuracy(evaluate.Metric):
    """Share of the predicted tokens whose likeliest guess is right.

    Fed with one (correct, total) pair of counts for a batch, so a validation set of any length
    takes no memory to speak of.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            features=datasets.Features(
                {"correct": datasets.Value("int64"), "total": datasets.Value("int64")}
            ),
        )

    def _compute(self, correct: list[int], total: list[int]) -> dict[str, float]:
        return {"token_accuracy": sum(correct) / max(1, sum(total))}


METRICS = {"token_accuracy": TokenAccuracy}
