"""The bytes of a text's tokens sum up to the bytes of the text, whatever made the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_training.data.tokens.token_bytes import bytes_per_token
from llm_training.data.tokens.tokenizers import TRAINED_KINDS, TrainedKind, train_tokenizer

STRANGE_TEXTS = [
    "",
    " ",
    "größe, naïve, Ærø",
    "日本語のテキスト、한국어, русский",
    "😀 and 👩‍👩‍👧 \u200b\ufeff \x00\x7f",
    "\r\n\t  tabs and   spaces\n\n\n",
    "▁<0x0A>Ġ<unk>##ing</w>",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def texts(text_folder: Path) -> list[str]:
    return [path.read_text("utf-8") for path in sorted(text_folder.glob("*.py"))] + STRANGE_TEXTS


def wrapped(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **kwargs)


def with_spaces_marked(texts: list[str], kind: str, **metaspace: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as ▁ and falls back to bytes, like those of sentencepiece."""
    if kind == "bpe":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        special = ["<unk>", "</s>", *BYTE_TOKENS]
        trainer: Any = trainers.BpeTrainer(
            vocab_size=900, special_tokens=special, limit_alphabet=90, show_progress=False
        )
    else:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=700, special_tokens=["</s>"], unk_token="<unk>", show_progress=False
        )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
        backend.decoder = decoders.Metaspace(**metaspace)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts)
    backend.train_from_iterator(texts[:8], trainer)
    if kind == "bpe":  # the trainer took them for tokens that stand outside of the text
        content = json.loads(backend.to_str())
        added = content["added_tokens"]
        content["added_tokens"] = [t for t in added if t["content"] not in BYTE_TOKENS]
        backend = Tokenizer.from_str(json.dumps(content))
    return wrapped(backend, unk_token="<unk>")


def sums(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    lengths = bytes_per_token(tokenizer)
    assert lengths is not None and lengths.dtype == np.int32
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [int(lengths[np.array(ids, np.int64)].sum()) for ids in tokens]


def sizes(texts: list[str]) -> list[int]:
    return [len(text.encode()) for text in texts]


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_ours_are_exact(kind: TrainedKind, texts: list[str]) -> None:
    texts = [text.replace("<unk>", "") for text in texts]
    tokenizer = train_tokenizer(kind, texts, 600, special_tokens=["<|user|>"])
    assert sums(tokenizer, texts) == sizes(texts)
    lengths = bytes_per_token(tokenizer)
    assert lengths is not None and len(lengths) == len(tokenizer)
    assert lengths[tokenizer.eos_token_id] == 0
    assert lengths[tokenizer.convert_tokens_to_ids("<|user|>")] == 0


def test_those_that_mark_spaces_are_exact(texts: list[str]) -> None:
    texts = [text.replace("▁", "").replace("<unk>", "") for text in texts]
    tokenizer = with_spaces_marked(texts, "bpe")
    strange = tokenizer("日").tokens()
    assert strange == ["<0xE6>", "<0x97>", "<0xA5>"]
    # A text that spells out a byte's token has it read as the byte, as these tokenizers do.
    texts = [text.replace("<0x0A>", "") for text in texts]
    assert sums(tokenizer, texts) == sizes(texts)


def test_a_space_that_is_put_before_a_text_is_counted(texts: list[str]) -> None:
    known = [text for text in texts[:8] if text.isascii() and not text.startswith(" ")]
    never = with_spaces_marked(texts, "unigram", prepend_scheme="never")
    assert sums(never, known) == sizes(known)
    first = with_spaces_marked(texts, "unigram", prepend_scheme="first")
    assert sums(first, known) == [size + 1 for size in sizes(known)]


def test_added_tokens_stand_for_their_text_unless_they_are_special() -> None:
    tokenizer = train_tokenizer("bpe", ["abc"], 300)
    tokenizer.add_tokens([AddedToken("größe", special=False), AddedToken("Ġx", special=False)])
    assert sums(tokenizer, ["größe", "a größe", "Ġx"]) == [7, 9, 3]
    tokenizer.add_tokens([AddedToken("<s>", special=True)], special_tokens=True)
    assert sums(tokenizer, ["<s>größe"]) == [7]


def test_an_unknown_character_counts_nothing() -> None:
    assert sums(train_tokenizer("char", ["ab"], 0), ["aéb"]) == [2]


def test_tokens_that_do_not_tell_their_text_are_not_guessed_at() -> None:
    words = {"[UNK]": 0, "</s>": 1, "un": 2, "##able": 3}
    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece()
    assert bytes_per_token(wrapped(pieces)) is None
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    assert bytes_per_token(wrapped(whole)) is None
    ended = Tokenizer(models.BPE({"a</w>": 0, "</s>": 1}, [], end_of_word_suffix="</w>"))
    ended.decoder = decoders.BPEDecoder("</w>")
    assert bytes_per_token(wrapped(ended)) is None
