"""Proves that packed files give their content to the byte, and that no damage goes unnoticed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from llm_training.data.documents.compressed import is_compressed, name_inside, open_binary
from llm_training.data.errors import DataError


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
suffixes = pytest.mark.parametrize("suffix", PACK)


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with open_binary(path) as file:
        return file.read()


def content_of(num_bytes: int) -> bytes:
    return random.Random(0).randbytes(num_bytes // 2) + b"\0" * (num_bytes // 2)


@suffixes
def test_the_content_comes_back(tmp_path: Path, suffix: str) -> None:
    content = content_of(3 * 2**20)
    assert read(tmp_path / f"a{suffix}", PACK[suffix](content)) == content
    assert read(tmp_path / f"A{suffix.upper()}", PACK[suffix](b"x")) == b"x"
    assert read(tmp_path / f"b{suffix}", b"") == b""


@suffixes
def test_all_members_are_read(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
    members = [b"first\n", b"", b"second\n" * 300_000, b"third"]
    packed = b"".join(map(pack, members))
    assert read(tmp_path / f"a{suffix}", packed) == b"".join(members)


@suffixes
def test_a_file_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    packed = PACK[suffix](b"some text " * 1000)
    path = tmp_path / f"a{suffix}"
    for length in (1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(DataError, match=rf"a{suffix} cannot be unpacked"):
            read(path, packed[:length])
    # The second member is the one cut short.
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(path, packed + packed[: len(packed) // 2])


@suffixes
def test_what_is_no_archive_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    packed = PACK[suffix](b"text")
    for content in (b"plain text, not packed", packed + b"more, not packed"):
        with pytest.raises(DataError, match="damaged or cut short"):
            read(path, content)


def test_padding_after_an_xz_file_is_no_damage(tmp_path: Path) -> None:
    packed = lzma.compress(b"a") + b"\0" * 8 + lzma.compress(b"b") + b"\0" * 4
    assert read(tmp_path / "a.xz", packed) == b"ab"


def test_names() -> None:
    assert name_inside("x.d/a.jsonl.gz") == "x.d/a.jsonl"
    assert name_inside("a.jsonl") == "a.jsonl"
    assert [is_compressed(name) for name in ("a.ZST", "a.zip", "gz")] == [True, False, False]
