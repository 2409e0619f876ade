"""Token stores: flat files of token ids that are mapped into memory, not read.

- `train.bin`, `val.bin`: the ids, little-endian uint16 or uint32, documents end to end
- `train.ends`: where each document ends, uint64, counted in tokens
- `train.learned`: of conversations, one byte for each token, 1 where it is learned
- `meta.json`: what they hold (`store_meta`)

A token file that another program wrote needs nothing beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm_training.data.errors import DataError
from llm_training.data.tokens.store_meta import META_FILE, read_meta

FILE_NAMES = {"train": "train.bin", "validation": "val.bin"}
ENDS_DTYPE = np.dtype("<u8")
_CHUNK_BYTES = 16 * 2**20
_CHUNK_TOKENS = 2**22


def ends_file(path: Path) -> Path:
    """Where the ends of the documents of a token file lie."""
    return path.with_suffix(".ends")


def learned_file(path: Path) -> Path:
    """Where it is marked which of its tokens are learned."""
    return path.with_suffix(".learned")


class Tokens(Protocol):
    """A stream of tokens that rows are made of, on disk or in memory; see `TokenStore`."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def tokens(self) -> NDArray[np.unsignedinteger]: ...

    @property
    def learned(self) -> NDArray[np.uint8] | None: ...

    @property
    def ends(self) -> NDArray[np.uint64] | None: ...


@dataclass(frozen=True)
class TokenArray:
    """Tokens in memory: what `TokenStore` is on disk.

    Attributes:
        tokens: (num_tokens,) unsigned integers.
        ends: (documents,) uint64, see `TokenStore.ends`.
        learned: (num_tokens,) uint8, see `TokenStore.learned`.
    """

    tokens: NDArray[np.unsignedinteger]
    ends: NDArray[np.uint64] | None = None
    learned: NDArray[np.uint8] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenScan:
    """What reading a token file from end to end shows."""

    max_id: int
    sha256: str


def scan_tokens(path: Path, dtype: np.dtype, header_bytes: int = 0) -> TokenScan:
    """Reads the whole file once, in chunks."""
    digest = hashlib.sha256()
    max_id = 0
    with path.open("rb") as file:
        file.seek(header_bytes)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            max_id = max(max_id, int(np.frombuffer(chunk, dtype).max()))
    return TokenScan(max_id, digest.hexdigest())


