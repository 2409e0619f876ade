"""Token files (.bin) that somebody made before: checked, and used where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_training.data.errors import DataError
from llm_training.data.folders import exclusive
from llm_training.data.ledger import Ledger, SplitCounts
from llm_training.data.prepared import PreparedData, content_fingerprint
from llm_training.data.sources import SourceFile
from llm_training.data.split import TRAIN, VALIDATION
from llm_training.data.token_store import (
    FILE_NAMES,
    TokenScan,
    TokenStore,
    read_meta,
    scan_tokens,
)
from llm_training.data.tokenizers import TRAINED_KINDS, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scan = Callable[[Path, np.dtype], TokenScan]


def prepare_bin_files(
    train_files: Sequence[SourceFile],
    validation_files: Sequence[SourceFile],
    *,
    share: Fraction,
    tokenizer_name: str | None,
    tokenizer_source: str | None,
    cache_dir: Path,
    say: Callable[[str], None],
) -> PreparedData:
    """Opens token files in place; nothing is copied.

    Validation is `validation_files`, else `val.bin` beside `train.bin`, else the last `share` of
    the training tokens. A file without our `meta.json` is uint16, and is read once to find its
    largest id; what was found is kept in `cache_dir`.

    Raises:
        DataError: a file is no token file, or holds an id that the tokenizer does not know.
    """
    if tokenizer_name in TRAINED_KINDS:
        raise DataError(
            f"tokenizer_name {tokenizer_name!r} makes a tokenizer from text, but the data is token"
            " ids. Name the tokenizer that made them, or leave tokenizer_name null."
        )
    scan = _remembered_scan(cache_dir, say)
    train = _open_only(train_files, "train_file", scan, say)
    validation = _open_only(validation_files, "validation_file", scan, say)
    if train and not validation and share:
        train, validation = _split_off_validation(train, share, scan, say)
    stores = {TRAIN: train, VALIDATION: validation}
    present = {split: store for split, store in stores.items() if store}

    folder = next(iter(present.values())).path.parent
    tokenizer = _find_tokenizer(folder, tokenizer_name, tokenizer_source, say)
    for store in present.values():
        _check_ids(store, tokenizer)
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=max(
            len(tokenizer) if tokenizer else 0, *(store.vocab_size for store in present.values())
        ),
        fingerprint=content_fingerprint(
            train.fingerprint if train else None,
            validation.fingerprint if validation else None,
            tokenizer_fingerprint(tokenizer) if tokenizer else None,
        ),
        ledger=_account(present),
    )


def _open_only(
    files: Sequence[SourceFile], argument: str, scan: Scan, say: Callable[[str], None]
) -> TokenStore | None:
    if not files:
        return None
    if len(files) > 1 or files[0].kind != "bin":
        raise DataError(
            f"{argument} names {', '.join(file.name for file in files[:5])}, but a .bin file must"
            " be the only one: token files and text cannot be mixed, in training and validation"
            " data neither. Give one .bin file each (cat joins several), or only text."
        )
    return _open(files[0].path, scan, say)


def _open(path: Path, scan: Scan, say: Callable[[str], None]) -> TokenStore:
    meta = read_meta(path.parent)
    if meta is None or meta.split_of(path) is None:
        say(f"{path}: no meta.json of ours speaks of it, so its ids are taken as uint16")
    store = TokenStore.open(path, scan)
    say(f"{path}: used in place, {store.num_tokens:,} tokens, {store.dtype.name}")
    return store


def _split_off_validation(
    train: TokenStore, share: Fraction, scan: Scan, say: Callable[[str], None]
) -> tuple[TokenStore, TokenStore]:
    beside = train.path.with_name(FILE_NAMES[VALIDATION])
    if train.path.name == FILE_NAMES[TRAIN] and beside.is_file():
        return train, _open(beside, scan, say)
    cut = train.num_tokens - int(train.num_tokens * share)
    if not 0 < cut < train.num_tokens:
        raise DataError(
            f"{train.path} has only {train.num_tokens:,} tokens, too few to keep"
            f" {float(share):.3%} of them for validation. Give a validation_file, or set"
            " validation_split_percentage to 0."
        )
    say(f"Validation: the last {train.num_tokens - cut:,} tokens of {train.path}")
    return train.part(0, cut), train.part(cut, train.num_tokens)


def _find_tokenizer(
    folder: Path, name: str | None, source: str | None, say: Callable[[str], None]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, else the one beside the file, else the model's, else none."""
    if name is not None:
        return load_tokenizer(name)
    meta = read_meta(folder)
    if meta is not None and (folder / meta.tokenizer["folder"]).is_dir():
        return load_tokenizer(str(folder / meta.tokenizer["folder"]))
    if source is None:
        return None
    try:
        return load_tokenizer(source)
    # The model may well be a folder without one, and training on ids needs none.
    except DataError as error:
        say(f"No tokenizer: {error}")
        return None


def _check_ids(store: TokenStore, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None and store.max_id >= len(tokenizer):
        raise DataError(
            f"{store.path} holds token id {store.max_id:,}, but the tokenizer"
            f" {tokenizer.name_or_path!r} has only {len(tokenizer):,} tokens. Name the tokenizer"
            " that made the file with tokenizer_name, or make the file again."
        )


def _account(stores: dict[str, TokenStore]) -> Ledger:
    splits = {
        split: SplitCounts(files=1, documents=store.num_documents or 0, tokens=store.num_tokens)
        for split, store in stores.items()
    }
    return Ledger(splits=splits)


def _remembered_scan(cache_dir: Path, say: Callable[[str], None]) -> Scan:
    """`scan_tokens` that reads a file again only when it changed."""

    def scan(path: Path, dtype: np.dtype) -> TokenScan:
        status = path.stat()
        mark = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {dtype.name}"
        key = hashlib.sha256(mark.encode()).hexdigest()[:12]
        memory = cache_dir / f"{path.stem}-{key}.scan.json"
        lock = cache_dir / f".{memory.name}.lock"
        with exclusive(lock, lambda: say(f"{path}: another process is reading it; waiting")):
            if memory.is_file():
                return TokenScan(**json.loads(memory.read_text()))
            say(f"{path}: reading all of it once ({status.st_size / 1e6:,.0f} MB)")
            found = scan_tokens(path, dtype)
            unfinished = memory.with_suffix(".tmp")
            unfinished.write_text(json.dumps(dataclasses.asdict(found)))
            os.replace(unfinished, memory)
            return found

    return scan
