"""Proves that words that are looked up have the very ids that the tokenizers library gives them.

For every known pattern, on every short run of ASCII characters that a pattern tells apart, on
random ASCII text, and beside separators. And that a table is not used where that is not sure.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llm_training.data.tokens import words
from llm_training.data.tokens.words import SPLITS_BEFORE_NEWLINE, WordTable, make_word_table

# One or two of each kind, the control characters that some call white space, and half-way cases.
KINDS = "aZsT09' \n\r\t\v\f\x1c\x1f\x7f_/."
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TEXT = "It's what we'll say: 'REally', don't\n\n  return x_1 == 2024 // 3\r\n\tDone." * 3


def of_pattern(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def make_backend(pre_tokenizer: Any = GPT2, **model: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.encode_special_tokens = True
    return backend


def with_separator(backend: Tokenizer) -> tuple[Tokenizer, int]:
    backend.add_tokens([AddedToken("\0", normalized=False)])
    separator_id = backend.token_to_id("\0")
    assert separator_id is not None
    return backend, separator_id


def make_table(backend: Tokenizer) -> WordTable | None:
    return make_word_table(*with_separator(backend))


def awkward_texts() -> list[str]:
    runs = ["".join(run) for run in itertools.product(KINDS, repeat=3)]
    dice = random.Random(1)
    noise = ["".join(chr(dice.randrange(128)) for _ in range(60)) for _ in range(200)]
    return [*runs, *noise, TEXT, "x" * 300, " " * 300, "=" * 300]


@pytest.mark.parametrize(
    "pre_tokenizer", [GPT2, *map(of_pattern, sorted(SPLITS_BEFORE_NEWLINE))], ids=range(5)
)
def test_the_ids_are_those_of_the_library(pre_tokenizer: Any) -> None:
    backend = make_backend(pre_tokenizer)
    backend.normalizer = normalizers.NFC()
    table = make_table(backend)
    assert table is not None
    texts = awkward_texts()
    # Joined as short documents are, so that each touches a separator on both sides.
    texts += ["\0".join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    expected = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert [table.encode(text).tolist() for text in texts] == expected


def test_merges_that_a_vocabulary_overrules_are_overruled_here_too() -> None:
    # As Llama 3 has it: a word that is a token as a whole is not merged.
    letters = {c: i for i, c in enumerate("abc")}
    model = models.BPE(letters | {"ab": 3, "abc": 4}, [("a", "b")], ignore_merges=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = GPT2
    table = make_table(backend)
    assert table is not None
    assert table.encode("abc").tolist() == backend.encode("abc").ids == [4]


def test_a_full_table_is_emptied_and_long_words_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 5)
    backend = make_backend()
    table = make_table(backend)
    assert table is not None
    for text in (TEXT, "y" * 100, TEXT):
        assert table.encode(text).tolist() == backend.encode(text).ids
        assert 0 < len(table) <= 5
        assert max(map(len, table)) < 100


def test_there_is_no_table_where_it_is_not_sure() -> None:
    def has_table(backend: Tokenizer) -> bool:
        return make_table(backend) is not None

    assert has_table(make_backend())
    assert not has_table(make_backend(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not has_table(make_backend(of_pattern(r"\w+|\s+")))
    assert not has_table(make_backend(dropout=0.1))
    lower = make_backend()
    lower.normalizer = normalizers.Lowercase()
    assert not has_table(lower)
    # Special tokens are not read from text; these are, before words are looked for.
    special, added = make_backend(), make_backend()
    special.add_special_tokens([AddedToken("<|end|>")])
    added.add_tokens([AddedToken("<tool>")])
    assert has_table(special)
    assert not has_table(added)
    other = Tokenizer(models.WordLevel({"a": 0}, "a"))
    other.pre_tokenizer = GPT2
    assert not has_table(other)
