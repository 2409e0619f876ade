"""nanoGPT's `meta.pkl`: the vocabulary of the token files beside it.

A pickled dict: `vocab_size` and, where the tokens are characters, `itos` (the token of each id) and
`stoi` (the id of each token). Reading it runs nothing of it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizers import Tokenizer, decoders, models

from llm_training.data.errors import DataError, one_line
from llm_training.data.tokens.tokenizers import END_OF_TEXT, UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META_PICKLE = "meta.pkl"
# A vocabulary of a million tokens takes a quarter of it.
MAX_META_BYTES = 64 * 2**20


@dataclass(frozen=True)
class NanogptMeta:
    """What a `meta.pkl` says.

    Attributes:
        path: the file.
        vocab_size: every id is below; None where it says nothing of it.
        tokens: the token of each id from 0; None where it does not give them.
    """

    path: Path
    vocab_size: int | None
    tokens: tuple[str, ...] | None


# The implementation in Python, though named as private: the one in C takes gigabytes of memory
# where a few bytes of the file ask for them. These files are small, so its speed does not matter.
class _PlainUnpickler(pickle._Unpickler):
    """Makes numbers, text and containers of these, and nothing else."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain data")


def read_nanogpt_meta(folder: Path) -> NanogptMeta | None:
    """The `meta.pkl` of a folder; None where there is none.

    Raises:
        DataError: it holds more than plain data, or nonsense.
    """
    path = folder / META_PICKLE
    if not path.is_file():
        return None
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise _nonsense(path, f"it holds a {type(content).__name__}, no dict")
    tokens = _tokens(content, path)
    vocab_size = content.get("vocab_size", len(tokens) if tokens else None)
    if vocab_size is not None:
        if type(vocab_size) is not int or not 0 < vocab_size <= 2**32:
            raise _nonsense(path, f"vocab_size is {vocab_size!r:.60}, no number from 1")
        if tokens and len(tokens) > vocab_size:
            raise _nonsense(path, f"{len(tokens):,} tokens, but a vocab_size of {vocab_size:,}")
    return NanogptMeta(path, vocab_size, tokens)


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_META_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > MAX_META_BYTES:
        raise _nonsense(path, f"it has more than {MAX_META_BYTES / 2**20:.0f} MiB")
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    # Bytes that are no pickle raise whatever the step raises that they are taken for.
    except Exception as error:
        raise _nonsense(path, one_line(error).rstrip(".")) from None


def _nonsense(path: Path, fault: str) -> DataError:
    return DataError(
        f"{path} is no meta.pkl that can be used: {fault}. Only a dict of plain numbers and texts"
        " is read (vocab_size, itos, stoi), as nanoGPT's prepare.py writes it. Write it again, or"
        " remove it and put what is known of the token files in a meta.json:"
        ' {"vocab_size": 65, "dtype": "uint16"}.'
    )


def _tokens(content: dict[Any, Any], path: Path) -> tuple[str, ...] | None:
    """The tokens in the order of their ids, from `itos`, else from `stoi`."""
    itos, stoi = content.get("itos"), content.get("stoi")
    if itos is None and stoi is None:
        return None
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    elif itos is None and isinstance(stoi, dict):
        itos = _inverse(stoi)
    if not isinstance(itos, dict) or not all(
        type(i) is int and isinstance(token, str) for i, token in itos.items()
    ):
        raise _nonsense(path, "itos must give a text for each id, and stoi an id for each text")
    if itos.keys() != set(range(len(itos))):
        raise _nonsense(path, f"the ids of its {len(itos):,} tokens do not run from 0 without gaps")
    inverse = _inverse(itos)
    if len(inverse) < len(itos) or stoi not in (None, inverse):
        raise _nonsense(path, "stoi is not the inverse of itos")
    return tuple(itos[i] for i in range(len(itos)))


def build_char_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that gives each character its place in `tokens`; None where they are longer.

    `<unk>` and `<|endoftext|>` may be among them, as in the tokenizers that this program makes.
    An end-of-text token that is missing comes after the last; it stands for unknown characters
    too where there is no `<unk>`.
    """
    from transformers import PreTrainedTokenizerFast

    if not _are_characters(tokens):
        return None
    vocabulary = {token: i for i, token in enumerate(tokens)}
    vocabulary.setdefault(END_OF_TEXT, len(vocabulary))
    unknown = UNKNOWN if UNKNOWN in vocabulary else END_OF_TEXT
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def _are_characters(tokens: Iterable[str]) -> bool:
    # Half of a surrogate pair is no text, and the library of tokenizers takes none.
    return all(
        token in (UNKNOWN, END_OF_TEXT) or (len(token) == 1 and not "\ud800" <= token <= "\udfff")
        for token in tokens
    )


def write_nanogpt_meta(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes `meta.pkl`, by which nanoGPT reads the token files of a folder.

    It holds `vocab_size` and, of a char tokenizer, `itos` and `stoi`. nanoGPT itself reads only
    uint16, that is vocabularies of up to 65,536 tokens.
    """
    content: dict[str, Any] = {"vocab_size": len(tokenizer)}
    if (itos := _characters(tokenizer)) is not None:
        content |= {"itos": itos, "stoi": _inverse(itos)}
    (folder / META_PICKLE).write_bytes(pickle.dumps(content, protocol=4))


def _characters(tokenizer: PreTrainedTokenizerBase) -> dict[int, str] | None:
    """The character of each id; None of any other tokenizer than one of characters."""
    # Tokens of a single character may stand for bytes; then something comes before the model.
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.pre_tokenizer is not None:
        return None
    vocabulary = _inverse(tokenizer.get_vocab())
    itos = {i: vocabulary[i] for i in sorted(vocabulary)}
    return itos if _are_characters(itos.values()) else None


def _inverse(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return {value: key for key, value in mapping.items()}
