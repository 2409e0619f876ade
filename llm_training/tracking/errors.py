"""What goes wrong when a run's record is opened, and how an error is quoted."""

from llm_training.tracking.redaction import redact_url


class TrackingError(ValueError):
    """A tracker cannot be started as asked; the message says what to do."""


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text, without logins, for a warning."""
    lines = redact_url(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
