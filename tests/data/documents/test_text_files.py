"""Proves that text is checked to the last byte, and counted, before anything of it is used."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llm_training.data.documents.text_files import UnreadableFile, check_text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\0c", "byte 2 is NUL"),
        (b"caf\xe9 au lait", "byte 3 "),
        ("é".encode()[:1], "byte 0 "),
        (b"12345678\xc3\xa9123\xff", "byte 13 "),
        # The chunks end inside the character.
        (b"1234567\xe2\x82\xac\xff", "byte 10 "),
        (b"1234567\xe2\x82x", "byte 7 "),
        (b"12345678901\0", "byte 11 is NUL"),
    ],
)
def test_the_first_bad_byte_is_found_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.setattr("llm_training.data.documents.text_files._CHECK_BYTES", 8)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=words):
        check_text(path)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_characters_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("llm_training.data.documents.text_files._CHECK_BYTES", size)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffgröße €\r\n😀".encode()))
    assert check_text(tmp_path / "a.txt.gz") == 11


def test_an_empty_file_is_unreadable(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnreadableFile, match=r"is empty \(0 bytes\)"):
            check_text(tmp_path / name)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UnreadableFile, match=r"is empty \(0 bytes\)"):
        check_text(tmp_path / "a.txt.gz")
