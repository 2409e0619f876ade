"""Plain ASCII text into ids word by word, each word merged once and then looked up.

For the byte-level tokenizers whose pattern is known here, that takes a third of the time that the
tokenizers library takes, on one core. Other texts and other tokenizers are left to the library.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

# Between documents that are encoded as one text.
SEPARATOR = "\0"
# Written by the tokenizers library itself, for GPT-2 and its like.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# In none of these does a match hold a letter or digit followed by a newline, and what comes before
# the newline cannot look beyond it. So words never reach over such a cut, and neither do merges.
SPLITS_BEFORE_NEWLINE = frozenset(
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
# The ASCII members of Unicode's categories: letters, digits, and nothing of the others used above.
_ASCII_MEMBERS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
_PATTERN_PARTS = re.compile(r"\[[^]]*\]|\\p\{\w+\}|\\S")
_CATEGORY = re.compile(r"\\p\{(\w+)\}")
# A table of so many words takes some 30 MB. Longer words hardly come twice.
_MOST_WORDS = 2**17
_LONGEST_WORD = 64


class WordTable(dict[str, list[int]]):
    """The ids of each word that was met; it is emptied when it is full."""

    def __init__(self, backend: Tokenizer, pattern: str, separator_id: int):
        super().__init__()
        self._find_words = re.compile(_ascii_form(pattern), re.ASCII).findall
        self._model: models.Model = backend.model
        self._as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._separator_id = separator_id

    def __missing__(self, word: str) -> list[int]:
        if word == SEPARATOR:
            ids = [self._separator_id]
        else:
            [(written, _)] = self._as_bytes.pre_tokenize_str(word)
            ids = [token.id for token in self._model.tokenize(written)]
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> array[int]:
        """The ids of a text that is all ASCII, as unsigned 32-bit numbers."""
        words = self._find_words(text)
        return array("I", chain.from_iterable(map(self.__getitem__, words)))


def make_word_table(backend: Tokenizer, separator_id: int) -> WordTable | None:
    """A table that gives the library's own ids for ASCII text; None where that is not sure.

    Args:
        backend: reads no special tokens from text, and has `separator_id` for `SEPARATOR`.
    """
    content = json.loads(backend.to_str())
    pattern = known_pattern(content["pre_tokenizer"])
    # Tokens that are not special are looked for before words are.
    others = [t for t in content["added_tokens"] if not t["special"] and t["id"] != separator_id]
    if pattern is None or others or not is_local_normalizer(content["normalizer"]):
        return None
    model = content["model"]
    if model["type"] != "BPE" or model["dropout"]:
        return None
    return WordTable(backend, pattern, separator_id)


def is_local_normalizer(normalizer: dict[str, Any] | None) -> bool:
    """Whether it joins nothing across a newline, and leaves ASCII as it is."""
    return normalizer is None or normalizer["type"] == "NFC"


def known_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that finds the words, where it is one that we know."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _BYTE_LEVEL
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex if regex in SPLITS_BEFORE_NEWLINE and not split["invert"] else None
    return None


def _ascii_form(pattern: str) -> str:
    """The pattern for Python's `re` and ASCII text; a separator is a word, and a border of texts.

    Each ends as at the end of a text, so that the words before it are those of the text alone.
    """

    def translate(part: re.Match[str]) -> str:
        found = _CATEGORY.sub(lambda name: _ASCII_MEMBERS.get(name[1], ""), part.group())
        if found == r"\S":
            return r"[^\0\s]"
        if not found.startswith("["):
            return f"[{found}]"
        return found.replace("[^", r"[^\0")

    return _PATTERN_PARTS.sub(translate, pattern) + r"|\0"
