"""Proves that nanoGPT's meta.pkl is read and written, and that reading one runs nothing."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_training.data.errors import DataError
from llm_training.data.tokens.nanogpt_meta import (
    build_char_tokenizer,
    read_nanogpt_meta,
    write_nanogpt_meta,
)
from llm_training.data.tokens.tokenizers import train_tokenizer


def write_pickle(folder: Path, content: Any, protocol: int = 4) -> None:
    (folder / "meta.pkl").write_bytes(pickle.dumps(content, protocol))


def character_meta(characters: str) -> dict[str, Any]:
    """As nanoGPT's data/shakespeare_char/prepare.py makes it."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }


class Runs:
    """A pickle of it runs a command when it is read."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    write_pickle(
        tmp_path, {**character_meta("\n ab"), "other": [1.5, None, True, ("x",)]}, protocol
    )
    meta = read_nanogpt_meta(tmp_path)
    assert meta is not None
    assert (meta.vocab_size, meta.tokens) == (4, ("\n", " ", "a", "b"))


@pytest.mark.parametrize(
    ("content", "vocab_size", "tokens"),
    [
        ({"vocab_size": 100_000}, 100_000, None),
        ({"itos": ["a", "b"]}, 2, ("a", "b")),
        ({"stoi": {"b": 1, "a": 0}, "vocab_size": 64}, 64, ("a", "b")),
        ({"author": "unknown"}, None, None),
    ],
)
def test_what_it_may_say(
    tmp_path: Path, content: Any, vocab_size: int | None, tokens: tuple[str, ...] | None
) -> None:
    write_pickle(tmp_path, content)
    meta = read_nanogpt_meta(tmp_path)
    assert meta is not None
    assert (meta.vocab_size, meta.tokens) == (vocab_size, tokens)


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert read_nanogpt_meta(tmp_path) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_it_is_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "it ran"
    payload = {**character_meta("ab"), "more": Runs(f"touch '{trace}'")}
    write_pickle(tmp_path, payload, protocol)
    with pytest.raises(DataError, match=r"meta\.pkl is no .* it names \w+\.system"):
        read_nanogpt_meta(tmp_path)
    assert not trace.exists()
    # The payload is a real one.
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "it holds a list, no dict"),
        (OrderedDict(vocab_size=3), "names collections.OrderedDict"),
        ({"vocab_size": np.int64(65)}, "names numpy"),
        ({"vocab_size": "65"}, "vocab_size is '65'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({**character_meta("abc"), "vocab_size": 2}, "3 tokens, but a vocab_size of 2"),
        ({"itos": "abc"}, "itos must give a text for each id"),
        ({"itos": {0: b"a"}}, "itos must give a text for each id"),
        ({"stoi": {"a": 0.0}}, "itos must give a text for each id"),
        ({"itos": {0: "a", 2: "b"}}, "do not run from 0 without gaps"),
        ({"itos": {0: "a", 1: "a"}}, "stoi is not the inverse"),
        ({"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}}, "stoi is not the inverse"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    write_pickle(tmp_path, content)
    with pytest.raises(DataError, match=words):
        read_nanogpt_meta(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x80\x04",
        b"\x80\xff.",
        b"]\x94h\xff.",
        b"(((((",
        pickle.dumps([1] * 99)[:-9],
    ],
)
def test_bytes_that_are_no_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"is no meta\.pkl that can be used"):
        read_nanogpt_meta(tmp_path)


def test_a_few_bytes_cannot_take_all_memory(tmp_path: Path) -> None:
    # A place in its memory of two thousand million: the implementation in C makes room for all.
    (tmp_path / "meta.pkl").write_bytes(b"}r" + struct.pack("<I", 2**31) + b".")
    assert read_nanogpt_meta(tmp_path) is not None
    # Bytes of a length that the file does not have.
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.")
    with pytest.raises(DataError, match=r"is no meta\.pkl"):
        read_nanogpt_meta(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.tokens.nanogpt_meta.MAX_META_BYTES", 2**20)
    write_pickle(tmp_path, {"vocab_size": 3, "more": "x" * 2**20})
    with pytest.raises(DataError, match="it has more than 1 MiB"):
        read_nanogpt_meta(tmp_path)


def test_characters_keep_their_ids() -> None:
    tokenizer = build_char_tokenizer(("b", "\n", "a", "é", " "))
    assert tokenizer is not None
    text = "ab\n é a"
    assert tokenizer(text).input_ids == [2, 0, 1, 4, 3, 4, 2]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (6, 5)
    # An unknown character is not dropped without a trace.
    assert tokenizer("az").input_ids == [2, 5]


@pytest.mark.parametrize("token", ["the", "", "\ud800"])
def test_other_tokens_make_no_char_tokenizer(token: str) -> None:
    assert build_char_tokenizer(("a", token)) is None


def test_our_char_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("char", ["hello\nworld é"], 0)
    write_nanogpt_meta(tmp_path, tokenizer)
    meta = read_nanogpt_meta(tmp_path)
    assert meta is not None
    assert meta.tokens is not None
    again = build_char_tokenizer(meta.tokens)
    assert again is not None
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("hello z").input_ids == tokenizer("hello z").input_ids


def test_nanogpt_reads_ours(tmp_path: Path) -> None:
    text = "hello\nworld é"
    tokenizer = train_tokenizer("char", [text], 0)
    write_nanogpt_meta(tmp_path, tokenizer)
    np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id], "<u2").tofile(
        tmp_path / "train.bin"
    )

    # As its train.py and sample.py read.
    with (tmp_path / "meta.pkl").open("rb") as file:
        meta = pickle.load(file)
    data = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    assert meta["vocab_size"] == len(tokenizer) > data.max()
    assert "".join(meta["itos"][i] for i in data.tolist()) == text + "<|endoftext|>"
    assert [meta["stoi"][character] for character in text] == data[:-1].tolist()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_other_tokenizers_write_their_size_alone(tmp_path: Path, kind: Any) -> None:
    # The tokens of both are single characters too here, but stand for bytes.
    tokenizer = train_tokenizer(kind, ["a"], 257)
    write_nanogpt_meta(tmp_path, tokenizer)
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes()) == {"vocab_size": 257}
