"""What goes wrong when a run's record is opened or sent, and how an error is quoted."""

from __future__ import annotations

import traceback

from llm_training.tracking.redaction import redact_text, redact_url

MAX_QUOTED_LINES = 20
MAX_LINE_CHARACTERS = 1000
MAX_QUOTED_CHARACTERS = 4000  # MLflow takes tags of 5,000


class TrackingError(ValueError):
    """A tracker cannot be used as asked; the message says what to do."""


class QuotedError(Exception):
    """What went wrong in another process, as `first_line` quotes it there."""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text, without logins, for a warning."""
    if isinstance(error, QuotedError):
        return str(error)
    lines = redact_url(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def last_lines(error: BaseException) -> str:
    """The end of an error's traceback, without secrets, for those who look at the run later."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    # Cut at their ends: a secret whose name were cut off would not be known for one.
    text = "\n".join(line[:MAX_LINE_CHARACTERS] for line in lines[-MAX_QUOTED_LINES:])
    return redact_text(text)[-MAX_QUOTED_CHARACTERS:]
