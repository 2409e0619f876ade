"""The `meta.json` of a token store: what its files hold."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_training.data.errors import DataError

FORMAT = "llm_training token store"
FORMAT_VERSION = 2
META_FILE = "meta.json"
UINT16_VOCABULARY = 2**16


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")


@dataclass(frozen=True)
class SplitMeta:
    """What is known of the files of one split.

    Attributes:
        file: the token file; its borders and learned parts lie beside it (see `token_store`).
        tokens, documents: how many there are.
        sha256: of the token file.
        max_id: the largest id.
        learned_tokens: of conversations, how many tokens are learned; None: all.
        learned_sha256: of the file of learned parts, where there is one.
    """

    file: str
    tokens: int
    documents: int
    sha256: str
    max_id: int
    learned_tokens: int | None = None
    learned_sha256: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that is trained on."""
        return self.sha256 + (self.learned_sha256 or "")


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
