"""Token files that somebody made before: checked, and used where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llm_training.data.documents.sources import SourceFile
from llm_training.data.documents.split import TRAIN, VALIDATION
from llm_training.data.errors import DataError
from llm_training.data.folders import exclusive
from llm_training.data.ledger import Ledger, SplitCounts
from llm_training.data.prepared import PreparedData, content_fingerprint
from llm_training.data.tokens.nanogpt_meta import build_char_tokenizer
from llm_training.data.tokens.store_meta import read_meta
from llm_training.data.tokens.token_files import (
    Claims,
    Layout,
    is_token_file,
    read_claims,
    read_layout,
    validation_beside,
)
from llm_training.data.tokens.token_store import TokenScan, TokenStore, scan_tokens
from llm_training.data.tokens.tokenizers import TRAINED_KINDS, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]
Load = Callable[[str], "PreTrainedTokenizerBase"]
# So many ids tell uint32 from uint16.
_IDS_LOOKED_AT = 4096
_FEWEST_IDS = 64


class Scan(Protocol):
    """Reads a token file through, as `scan_tokens` does."""

    def __call__(self, path: Path, dtype: np.dtype, header_bytes: int = 0) -> TokenScan: ...


def prepare_bin_files(
    train_files: Sequence[SourceFile],
    validation_files: Sequence[SourceFile],
    *,
    share: Fraction,
    tokenizer_name: str | None,
    tokenizer_source: str | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: Path,
    say: Say,
    load: Load = load_tokenizer,
) -> PreparedData:
    """Opens token files (`.bin`, `.npy`) in place; nothing is copied.

    Validation is `validation_files`, else the validation file beside `train.bin` or `train.npy`,
    else the last `share` of the training tokens. Our own files are known by their `meta.json`; any
    other is read once to find its largest id, and what was found is kept in `cache_dir`.

    Args:
        tokenizer: of the run that the files are validated in, where they say nothing of theirs.
        load: opens the tokenizer of a name.

    Raises:
        DataError: a file is no token file, or holds an id that the vocabulary said beside it or
            the tokenizer does not have.
    """
    if tokenizer_name in TRAINED_KINDS:
        raise DataError(
            f"tokenizer_name {tokenizer_name!r} makes a tokenizer from text, but the data is token"
            " ids. Name the tokenizer that made them, or leave tokenizer_name null."
        )
    paths = _choose_files(train_files, validation_files, share)
    claims = {split: read_claims(path) for split, path in paths.items()}
    first = next(iter(paths))
    tokenizer = (
        _find_tokenizer(paths[first], claims[first], tokenizer_name, tokenizer_source, say, load)
        or tokenizer
    )
    scan = _remembered_scan(cache_dir, say)
    stores = {
        split: _open(path, claims[split], tokenizer, scan, say) for split, path in paths.items()
    }
    stores = _mark_ends(stores, claims, tokenizer)
    if TRAIN in stores and VALIDATION not in stores and share:
        stores[TRAIN], stores[VALIDATION] = _split_off_validation(stores[TRAIN], share, say)
    return _prepared(stores, tokenizer)


def _prepared(
    stores: dict[str, TokenStore], tokenizer: PreTrainedTokenizerBase | None
) -> PreparedData:
    train, validation = stores.get(TRAIN), stores.get(VALIDATION)
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=max(
            len(tokenizer) if tokenizer else 0, *(store.vocab_size for store in stores.values())
        ),
        fingerprint=content_fingerprint(
            train.fingerprint if train else None,
            validation.fingerprint if validation else None,
            tokenizer_fingerprint(tokenizer) if tokenizer else None,
        ),
        ledger=_account(stores),
    )


def _choose_files(
    train_files: Sequence[SourceFile], validation_files: Sequence[SourceFile], share: Fraction
) -> dict[str, Path]:
    """The token file of each split, training first."""
    train = _only_file(train_files, "train_file")
    validation = _only_file(validation_files, "validation_file")
    if train and not validation and share:
        validation = validation_beside(train)
    return {split: path for split, path in ((TRAIN, train), (VALIDATION, validation)) if path}


def _only_file(files: Sequence[SourceFile], argument: str) -> Path | None:
    if not files:
        return None
    if len(files) > 1 or not is_token_file(files[0].path):
        raise DataError(
            f"{argument} names {', '.join(file.name for file in files[:5])}, but a token file"
            " (.bin, .npy) must be the only one: token files and text cannot be mixed, in training"
            " and validation data neither. Give one token file each (cat joins several .bin), or"
            " only text."
        )
    return files[0].path


def _find_tokenizer(
    path: Path,
    claims: Claims | None,
    name: str | None,
    source: str | None,
    say: Say,
    load: Load,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, else what the files beside give, else the model's, else none."""
    if name is not None:
        return load(name)
    if claims is None:
        meta = read_meta(path.parent)
        if meta is not None and (folder := path.parent / meta.tokenizer["folder"]).is_dir():
            return load(str(folder))
    elif claims.tokens:
        return _char_tokenizer(claims.tokens, claims.said_by, say)
    elif claims.tokenizer in TRAINED_KINDS:
        # It was made from text that is not here, and the model's is another one.
        return None
    elif found := _try_tokenizer(claims.tokenizer, say, load):
        return found
    return _try_tokenizer(source, say, load)


def _char_tokenizer(
    tokens: Sequence[str], said_by: str, say: Say
) -> PreTrainedTokenizerBase | None:
    tokenizer = build_char_tokenizer(tokens)
    if tokenizer is None:
        say(f"No tokenizer: tokens in {said_by} are longer than one character")
    else:
        say(f"Tokenizer: the {len(tokens):,} characters in {said_by}")
    return tokenizer


