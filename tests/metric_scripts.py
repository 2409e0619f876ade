"""Metrics for `evaluate` as people write them: a file with a class."""

from __future__ import annotations

import textwrap
from pathlib import Path

TOKEN_IDS = "{'predictions': 'int64', 'references': 'int64'}"


def write_metric(path: Path, body: str, features: str | None = None) -> Path:
    """Writes a script whose `_compute(predictions, references)` has this body; returns its path.

    Args:
        features: Python text of a dict, the type of each input; None: both are int64.
    """
    script = f"""
        import datasets
        import evaluate
        import numpy as np

        class Metric(evaluate.Metric):
            def _info(self):
                types = {features or TOKEN_IDS}
                inputs = datasets.Features({{n: datasets.Value(t) for n, t in types.items()}})
                return evaluate.MetricInfo(
                    description="", citation="", inputs_description="", features=inputs
                )

            def _compute(self, predictions, references):
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = textwrap.dedent(script).strip() + "\n" + textwrap.indent(body, " " * 8) + "\n"
    path.write_text(text, encoding="utf-8")
    return path
