"""How many bytes of text each token stands for, so that losses can be told in bits per byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
COMPONENT_TYPE = re.compile(r'"type":"(\w+)"')


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32] | None:
    """The length in UTF-8 of the text that each token stands for; special tokens stand for none.

    Over the tokens of a text they sum up to its bytes, for byte-level tokenizers (GPT-2, Llama 3,
    Qwen, ...), those that write a space as `▁` (Llama 2, Gemma, ...), and char and byte ones of
    ours. The sum differs where a tokenizer changes text before it splits it: by one for each text
    that gets a space put before it, by more where characters are replaced (NFKC, small letters) or
    white space is left out. Unknown characters count nothing.

    Returns:
        (V,) int32, up to the largest id; None where tokens do not tell their text, as those of
        tokenizers that drop spaces (BERT's).
    """
    length_of = _length_of(tokenizer)
    if length_of is None:
        return None
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, number in vocabulary.items():
        lengths[number] = length_of(token)
    for number, added in tokenizer.added_tokens_decoder.items():
        lengths[number] = 0 if added.special else len(added.content.encode())
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def _length_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int] | None:
    """How the length of a token's text follows from how it is written, if it does."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    before = _described(backend.normalizer) + _described(backend.pre_tokenizer)
    after = _described(backend.decoder)
    types = {*COMPONENT_TYPE.findall(before), *COMPONENT_TYPE.findall(after)}
    if "ByteLevel" in types:
        return _byte_level_length
    if "Metaspace" in types or SPACE in before + after:
        return _spaced_length(has_byte_tokens="ByteFallback" in types)
    # Nothing is done to the text but to cut it.
    is_cut_alone = not before and COMPONENT_TYPE.findall(after) in ([], ["Fuse"])
    return _plain_length if is_cut_alone and type(backend.model).__name__ == "BPE" else None


def _described(component: Any) -> str:
    return "" if component is None else component.__getstate__().decode()


_BYTE_SYMBOLS = frozenset(pre_tokenizers.ByteLevel.alphabet())


def _byte_level_length(token: str) -> int:
    return sum(1 if symbol in _BYTE_SYMBOLS else len(symbol.encode()) for symbol in token)


def _spaced_length(*, has_byte_tokens: bool) -> Callable[[str], int]:
    def length(token: str) -> int:
        if has_byte_tokens and FALLBACK_BYTE.fullmatch(token):
            return 1
        return len(token.replace(SPACE, " ").encode())

    return length


def _plain_length(token: str) -> int:
    return len(token.encode())
