"""Tokenizers: loaded from a folder or hub, or made from the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_training.data.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainedKind = Literal["char", "byte", "bpe"]
TRAINED_KINDS: tuple[str, ...] = get_args(TrainedKind)
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# 256 bytes and the end-of-text token.
SMALLEST_BPE = 257


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id.

    Args:
        name: of the folder, or on the hub.
        revision: branch, tag or commit of a hub id; None: its newest state.
        trust_remote_code: whether code that comes with it may run. Nobody is asked.
        special_tokens: that it shall have; those it lacks get the ids after all others.

    Raises:
        DataError: it cannot be found or opened, is empty, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    _refuse_missing_folder(name, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name,
            trust_remote_code=trust_remote_code,
            **({} if revision is None else {"revision": revision}),
        )
    # The library raises whatever its parts raise.
    except Exception as error:
        raise DataError(_cannot_load(name, revision, trust_remote_code, error)) from error
    _check_usable(tokenizer, name)
    add_special_tokens(tokenizer, special_tokens)
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Makes special tokens of `texts`, where they are none yet, with ids after all others."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    added = [
        AddedToken(text, special=True, normalized=False) for text in texts if text not in special
    ]
    if added:
        tokenizer.add_tokens(added, special_tokens=True)


def _cannot_load(name: str, revision: str | None, is_trusted: bool, error: Exception) -> str:
    told, state = one_line(error), "" if revision is None else f" at revision {revision}"
    if not is_trusted and "trust_remote_code" in told:
        return (
            f"Tokenizer {name!r} needs Python code that it brings along, and such code may do"
            " anything on this machine. Read it; then allow it with --trust_remote_code, or name"
            " another tokenizer."
        )
    return (
        f"Tokenizer {name!r}{state} cannot be loaded: {told} Give a local folder that"
        " holds one, a hub id while a hub is reachable (or its files are in the local cache),"
        " or char, byte or bpe to make one from the training data."
    )


def _refuse_missing_folder(name: str, folder: Path) -> None:
    # The library would take a path for a hub id, and try for most of a minute to reach the hub.
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not folder.is_dir():
        raise DataError(
            f"Tokenizer {name!r}: there is no such folder (looked from {Path.cwd()})."
            " Check the path; a hub id has the form owner/name."
        )


def _check_usable(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    # A folder with a model's config.json and no tokenizer gives one without a vocabulary.
    if tokenizer.is_fast and tokenizer.backend_tokenizer.get_vocab_size(False) == 0:
        raise DataError(
            f"Tokenizer {name!r} has an empty vocabulary: there are no tokenizer files beside its"
            " config.json. Name another one with tokenizer_name, such as bpe."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"Tokenizer {name!r} has no end-of-text token, but every document needs an end. Set"
            " eos_token in its tokenizer_config.json (to a token it has), or use another"
            " tokenizer, such as bpe."
        )


def train_tokenizer(
    kind: TrainedKind,
    documents: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 0,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """A new tokenizer with the end-of-text token `<|endoftext|>`; the same data gives the same one.

    Args:
        kind: `char`: every character of the documents, others are `<unk>`; `byte`: the 256 bytes,
            where a byte's id is its value; `bpe`: byte-level BPE. The latter two lose no text.
        documents: the training texts, gone through once; not read for `byte`.
        vocab_size: tokens in a bpe vocabulary, special ones included; fewer where the texts do not
            give so many.
        min_frequency: how often a pair must occur to become a token of a bpe vocabulary.
        special_tokens: further ones, with the ids after all others in a char or byte vocabulary.

    Raises:
        DataError: `vocab_size` is too small, or there is no character at all.
    """
    from transformers import PreTrainedTokenizerFast

    if kind == "char":
        backend = _train_char(documents)
    elif kind == "byte":
        backend = _make_byte()
    else:
        backend = _train_bpe(documents, vocab_size, min_frequency, special_tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN if kind == "char" else None,
        clean_up_tokenization_spaces=False,
    )
    add_special_tokens(tokenizer, special_tokens)
    return tokenizer


def _train_char(documents: Iterable[str]) -> Tokenizer:
    characters: set[str] = set()
    for text in documents:
        characters.update(text)
    if not characters:
        raise DataError("A char tokenizer needs training data, and there is no character in it.")
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    vocabulary[UNKNOWN] = len(vocabulary)
    # BPE without merges gives single characters, five times as fast as splitting them apart.
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    return backend


def _make_byte() -> Tokenizer:
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _train_bpe(
    documents: Iterable[str], vocab_size: int, min_frequency: int, special_tokens: Sequence[str]
) -> Tokenizer:
    smallest = SMALLEST_BPE + len(special_tokens)
    if vocab_size < smallest:
        others = f", and the {len(special_tokens)} special_tokens" if special_tokens else ""
        raise DataError(
            f"vocab_size {vocab_size} is too small for a bpe tokenizer: it starts from the 256"
            f" bytes and {END_OF_TEXT}{others}, so {smallest} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, *special_tokens],
        min_frequency=min_frequency,
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text gets."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{tokenizer.eos_token_id} {content}".encode()).hexdigest()
