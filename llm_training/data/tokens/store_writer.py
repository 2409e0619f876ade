"""Writing the files of one split, at the speed of the disk."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llm_training.data.errors import DataError
from llm_training.data.tokens.store_meta import SplitMeta, dtype_for
from llm_training.data.tokens.token_store import ENDS_DTYPE, ends_file, learned_file

# Ids are kept until there are so many: one call for all is faster than one for each document.
_WRITE_TOKENS = 2**18


class TokenStoreWriter:
    """Writes one split, an end-of-text token after each document; a context manager.

    Leaving it without an exception puts the files safely on the disk. Readers must not see the
    folder before that: see `folders.new_folder`.

    Args:
        path: the token file.
        vocab_size: every id must be below.
        eos_token_id: the end-of-text token.
        has_learned: whether each token is marked as learned or not (conversations).
    """

    def __init__(
        self, path: Path, vocab_size: int, eos_token_id: int, *, has_learned: bool = False
    ):
        self.path = path
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self.num_documents = 0
        self.num_learned = 0
        self._eos = np.array([eos_token_id], np.uint32)
        self._dtype = dtype_for(vocab_size)
        self._max_id = 0
        self._pending: list[NDArray[np.uint32]] = []
        self._pending_learned: list[NDArray[np.uint8]] = []
        self._pending_ends: list[int] = []
        self._written = 0
        self._digest = hashlib.sha256()
        self._learned_digest = hashlib.sha256()
        self._files = ExitStack()
        self._tokens_file = self._open(path)
        self._ends_file = self._open(ends_file(path))
        self._learned_file = self._open(learned_file(path)) if has_learned else None

    def _open(self, path: Path) -> BinaryIO:
        return self._files.enter_context(path.open("wb"))

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._files:
            if error is None:
                self._flush()
                for file in (self._tokens_file, self._ends_file, self._learned_file):
                    if file is not None:
                        file.flush()
                        os.fsync(file.fileno())

    def write(
        self,
        ids: NDArray[np.uint32],
        learned: NDArray[np.uint8] | None = None,
        *,
        is_last: bool = True,
    ) -> int:
        """Appends a document or a piece of one; returns how many tokens that were.

        Args:
            ids: (n,) uint32.
            learned: (n,) uint8 of 0 and 1, in a store that `has_learned`: such a document brings
                its own end-of-text token. Any other gets one.
            is_last: whether the document ends here.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        self._pending.append(ids)
        num_tokens = len(ids)
        if learned is not None:
            self._pending_learned.append(learned)
        elif is_last:
            self._pending.append(self._eos)
            num_tokens += 1
        self.num_tokens += num_tokens
        if is_last:
            self._pending_ends.append(self.num_tokens)
            self.num_documents += 1
        if self.num_tokens - self._written >= _WRITE_TOKENS:
            self._flush()
        return num_tokens

    def _flush(self) -> None:
        if not self._pending:
            return
        ids = np.concatenate(self._pending)
        largest = int(ids.max(initial=0))
        if largest >= self.vocab_size:
            raise DataError(
                f"The tokenizer gave id {largest:,}, but its vocabulary has only"
                f" {self.vocab_size:,} tokens (ids from 0). Its files do not belong together; use"
                " another tokenizer."
            )
        content = ids.astype(self._dtype).tobytes()
        self._tokens_file.write(content)
        self._digest.update(content)
        self._ends_file.write(np.array(self._pending_ends, ENDS_DTYPE).tobytes())
        if self._learned_file is not None:
            learned = np.concatenate(self._pending_learned)
            self._learned_file.write(learned.tobytes())
            self._learned_digest.update(learned.tobytes())
            self.num_learned += int(learned.sum())
        self._max_id = max(self._max_id, largest)
        self._written = self.num_tokens
        self._pending, self._pending_learned, self._pending_ends = [], [], []

    def meta(self) -> SplitMeta:
        """What was written, once the writer is closed."""
        has_learned = self._learned_file is not None
        return SplitMeta(
            file=self.path.name,
            tokens=self.num_tokens,
            documents=self.num_documents,
            sha256=self._digest.hexdigest(),
            max_id=self._max_id,
            learned_tokens=self.num_learned if has_learned else None,
            learned_sha256=self._learned_digest.hexdigest() if has_learned else None,
        )