def _try_tokenizer(name: str | None, say: Say, load: Load) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    try:
        return load(name)
    # The model may well be a folder without one, and training on ids needs none.
    except DataError as error:
        say(f"No tokenizer: {error}")
        return None


def _open(
    path: Path,
    claims: Claims | None,
    tokenizer: PreTrainedTokenizerBase | None,
    scan: Scan,
    say: Say,
) -> TokenStore:
    """Opens a file; `claims` are None for one of ours. Checks its ids."""
    if claims is None:
        store = TokenStore.open(path)
    else:
        store = _open_plain(path, claims, tokenizer, scan, say)
    say(f"{path}: used in place, {store.num_tokens:,} tokens, {store.dtype.name}")
    if tokenizer is not None:
        _check_ids(
            store,
            len(tokenizer),
            f"the tokenizer {tokenizer.name_or_path!r} has only {len(tokenizer):,} tokens. Name"
            " the tokenizer that made the file with tokenizer_name, or make the file again.",
        )
    return store


def _open_plain(
    path: Path,
    claims: Claims,
    tokenizer: PreTrainedTokenizerBase | None,
    scan: Scan,
    say: Say,
) -> TokenStore:
    layout = read_layout(path, claims, len(tokenizer) if tokenizer else None)
    if not layout.is_stated:
        say(f"{path}: nothing says the type of its ids, which are taken as {layout.dtype.name}")
    store = TokenStore.open_plain(
        path,
        layout.dtype,
        partial(scan, header_bytes=layout.header_bytes),
        header_bytes=layout.header_bytes,
    )
    _check_layout(store, layout)
    if claims.vocab_size is None:
        return store
    _check_ids(
        store,
        claims.vocab_size,
        f"{claims.said_by} says a vocabulary of {claims.vocab_size:,} (ids from 0). Correct what is"
        " wrong: the vocab_size, the dtype that the ids are read as, or the file.",
    )
    return dataclasses.replace(store, vocab_size=claims.vocab_size)


def _check_layout(store: TokenStore, layout: Layout) -> None:
    _check_ids(
        store,
        layout.id_limit,
        "the file was stored as int32, where that is a negative number, and no token has one. Make"
        " the file again from its text.",
    )
    head = store.tokens[:_IDS_LOOKED_AT]
    looks_wider = len(head) >= _FEWEST_IDS and head.any() and not head[1::2].any()
    if not layout.is_stated and layout.dtype.itemsize == 2 and looks_wider:
        raise DataError(
            f"{store.path} is read as uint16 as nothing says otherwise, but every second id would"
            " be 0: it seems to hold uint32. Put a meta.json beside it that says so:"
            ' {"dtype": "uint32"} (or uint16 if that is right).'
        )


def _check_ids(store: TokenStore, limit: int, but: str) -> None:
    """Raises DataError where an id is `limit` or above; `but` says whose limit, and what to do."""
    if store.max_id >= limit:
        position = int(store.tokens.argmax())
        raise DataError(
            f"{store.path} holds token id {store.max_id:,}, its largest, first at token"
            f" {position:,} (from 0), but {but}"
        )


def _mark_ends(
    stores: dict[str, TokenStore],
    claims: dict[str, Claims | None],
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, TokenStore]:
    """The stores, those of other programs told what closes a document in them."""
    end = tokenizer.eos_token_id if tokenizer is not None else None
    # A tokenizer may have one that is in none of the files: then it tells nothing.
    if end is not None and all(store.max_id < end for store in stores.values()):
        end = None
    marked = dict(stores)
    for split, claim in claims.items():
        if claim is not None:
            said = claim.eos_token_id
            marked[split] = dataclasses.replace(
                stores[split], eos_token_id=end if said is None else said
            )
    return marked


def _split_off_validation(
    train: TokenStore, share: Fraction, say: Say
) -> tuple[TokenStore, TokenStore]:
    cut = train.num_tokens - int(train.num_tokens * share)
    if not 0 < cut < train.num_tokens:
        raise DataError(
            f"{train.path} has only {train.num_tokens:,} tokens, too few to keep"
            f" {float(share):.3%} of them for validation. Give a validation_file, or set"
            " validation_split_percentage to 0."
        )
    say(f"Validation: the last {train.num_tokens - cut:,} tokens of {train.path}")
    return train.part(0, cut), train.part(cut, train.num_tokens)


def _account(stores: dict[str, TokenStore]) -> Ledger:
    splits = {
        split: SplitCounts(files=1, documents=store.num_documents or 0, tokens=store.num_tokens)
        for split, store in stores.items()
    }
    return Ledger(splits=splits)


def _remembered_scan(cache_dir: Path, say: Say) -> Scan:
    """`scan_tokens` that reads a file again only when it changed."""

    def scan(path: Path, dtype: np.dtype, header_bytes: int = 0) -> TokenScan:
        status = path.stat()
        place = f"{path.resolve()} {header_bytes}"
        mark = f"{place} {status.st_size} {status.st_mtime_ns} {dtype.name}"
        key = hashlib.sha256(mark.encode()).hexdigest()[:12]
        memory = cache_dir / f"{path.stem}-{key}.scan.json"
        lock = cache_dir / f".{memory.name}.lock"
        with exclusive(lock, lambda: say(f"{path}: another process is reading it; waiting")):
            if memory.is_file():
                return TokenScan(**json.loads(memory.read_text()))
            say(f"{path}: reading all of it once ({status.st_size / 1e6:,.0f} MB)")
            found = scan_tokens(path, dtype, header_bytes)
            unfinished = memory.with_suffix(".tmp")
            unfinished.write_text(json.dumps(dataclasses.asdict(found)))
            os.replace(unfinished, memory)
            return found

    return scan
