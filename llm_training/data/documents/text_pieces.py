"""The documents of a text file: the whole file, its lines, or what stands between blank lines.

Memory is bounded whatever the file: a document above `PIECE_CHARACTERS` is given in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from llm_training.data.documents.text_files import EMPTY_FILE, UnreadableFile, check_text, open_text

Separator = Literal["file", "line", "blank_line"]

# In Python, a character takes 1 to 4 bytes.
PIECE_CHARACTERS = 16 * 2**20
_READ_CHARACTERS = 2**20
# How far before the limit a good place for a cut is looked for.
_REACH_CHARACTERS = 2**20
# Where a cut changes no token (see encoding.cut_before_newlines), and where it seldom does.
_GOOD_CUTS = (re.compile(r"[A-Za-z0-9](?=\n)"), re.compile(r"[A-Za-z0-9](?=\s)"))


class TextPiece(NamedTuple):
    """A document, or a piece of one.

    Attributes:
        where: the path, and the line that the document starts in (from 1) if it is not the file.
        is_last: whether the document ends here.
        num_characters: of the whole document, where this is a piece of it; else None.
    """

    where: str
    text: str
    is_last: bool
    num_characters: int | None


# A stretch of text as it is read: the line that its document starts in, the text, and whether the
# document ends with it. These two are plain tuples because there may be billions of lines.
_Span = tuple[int, str, bool]
# A line, or a fragment of a very long one: its number, the text, its end ("\n", "\r\n", or "" if it
# is not there yet or the file ends), and whether the line starts and whether it ends here.
_Line = tuple[int, str, str, bool, bool]


def read_texts(path: Path, separator: Separator) -> Iterator[TextPiece]:
    """The documents of a text file, in order; every character is in one or in a separator.

    - "file": the file is one document, to the byte.
    - "line": each line is one, without its line end ("\\n" or "\\r\\n"); empty lines are empty
      documents. A line end at the end of the file starts no further line.
    - "blank_line": lines that hold at most white space separate documents, and are none
      themselves, however many follow each other. A document keeps the line ends inside it, not
      the last one.

    Raises:
        UnreadableFile: the file is empty or is not UTF-8 text; nothing was yielded before.
        DataError: a compressed file is damaged; nothing was yielded before.
    """
    total = check_text(path)
    lengths = {1: total} if separator == "file" else {}
    cutter = PieceCutter()
    is_empty, num_characters, name = True, None, str(path)
    with open_text(path) as file:
        for line, text, ends_document in _SPANS[separator](file):
            is_empty = False
            where = name if separator == "file" else f"{name}, line {line:,}"
            for piece in cutter.feed(text):
                if line not in lengths:
                    lengths = _lengths_of_long_documents(path, separator)
                num_characters = lengths.get(line)
                yield TextPiece(where, piece, False, num_characters)
            if ends_document:
                yield TextPiece(where, cutter.finish(), True, num_characters)
                num_characters = None
    if is_empty:
        raise UnreadableFile(EMPTY_FILE, "holds nothing but blank lines")


class PieceCutter:
    """Cuts one document after the other into pieces of at most `PIECE_CHARACTERS`.

    Where the cuts lie depends on the text alone, not on how it is fed.
    """

    def __init__(self) -> None:
        self._held: list[str] = []
        self._num_held = 0

    def feed(self, text: str) -> Iterator[str]:
        """Takes more of the document; yields the pieces that are full. Another follows them."""
        self._held.append(text)
        self._num_held += len(text)
        while self._num_held > PIECE_CHARACTERS:
            held = "".join(self._held)
            cut = _best_cut(held)
            self._held, self._num_held = [held[cut:]], len(held) - cut
            yield held[:cut]

    def finish(self) -> str:
        """The rest of the document: its last piece. What is fed then is another document."""
        rest = "".join(self._held)
        self._held, self._num_held = [], 0
        return rest


def _best_cut(text: str) -> int:
    """Where a text longer than a piece is cut: before a newline after a word, if one is in reach.

    That is: the piece ends in an ASCII letter or digit, and the next starts with "\\n". Else, such
    a cut is made before other white space, as in files with "\\r\\n", or else in mid-word.
    """
    start = max(PIECE_CHARACTERS - _REACH_CHARACTERS, 0)
    for pattern in _GOOD_CUTS:
        if match := pattern.search(text, start, PIECE_CHARACTERS + 1):
            return match.end()
    return PIECE_CHARACTERS


def _lengths_of_long_documents(path: Path, separator: Separator) -> dict[int, int]:
    """Characters of each document that is cut, by the line that it starts in: one more reading."""
    lengths, length = {}, 0
    with open_text(path) as file:
        for line, text, ends_document in _SPANS[separator](file):
            length += len(text)
            if ends_document:
                if length > PIECE_CHARACTERS:
                    lengths[line] = length
                length = 0
    return lengths


def _whole_file(file: TextIO) -> Iterator[_Span]:
    while text := file.read(_READ_CHARACTERS):
        yield 1, text, False
    yield 1, "", True


def _each_line(file: TextIO) -> Iterator[_Span]:
    for number, text, _, _, is_last in _lines(file):
        yield number, text, is_last


def _between_blank_lines(file: TextIO) -> Iterator[_Span]:
    # start: the first line of the document that is open; 0 where none is.
    start, held_end = 0, ""
    for number, text, line_end, is_first, is_last in _lines(file):
        if is_first and is_last and not text.strip():
            if start:
                yield start, "", True
            start, held_end = 0, ""
        else:
            start = start or number
            yield start, held_end + text, False
            held_end = line_end
    if start:
        yield start, "", True


_SPANS: dict[Separator, Callable[[TextIO], Iterator[_Span]]] = {
    "file": _whole_file,
    "line": _each_line,
    "blank_line": _between_blank_lines,
}


def _lines(file: TextIO) -> Iterator[_Line]:
    """The lines; those above `_READ_CHARACTERS` in fragments."""
    number, is_first = 1, True
    fragment = file.readline(_READ_CHARACTERS)
    while fragment:
        following = file.readline(_READ_CHARACTERS)
        # A fragment may have ended inside of "\r\n".
        if following == "\n" and fragment[-1] == "\r":
            fragment, following = fragment + following, file.readline(_READ_CHARACTERS)
        if fragment[-1] == "\n":
            text = fragment[:-1].removesuffix("\r")
            yield number, text, fragment[len(text) :], is_first, True
            number, is_first = number + 1, True
        else:
            yield number, fragment, "", is_first, not following
            is_first = False
        fragment = following