@dataclass(frozen=True)
class TokenStore:
    """The tokens of one split: a file, or a run of tokens in one.

    Attributes:
        path: the file.
        dtype: little-endian uint16 or uint32.
        start: its first token's place in the file.
        num_tokens: how many there are.
        num_documents: how many end in it; None where not known.
        vocab_size: every id is below.
        max_id: no id is above.
        fingerprint: of the content, wherever it lies.
        eos_token_id: what closes a document; None where not known.
        header_bytes: what stands in the file before the first token.
        has_ends: whether the ends of its documents lie beside it.
        has_learned: whether it is marked beside it which tokens are learned.
    """

    path: Path
    dtype: np.dtype
    start: int
    num_tokens: int
    num_documents: int | None
    vocab_size: int
    max_id: int
    fingerprint: str
    eos_token_id: int | None = None
    header_bytes: int = 0
    has_ends: bool = False
    has_learned: bool = False

    @cached_property
    def tokens(self) -> np.memmap:
        """(num_tokens,) ids as `dtype`, mapped from the file, read-only."""
        offset = self.header_bytes + self.start * self.dtype.itemsize
        return np.memmap(self.path, self.dtype, "r", offset, shape=(self.num_tokens,))

    @cached_property
    def learned(self) -> np.memmap | None:
        """(num_tokens,) uint8, 1 where a token is learned; None: all of them are."""
        if not self.has_learned:
            return None
        file = learned_file(self.path)
        return np.memmap(file, np.uint8, "r", self.start, shape=(self.num_tokens,))

    @cached_property
    def ends(self) -> NDArray[np.uint64] | None:
        """(documents,) uint64, where each document ends, counted in tokens from the start.

        The last is `num_tokens`, even where the store ends within a document. None where nothing
        tells the documents apart. Without a file of ends, the tokens are read through once for
        end-of-text.
        """
        if self.has_ends:
            whole = np.memmap(ends_file(self.path), ENDS_DTYPE, "r")
            first, last = np.searchsorted(
                whole, [self.start, self.start + self.num_tokens], "right"
            )
            if self.start == 0 and last == len(whole):
                return whole
            ends = whole[first:last] - np.uint64(self.start)
        elif self.eos_token_id is not None:
            ends = self._scan_for_ends(self.eos_token_id)
        else:
            return None
        if len(ends) == 0 or ends[-1] != self.num_tokens:
            ends = np.append(ends, np.uint64(self.num_tokens))
        return ends

    def _scan_for_ends(self, eos_token_id: int) -> NDArray[np.uint64]:
        found = [
            np.flatnonzero(self.tokens[start : start + _CHUNK_TOKENS] == eos_token_id) + start + 1
            for start in range(0, self.num_tokens, _CHUNK_TOKENS)
        ]
        return np.concatenate(found).astype(np.uint64)

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Opens a file of ours, by the `meta.json` beside it.

        Raises:
            DataError: a file is missing, empty, cut short, or not what `meta.json` says.
        """
        meta = read_meta(path.parent)
        split = meta.split_of(path) if meta else None
        if meta is None or split is None:
            raise DataError(f"{path}: there is no {META_FILE} of ours beside it that names it.")
        dtype = np.dtype("<u4" if meta.dtype == "uint32" else "<u2")
        has_learned = split.learned_tokens is not None
        sizes = {path: split.tokens * dtype.itemsize}
        sizes[ends_file(path)] = split.documents * ENDS_DTYPE.itemsize
        if has_learned:
            sizes[learned_file(path)] = split.tokens
        for file, size in sizes.items():
            _check_size(file, size)
        return cls(
            path=path,
            dtype=dtype,
            start=0,
            num_tokens=split.tokens,
            num_documents=split.documents,
            vocab_size=meta.vocab_size,
            max_id=split.max_id,
            fingerprint=split.fingerprint,
            eos_token_id=meta.eos_token_id,
            has_ends=True,
            has_learned=has_learned,
        )

    @classmethod
    def open_plain(
        cls,
        path: Path,
        dtype: np.dtype,
        scan: Callable[[Path, np.dtype], TokenScan],
        *,
        header_bytes: int = 0,
    ) -> TokenStore:
        """Opens a file that another program wrote, nothing but ids after `header_bytes`.

        Args:
            path: the file.
            dtype: little-endian uint16 or uint32.
            scan: reads it through (`scan_tokens`, or a memory of what that found).

        Raises:
            DataError: the file is missing, empty, or no whole number of ids.
        """
        num_tokens = _count_tokens(path, dtype, header_bytes)
        found = scan(path, dtype)
        return cls(
            path=path,
            dtype=dtype,
            start=0,
            num_tokens=num_tokens,
            num_documents=None,
            vocab_size=found.max_id + 1,
            max_id=found.max_id,
            fingerprint=found.sha256,
            header_bytes=header_bytes,
        )

    def part(self, start: int, stop: int) -> TokenStore:
        """The tokens from `start` to before `stop`, without a copy."""
        return dataclasses.replace(
            self,
            start=self.start + start,
            num_tokens=stop - start,
            num_documents=None,
            fingerprint=f"{self.fingerprint}[{start}:{stop}]",
        )


def _check_size(file: Path, num_bytes: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != num_bytes:
        what = "is not there" if found is None else f"has {found:,} bytes"
        raise DataError(
            f"{file} {what}, but {META_FILE} beside it says {num_bytes:,} bytes: one of them was"
            " changed. Make the files again from their text."
        )


def _count_tokens(path: Path, dtype: np.dtype, header_bytes: int) -> int:
    if not path.is_file():
        raise DataError(f"{path} is not there. Check the path of the token file.")
    num_bytes = path.stat().st_size - header_bytes
    if num_bytes <= 0:
        raise DataError(f"{path} is empty (0 bytes of tokens). Make the token file again.")
    if num_bytes % dtype.itemsize:
        raise DataError(
            f"{path} has {num_bytes:,} bytes, no multiple of {dtype.itemsize} ({dtype.name}): it is"
            f" cut short, or its ids are of another type. Make it again, or put the {META_FILE} it"
            " was made with beside it."
        )
    return num_bytes // dtype.itemsize
