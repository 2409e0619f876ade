"""Token stores: flat files of token ids, and the `meta.json` beside them that describes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llm_training.data.errors import DataError

FORMAT = "llm_training token store"
FORMAT_VERSION = 1
META_FILE = "meta.json"
FILE_NAMES = {"train": "train.bin", "validation": "val.bin"}
UINT16_VOCABULARY = 2**16
_CHUNK_BYTES = 16 * 2**20


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")


@dataclass(frozen=True)
class SplitMeta:
    """What is known of one file: counts, the SHA-256 of its bytes, and its largest id."""

    file: str
    tokens: int
    documents: int
    sha256: str
    max_id: int


@dataclass(frozen=True)
class StoreMeta:
    """The `meta.json` of a folder of token files.

    Attributes:
        dtype: `uint16` or `uint32`, little-endian.
        tokenizer: `name`, `fingerprint` and `folder` (relative) of the tokenizer.
        splits: by name, `train` and `validation`.
        fingerprint: of the tokens and the tokenizer.
        source_key: of all that decided the tokens.
        ledger: `Ledger.to_dict`.
    """

    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer: dict[str, str]
    splits: dict[str, SplitMeta]
    fingerprint: str
    source_key: str
    ledger: dict[str, Any]

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (folder / META_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def split_of(self, path: Path) -> SplitMeta | None:
        """What it says of this file, if anything."""
        return next((split for split in self.splits.values() if split.file == path.name), None)


def read_meta(folder: Path) -> StoreMeta | None:
    """The `meta.json` of a folder; None where there is none, or it is another program's.

    Raises:
        DataError: it is ours, and of another version, or damaged.
    """
    path = folder / META_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        return None
    if (version := content.pop("format_version", None)) != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}."
            " Make the token files again from their text."
        )
    try:
        splits = {name: SplitMeta(**split) for name, split in content.pop("splits").items()}
        meta = StoreMeta(splits=splits, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error}). Make the token files again from their text."
        ) from None
    _check_dtype(meta, path)
    return meta


def _check_dtype(meta: StoreMeta, path: Path) -> None:
    if meta.dtype not in ("uint16", "uint32") or (
        meta.dtype == "uint16" and meta.vocab_size > UINT16_VOCABULARY
    ):
        raise DataError(
            f"{path} says {meta.dtype} for a vocabulary of {meta.vocab_size:,}, but ids are uint16"
            f" up to a vocabulary of {UINT16_VOCABULARY:,}, and uint32 above. Correct the dtype to"
            " what the file holds, or make it again from its text."
        )


@dataclass(frozen=True)
class TokenScan:
    """What reading a token file from end to end shows."""

    max_id: int
    sha256: str


def scan_tokens(path: Path, dtype: np.dtype) -> TokenScan:
    """Reads the whole file once, in chunks."""
    digest = hashlib.sha256()
    max_id = 0
    with path.open("rb") as file:
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
        num_documents: how many end-of-text tokens closed a document; None where not known.
        vocab_size: every id is below.
        max_id: no id is above.
        fingerprint: of the content, wherever it lies.
    """

    path: Path
    dtype: np.dtype
    start: int
    num_tokens: int
    num_documents: int | None
    vocab_size: int
    max_id: int
    fingerprint: str

    @cached_property
    def tokens(self) -> np.memmap:
        """(num_tokens,) ids as `dtype`, mapped from the file, read-only."""
        offset = self.start * self.dtype.itemsize
        return np.memmap(self.path, self.dtype, "r", offset, shape=(self.num_tokens,))

    @classmethod
    def open(
        cls, path: Path, scan: Callable[[Path, np.dtype], TokenScan] = scan_tokens
    ) -> TokenStore:
        """Opens a file by the `meta.json` beside it; without one, as uint16 after a full scan.

        Raises:
            DataError: the file is missing, empty, cut short, or not what `meta.json` says.
        """
        meta = read_meta(path.parent)
        split = meta.split_of(path) if meta else None
        dtype = np.dtype("<u4" if meta and split and meta.dtype == "uint32" else "<u2")
        num_tokens = _count_tokens(path, dtype)
        if meta is None or split is None:
            found = scan(path, dtype)
            return cls(
                path, dtype, 0, num_tokens, None, found.max_id + 1, found.max_id, found.sha256
            )
        if num_tokens != split.tokens:
            raise DataError(
                f"{path} holds {num_tokens:,} tokens, but {META_FILE} beside it says"
                f" {split.tokens:,}: one of them was changed. Make the file again from its text,"
                f" or move {META_FILE} away to use it as plain uint16."
            )
        return cls(
            path,
            dtype,
            0,
            num_tokens,
            split.documents,
            meta.vocab_size,
            split.max_id,
            split.sha256,
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


def _count_tokens(path: Path, dtype: np.dtype) -> int:
    if not path.is_file():
        raise DataError(f"{path} is not there. Check the path; a token file has the suffix .bin.")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise DataError(f"{path} is empty (0 bytes). Make the token file again.")
    if num_bytes % dtype.itemsize:
        raise DataError(
            f"{path} has {num_bytes:,} bytes, no multiple of {dtype.itemsize} ({dtype.name}): it is"
            f" cut short, or its ids are of another type. Make it again, or put the {META_FILE} it"
            " was made with beside it."
        )
    return num_bytes // dtype.itemsize


class TokenStoreWriter:
    """Writes one token file, an end-of-text token after each document; a context manager.

    Leaving it without an exception puts the file safely on the disk. Readers must not see the
    folder before that: see `folders.new_folder`.
    """

    def __init__(self, path: Path, vocab_size: int, eos_token_id: int):
        self.path = path
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.num_tokens = 0
        self.num_documents = 0
        self._dtype = dtype_for(vocab_size)
        self._max_id = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("wb", buffering=2**20)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write_document(self, ids: NDArray[np.integer]) -> int:
        """Appends (n,) ids and the end-of-text token; returns n + 1.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        ended = np.append(ids, self.eos_token_id)
        if ended.min() < 0 or ended.max() >= self.vocab_size:
            raise DataError(
                f"The tokenizer gave id {int(ended.max()):,}, but its vocabulary has only"
                f" {self.vocab_size:,} tokens (ids from 0). Its files do not belong together; use"
                " another tokenizer."
            )
        content = ended.astype(self._dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._max_id = max(self._max_id, int(ended.max()))
        self.num_tokens += len(ended)
        self.num_documents += 1
        return len(ended)

    def meta(self) -> SplitMeta:
        """What was written so far."""
        return SplitMeta(
            self.path.name,
            self.num_tokens,
            self.num_documents,
            self._digest.hexdigest(),
            self._max_id,
        )
