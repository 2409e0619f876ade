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
from llm_training.data.tokens.store_meta import StoreMeta, dtype_for, read_meta
from llm_training.data.tokens.store_writer import TokenStoreWriter
from llm_training.data.tokens.token_store import TokenStore, ends_file, learned_file, scan_tokens


def write_store(folder: Path, vocab_size: int = 100, **changes: Any) -> Path:
    """A finished store of two documents; returns its train.bin."""
    with TokenStoreWriter(folder / "train.bin", vocab_size, eos_token_id=9) as writer:
        assert writer.write(np.array([1], np.uint32), is_last=False) == 1
        assert writer.write(np.array([vocab_size - 1], np.uint32)) == 2
        assert writer.write(np.array([4], np.uint32)) == 2
    return write_meta(folder, writer, vocab_size, **changes)


def write_meta(
    folder: Path, writer: TokenStoreWriter, vocab_size: int = 100, **changes: Any
) -> Path:
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


def write_chat_store(folder: Path) -> Path:
    """Two conversations of 3 tokens, which bring their own end-of-text."""
    with TokenStoreWriter(folder / "train.bin", 100, eos_token_id=9, has_learned=True) as writer:
        for learned in ([0, 1, 1], [0, 0, 1]):
            writer.write(np.array([1, 2, 9], np.uint32), np.array(learned, np.uint8))
    return write_meta(folder, writer)


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
    assert store.ends is not None and store.ends.tolist() == [3, 5]
    assert (store.learned, store.eos_token_id) == (None, 9)


def test_much_is_written_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    write_store(whole)
    monkeypatch.setattr("llm_training.data.tokens.store_writer._WRITE_TOKENS", 2)
    write_store(tmp_path)
    for name in ("train.bin", "train.ends", "meta.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_learned_of_conversations_is_kept(tmp_path: Path) -> None:
    store = TokenStore.open(write_chat_store(tmp_path))
    assert store.learned is not None and store.learned.tolist() == [0, 1, 1, 0, 0, 1]
    assert store.ends is not None and store.ends.tolist() == [3, 6]
    meta = read_meta(tmp_path)
    assert meta is not None and meta.splits["train"].learned_tokens == 3
    part = store.part(2, 5)
    assert part.learned is not None and part.learned.tolist() == [1, 0, 0]
    learned_file(store.path).write_bytes(b"")
    with pytest.raises(DataError, match=r"train.learned has 0 bytes, but meta.json .* 6 bytes"):
        TokenStore.open(store.path)


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
        writer.write(np.array([1, bad_id], np.uint32))


def test_a_foreign_file_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.tokens.token_store._CHUNK_BYTES", 8)
    path = tmp_path / "train.bin"
    np.array([5, 800, 3, 2, 1, 0, 7], "<u2").tofile(path)
    store = TokenStore.open_plain(path, np.dtype("<u2"), scan_tokens)
    assert (store.max_id, store.vocab_size, store.num_documents) == (800, 801, None)
    assert store.tokens.tolist() == [5, 800, 3, 2, 1, 0, 7]
    assert (store.ends, store.learned) == (None, None)
    assert scan_tokens(path, store.dtype).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_ends_of_a_foreign_file_are_found_by_the_end_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.token_store._CHUNK_TOKENS", chunk)
    path = tmp_path / "train.bin"
    np.array([9, 5, 8, 9, 1, 9, 7], "<u2").tofile(path)
    plain = TokenStore.open_plain(path, np.dtype("<u2"), scan_tokens)
    store = replace(plain, eos_token_id=9)
    assert store.ends is not None and store.ends.tolist() == [1, 4, 6, 7]


def test_what_stands_before_the_tokens_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    path.write_bytes(b"header" + np.array([5, 6, 7], "<u2").tobytes())

    def scan(path: Path, dtype: np.dtype) -> Any:
        return scan_tokens(path, dtype, header_bytes=6)

    store = TokenStore.open_plain(path, np.dtype("<u2"), scan, header_bytes=6)
    assert store.tokens.tolist() == [5, 6, 7]
    assert (store.max_id, store.part(1, 3).tokens.tolist()) == (7, [6, 7])


def test_a_part_is_a_view(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path))
    part = store.part(1, 4)
    assert part.tokens.tolist() == [99, 9, 4]
    assert part.part(2, 3).tokens.tolist() == [4]
    assert (part.num_tokens, part.num_documents) == (3, None)
    assert part.fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("start", "stop", "ends"),
    [(0, 5, [3, 5]), (1, 4, [2, 3]), (3, 5, [2]), (0, 3, [3]), (1, 2, [1])],
)
def test_the_ends_of_a_part_are_its_own(
    tmp_path: Path, start: int, stop: int, ends: list[int]
) -> None:
    part = TokenStore.open(write_store(tmp_path)).part(start, stop)
    assert part.ends is not None and part.ends.tolist() == ends


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is not there"), (b"", "is empty"), (b"abc", "3 bytes, no multiple of 2")],
)
def test_a_file_that_is_no_token_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TokenStore.open_plain(tmp_path / "train.bin", np.dtype("<u2"), scan_tokens)


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = write_store(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"has 8 bytes, but meta.json beside it says 10 bytes"):
        TokenStore.open(path)
    write_store(tmp_path)
    ends_file(path).unlink()
    with pytest.raises(DataError, match=r"train.ends is not there"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 65_537}, "says uint16 for a vocabulary of 65,537"),
        ({"dtype": "float32"}, "says float32"),
        ({"format_version": 99}, "version 99, this program reads 2"),
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
def test_a_meta_file_of_another_program_is_not_ours(tmp_path: Path, content: str) -> None:
    path = write_store(tmp_path)
    (tmp_path / "meta.json").write_text(content)
    assert read_meta(tmp_path) is None
    with pytest.raises(DataError, match=r"no meta.json of ours"):
        TokenStore.open(path)
