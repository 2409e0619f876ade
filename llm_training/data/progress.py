"""Says every few seconds how far a long task is."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts the text and the tokens of one task.

    Args:
        say: takes each line.
        task: what is being done.
        total_bytes: roughly how much text there is; 0: not known.
    """

    def __init__(self, say: Callable[[str], None], task: str, total_bytes: int):
        self._say = say
        self._task = task
        self._total_bytes = total_bytes
        self._num_bytes = 0
        self._num_tokens = 0
        self._start = self._last_line = time.monotonic()

    def update(self, num_bytes: int, num_tokens: int = 0) -> None:
        self._num_bytes += num_bytes
        self._num_tokens += num_tokens
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            whole = f" of about {self._total_bytes / 1e6:,.0f} MB" if self._total_bytes else ""
            self._say(f"{self._task}: {self._so_far()}{whole}")

    def finish(self) -> None:
        self._say(f"{self._task}: done, {self._so_far()}")

    def _so_far(self) -> str:
        tokens = f", {self._num_tokens:,} tokens" if self._num_tokens else ""
        seconds = time.monotonic() - self._start
        text = f"{self._num_bytes / 1e6:,.1f} MB{tokens}" if self._num_bytes else tokens[2:]
        return f"{text} in {seconds:,.1f} s"
