"""Documents into token ids, at full speed: on all cores, large documents in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One batch goes to all cores at once; its encodings take up to 100 times its size.
_BATCH_CHARACTERS = 2 * 2**20
_PIECE_CHARACTERS = 64 * 2**10
# ASCII only: which other characters are letters depends on the version of Unicode.
_WORD_AT_LINE_END = re.compile(r"[A-Za-z0-9](?=\n)")
# In none of these does a match hold a letter or digit followed by a newline, and what comes before
# the newline cannot look beyond it. So words never reach over the cut, and neither do merges.
_SPLITS_BEFORE_NEWLINE = frozenset(
    (
        # GPT-4 (cl100k), Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen2, Qwen3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen3.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-4o, gpt-oss (o200k)
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)

K = TypeVar("K")


class _Piece(NamedTuple):
    key: Any
    text: str
    is_last: bool


class TextEncoder:
    """Turns documents into ids: ordinary text only, no special token is read from it or added.

    The tokenizer itself stays as it was: what is set here is set on a copy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = None
        self._may_cut = False
        if tokenizer.is_fast:
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._may_cut = may_cut_before_newline(self._backend)

    def encode(self, documents: Iterable[tuple[K, str]]) -> Iterator[tuple[K, NDArray[np.uint32]]]:
        """Yields (key, ids) for each (key, text), in order; ids is (tokens,) uint32.

        Texts are taken ahead, some MB at a time, so that all cores work.
        """
        ids: list[NDArray[np.uint32]] = []
        for batch in _batches(self._pieces(documents)):
            for piece, piece_ids in zip(batch, self._encode_batch(batch), strict=True):
                ids.append(np.array(piece_ids, np.uint32))
                if piece.is_last:
                    yield piece.key, np.concatenate(ids)
                    ids = []

    def _pieces(self, documents: Iterable[tuple[Any, str]]) -> Iterator[_Piece]:
        for key, text in documents:
            pieces = cut_before_newlines(text, _PIECE_CHARACTERS) if self._may_cut else [text]
            for i, piece in enumerate(pieces, 1):
                yield _Piece(key, piece, is_last=i == len(pieces))

    def _encode_batch(self, batch: list[_Piece]) -> list[list[int]]:
        texts = [piece.text for piece in batch]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        # Tokenizers that are written in Python have no batches and no copy to set.
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        return encoded["input_ids"]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def cut_before_newlines(text: str, piece_characters: int) -> list[str]:
    """Pieces of about `piece_characters`, each ending in a letter or digit before a newline."""
    pieces = []
    start = 0
    while len(text) - start > piece_characters:
        match = _WORD_AT_LINE_END.search(text, start + piece_characters)
        if match is None:
            break
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return pieces


def may_cut_before_newline(backend: Tokenizer) -> bool:
    """Whether pieces of `cut_before_newlines` are sure to give the same tokens as the whole text.

    True only for tokenizers that we know enough of; False costs speed on large documents only.
    """
    content = json.loads(backend.to_str())
    return (
        _is_local_normalizer(content["normalizer"])
        and all("\n" not in t["content"] and not t["rstrip"] for t in content["added_tokens"])
        and (
            _splits_before_newline(content["pre_tokenizer"])
            or _has_no_merges(content["model"], content["pre_tokenizer"])
        )
    )


def _is_local_normalizer(normalizer: dict[str, Any] | None) -> bool:
    # NFC composes nothing across a newline.
    return normalizer is None or normalizer["type"] == "NFC"


def _splits_before_newline(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        }:
            return regex in _SPLITS_BEFORE_NEWLINE and not split["invert"]
    return False


def _has_no_merges(model: dict[str, Any], pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether every character or byte is a token of its own."""
    is_plain = pre_tokenizer is None or (
        pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]
    )
    return (
        is_plain
        and model["type"] == "BPE"
        and not model["merges"]
        and not (model["fuse_unk"] or model["continuing_subword_prefix"])
        and not (model["end_of_word_suffix"] or model["ignore_merges"])
    )
