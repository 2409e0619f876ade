"""Everything a run writes down: train_log.jsonl, trackers, and the console's lines."""

from llm_training.tracking.console import evaluation_line, evaluation_lines, progress_line
from llm_training.tracking.errors import TrackingError, last_lines
from llm_training.tracking.note import is_untold
from llm_training.tracking.redaction import redact
from llm_training.tracking.tracking import Tracking

__all__ = [
    "Tracking",
    "TrackingError",
    "evaluation_line",
    "evaluation_lines",
    "is_untold",
    "last_lines",
    "progress_line",
    "redact",
]
