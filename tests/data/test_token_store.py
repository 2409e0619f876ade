"""Proves that a token file holds what was written, and that a file that is not right is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_training.data.errors import DataError
from llm_training.data.token_store import (
    StoreMeta,
    TokenStore,
    TokenStoreWriter,
    dtype_for,
    read_meta,
    scan_tokens,
)


def write_store(folder: Path, vocab_size: int = 100, **changes: Any) -> Path:
    """A finished store of two documents; returns its train.bin."""
    with TokenStoreWriter(folder / "train.bin", vocab_size, eos_token_id=9) as writer:
        assert writer.write_document(np.array([1, vocab_size - 1], np.uint32)) == 3
        assert writer.write_document(np.array([4], np.uint32)) == 2
    meta = StoreMeta(
        dtype=dtype_for(vocab_size).name,
        vocab_size=vocab_size,
        eos_token_id=9,
        tokenizer={"name": "bpe", "folder": "tokenizer", "fingerprint": "f"},
        splits={"train": writer.meta()},
        fingerprint="content",
        source_key="source",
        ledger={},
    )
    replace(meta, **changes).write(folder)
    return folder / "train.bin"


def change_meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(100, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    path = write_store(tmp_path, vocab_size)
    store = TokenStore.open(path)
    expected = np.array([1, vocab_size - 1, 9, 4, 9])
    assert store.dtype == np.dtype(dtype)
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.tolist() == expected.tolist()
    assert path.read_bytes() == expected.astype(dtype).tobytes()
    assert store.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (store.num_tokens, store.num_documents) == (5, 2)
    assert (store.vocab_size, store.max_id) == (vocab_size, vocab_size - 1)


def test_the_meta_file_survives_the_disk(tmp_path: Path) -> None:
    write_store(tmp_path)
    meta = read_meta(tmp_path)
    assert meta is not None
    assert meta.splits["train"].documents == 2
    meta.write(tmp_path)
    assert read_meta(tmp_path) == meta


@pytest.mark.parametrize("bad_id", [100, 70_000])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, bad_id: int) -> None:
    with (
        pytest.raises(DataError, match=f"gave id {bad_id:,}, but its vocabulary has only 100"),
        TokenStoreWriter(tmp_path / "train.bin", 100, eos_token_id=9) as writer,
    ):
        writer.write_document(np.array([1, bad_id], np.uint32))


def test_a_foreign_file_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.token_store._CHUNK_BYTES", 8)
    path = tmp_path / "train.bin"
    np.array([5, 800, 3, 2, 1, 0, 7], "<u2").tofile(path)
    store = TokenStore.open(path)
    assert (store.max_id, store.vocab_size, store.num_documents) == (800, 801, None)
    assert store.tokens.tolist() == [5, 800, 3, 2, 1, 0, 7]
    assert scan_tokens(path, store.dtype).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_part_is_a_view(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path))
    part = store.part(1, 4)
    assert part.tokens.tolist() == [99, 9, 4]
    assert part.part(2, 3).tokens.tolist() == [4]
    assert (part.num_tokens, part.num_documents) == (3, None)
    assert part.fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is not there"), (b"", "is empty"), (b"abc", "3 bytes, no multiple of 2")],
)
def test_a_file_that_is_no_token_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TokenStore.open(tmp_path / "train.bin")


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = write_store(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"holds 4 tokens, but meta.json beside it says 5"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 65_537}, "says uint16 for a vocabulary of 65,537"),
        ({"dtype": "float32"}, "says float32"),
        ({"format_version": 99}, "version 99, this program reads 1"),
        ({"splits": {"train": {}}}, "is damaged"),
        ({"novelty": 1}, "is damaged"),
    ],
)
def test_a_meta_file_that_is_not_right(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_store(tmp_path)
    change_meta(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        TokenStore.open(path)


@pytest.mark.parametrize("content", ['{"vocab": 65}', "[1]", "no json"])
def test_a_meta_file_of_another_program_is_passed_over(tmp_path: Path, content: str) -> None:
    path = write_store(tmp_path)
    (tmp_path / "meta.json").write_text(content)
    assert TokenStore.open(path).num_documents is None
