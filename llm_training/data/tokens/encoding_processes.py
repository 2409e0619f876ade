"""Processes that encode plain texts beside this one, one for each core.

Python looks words up on one core only, so each process has a table of its own. A process knows
nothing of the run: it is given a tokenizer and texts, and ends when its input does, however this
one ends. One that is ended by the system costs speed alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer

from llm_training.data.tokens.words import make_word_table

_ROOT = Path(__file__).resolve().parents[3]


class PlainEncoder:
    """Encodes plain texts: from the table of words where it can, else with the library."""

    def __init__(self, backend: Tokenizer, separator_id: int | None):
        self._backend = backend
        self._separator_id = separator_id
        self._words = None if separator_id is None else make_word_table(backend, separator_id)

    @property
    def has_words(self) -> bool:
        """Whether some texts are encoded word by word, which needs a process for each core."""
        return self._words is not None

    def setup(self) -> tuple[str, int | None]:
        """What another process needs to make the same."""
        return self._backend.to_str(), self._separator_id

    def encode(self, texts: list[str]) -> list[array[int]]:
        """The ids of each text."""
        words = self._words
        if words is None:
            return self._encode_with_library(texts)
        others = [text for text in texts if not text.isascii()]
        encoded = iter(self._encode_with_library(others) if others else ())
        return [words.encode(text) if text.isascii() else next(encoded) for text in texts]

    def _encode_with_library(self, texts: list[str]) -> list[array[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        # By way of an array of Python's: three times as fast as numpy on a list.
        return [array("I", encoding.ids) for encoding in encodings]


class EncodingProcesses:
    """Up to `num_processes` processes that encode like `alone`; when it is left, they end.

    `encode` may be called by as many threads at once; each process is started when first needed.
    """

    def __init__(self, alone: PlainEncoder, num_processes: int):
        self._alone = alone
        self._started: list[subprocess.Popen[bytes]] = []
        self._is_left = False
        # What gives a process that is free; None for one that ended before its time.
        self._free: SimpleQueue[Callable[[], subprocess.Popen[bytes] | None]] = SimpleQueue()
        for _ in range(num_processes):
            self._free.put(self._start)

    def __enter__(self) -> EncodingProcesses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_left = True
        for process in self._started:
            # What was asked of it is not wanted any more.
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def encode(self, texts: list[str]) -> list[array[int]]:
        """The ids of each text; by this process itself where the one asked is gone."""
        take = self._free.get()
        usable = None
        try:
            process = take()
            encoded = None if process is None else _ask(process, texts)
            usable = None if encoded is None else process
        finally:
            self._free.put(lambda: usable)
        return self._alone.encode(texts) if encoded is None else encoded

    def _start(self) -> subprocess.Popen[bytes] | None:
        if self._is_left:
            return None
        # Not multiprocessing: that would import the launched script, and torch with it.
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=_ROOT,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        # There may be no memory for one, or too many processes.
        except OSError:
            return None
        self._started.append(process)
        return process if _is_sent(process, self._alone.setup()) else None


def _is_sent(process: subprocess.Popen[bytes], content: Any) -> bool:
    assert process.stdin is not None
    try:
        pickle.dump(content, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
    except OSError:
        return False
    return True


def _ask(process: subprocess.Popen[bytes], texts: list[str]) -> list[array[int]] | None:
    """The ids of each text; None where the process is gone."""
    assert process.stdout is not None
    if not _is_sent(process, texts):
        return None
    try:
        return list(pickle.load(process.stdout))
    except (EOFError, OSError, pickle.UnpicklingError):
        return None


def serve() -> None:
    """Answers requests from the standard input until it ends: the whole life of a process."""
    # Ctrl-C reaches all processes of a terminal; the one that asked decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        content, separator_id = pickle.load(requests)
        backend = Tokenizer.from_str(content)
        backend.encode_special_tokens = True
        encoder = PlainEncoder(backend, separator_id)
        while True:
            pickle.dump(encoder.encode(pickle.load(requests)), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    # The other side is gone.
    except (EOFError, BrokenPipeError):
        return
