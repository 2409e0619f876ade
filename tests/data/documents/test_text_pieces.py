"""Proves that text files are parted where they should be, and long documents cut without loss."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_training.data.documents import text_pieces
from llm_training.data.documents.text_files import UnreadableFile
from llm_training.data.documents.text_pieces import Separator, TextPiece, read_texts

SetSizes = Callable[[int, int], None]


@pytest.fixture
def set_sizes(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    def set_sizes(piece: int, read: int) -> None:
        monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", piece)
        monkeypatch.setattr(text_pieces, "_REACH_CHARACTERS", piece // 2)
        monkeypatch.setattr(text_pieces, "_READ_CHARACTERS", read)

    return set_sizes


def pieces_of(path: Path, content: str, separator: Separator = "file") -> list[TextPiece]:
    path.write_bytes(content.encode())
    return list(read_texts(path, separator))


def texts_of(path: Path, content: str, separator: Separator) -> list[tuple[str, str]]:
    """(line, text) of each document, of which none is in pieces."""
    pieces = pieces_of(path, content, separator)
    assert all(piece.is_last and piece.num_characters is None for piece in pieces)
    return [(piece.where.removeprefix(f"{path}, line "), piece.text) for piece in pieces]


def test_a_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    path, text = tmp_path / "a.txt", "\ufeffline\r\nzweite Zeile: ä\u2028\ttab \x0c\n\n"
    assert pieces_of(path, text) == [TextPiece(str(path), text, True, None)]


@pytest.mark.parametrize("read", [1, 2, 3, 1000])
def test_each_line_is_a_document_without_its_end(
    tmp_path: Path, set_sizes: SetSizes, read: int
) -> None:
    set_sizes(1000, read)
    text = "one\r\n\ntwo\rand\u2028more\n \nlast"
    expected = [("1", "one"), ("2", ""), ("3", "two\rand\u2028more"), ("4", " "), ("5", "last")]
    assert texts_of(tmp_path / "a.txt", text, "line") == expected
    assert texts_of(tmp_path / "a.txt", text + "\n", "line") == expected
    assert texts_of(tmp_path / "a.txt", "a\r\nb\r", "line") == [("1", "a"), ("2", "b\r")]


@pytest.mark.parametrize("read", [4, 5, 1000])
def test_blank_lines_separate_documents(tmp_path: Path, set_sizes: SetSizes, read: int) -> None:
    set_sizes(1000, read)
    text = "\n \none\r\n  more \n\t\r\n\n\n  two\n   \nthree\n\n"
    expected = [("3", "one\r\n  more "), ("8", "  two"), ("10", "three")]
    assert texts_of(tmp_path / "a.txt", text, "blank_line") == expected


def test_a_file_of_blank_lines_holds_no_document(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="nothing but blank lines"):
        pieces_of(tmp_path / "a.txt", "\n  \n\n", "blank_line")


def random_text(seed: int) -> str:
    alphabet = ["ab ", "c1\n", "\n", " \n", "é", "\r\n", "\n\n", "longword" * 3, "😀"]
    return "".join(random.Random(seed).choices(alphabet, k=120))


@pytest.mark.parametrize("separator", ["file", "line", "blank_line"])
@pytest.mark.parametrize("seed", range(15))
def test_pieces_joined_are_the_documents_whole(
    tmp_path: Path, set_sizes: SetSizes, separator: Separator, seed: int
) -> None:
    text = random_text(seed)
    set_sizes(10_000, 10_000)
    whole = pieces_of(tmp_path / "a.txt", text, separator)
    for limit, read in ((16, 4), (16, 50), (5, 9)):
        set_sizes(limit, read)
        joined, held = [], ""
        for piece in pieces_of(tmp_path / "a.txt", text, separator):
            assert len(piece.text) <= limit
            assert piece.text or piece.is_last
            held += piece.text
            if piece.is_last:
                length = None if len(held) <= limit else len(held)
                assert piece.num_characters == length
                joined.append(TextPiece(piece.where, held, True, None))
                held = ""
        assert joined == whole


def test_where_the_cuts_lie_does_not_depend_on_the_reading(
    tmp_path: Path, set_sizes: SetSizes
) -> None:
    found = []
    for read in (1, 7, 64, 5000):
        set_sizes(64, read)
        found.append(pieces_of(tmp_path / "a.txt", random_text(99)))
    assert found[0] == found[1] == found[2] == found[3]
    assert len(found[0]) > 3


@pytest.mark.parametrize(
    ("text", "first"),
    [
        # Before a newline that follows a word, even where the piece could be longer.
        ("words here\nand x;\nmore words", "words here"),
        # A newline after other signs is no such place: before a space after a word.
        ("statement();\nfoo bar;\r\nmore", "statement();\nfoo"),
        ("one line\r\nand another\r\n", "one line\r\nand"),
        ("的" * 30, "的" * 16),
    ],
)
def test_cuts_lie_before_a_newline_after_a_word(
    tmp_path: Path, set_sizes: SetSizes, text: str, first: str
) -> None:
    set_sizes(16, 100)
    assert pieces_of(tmp_path / "a.txt", text)[0].text == first


def test_a_long_file_is_not_held_whole(tmp_path: Path, set_sizes: SetSizes) -> None:
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(400_000):
            file.write(f"line {number} of a long file, which is no longer than needed\n")
    set_sizes(2**20, 2**18)
    tracemalloc.start()
    num_characters = sum(len(piece.text) for piece in read_texts(path, "file"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_characters == path.stat().st_size > 20e6
    # The check of the text takes 4 MB of the file at a time.
    assert peak < 15e6
