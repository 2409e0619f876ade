"""Rows of JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from llm_training.data.documents.table_rows import (
    NO_COLUMN,
    NO_OBJECT,
    NOT_JSON,
    BadRow,
    Row,
    require_columns,
)
from llm_training.data.documents.text_files import open_text
from llm_training.data.errors import DataError

_READ_CHARACTERS = 2**20
# A number, a word like -Infinity or an escape that the end of the buffer cuts is refused at its
# start, this close to the end at most.
_LONGEST_CUT_TOKEN = 16
_WHITE_SPACE = " \t\r\n"


def read_json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that `check_text` has passed. One row at a time is held, as a whole.

    Raises:
        DataError: an array is not valid JSON; what follows the fault cannot be made out.
    """
    rows = _read_array(path) if _starts_with_bracket(path) else _read_lines(path)
    for where, row in rows:
        yield where, row if isinstance(row, BadRow) else _check_row(row, where, columns)


def _check_row(row: Any, where: str, columns: Sequence[str]) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        example = f"{{{json.dumps(columns[0] if columns else 'text')}: ...}}"
        return BadRow(
            NO_OBJECT,
            f"{where} is {row!r:.60}, not an object like {example}. Each document must be an"
            " object that names its columns; mend it, or set skip_bad_documents.",
        )
    if all(column in row for column in columns):
        return row
    try:
        require_columns(row, where, columns)
    except DataError as error:
        return BadRow(NO_COLUMN, f"{error} Or leave such rows out with skip_bad_documents.")
    return row


def _starts_with_bracket(path: Path) -> bool:
    with open_text(path, encoding="utf-8-sig") as file:
        while text := file.read(_READ_CHARACTERS):
            if start := text.lstrip(_WHITE_SPACE):
                return start[0] == "["
    return False


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    name = str(path)  # to format a path takes a microsecond, for every line
    with open_text(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{name}, line {number:,}"
            try:
                row = json.loads(line)
            # ValueError: a number of thousands of digits. RecursionError: nested too deep.
            except (ValueError, RecursionError) as error:
                row = BadRow(NOT_JSON, _bad_line_message(where, line, error))
            yield where, row


def _bad_line_message(where: str, line: str, error: Exception) -> str:
    what = str(error)
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg} at column {error.colno}"
    return (
        f"{where}: not valid JSON ({what}): {line!r:.60}. A .jsonl or .json file holds one object a"
        " line, or one array of objects; mend the line, leave such lines out with"
        " skip_bad_documents, or leave the file out with exclude_files."
    )


def _read_array(path: Path) -> Iterator[tuple[str, Any]]:
    with open_text(path, encoding="utf-8-sig") as file:
        array = _ArrayReader(file, path)
        array.expect("[")
        if array.next_character() == "]":
            array.expect("]")
        else:
            number, more = 0, True
            while more:
                number += 1
                yield f"{path}, element {number:,}", array.element()
                more = array.expect(",]") == ","
        if array.next_character():
            array.fail("something follows the end of the array")


class _ArrayReader:
    """Decodes a JSON array element by element, from a buffer that holds about one of them."""

    def __init__(self, file: TextIO, path: Path):
        self._file = file
        self._path = path
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._is_end = False
        # Of the text before the buffer: its line ends, and the characters after the last one.
        self._lines_before = 0
        self._characters_before = 0

    def next_character(self) -> str:
        """The next one that is no white space, which is not taken; "" at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                if (character := self._buffer[self._position]) not in _WHITE_SPACE:
                    return character
                self._position += 1
            if not self._read_more():
                return ""

    def expect(self, characters: str) -> str:
        """Takes the next character, which must be one of these."""
        found = self.next_character()
        if not found or found not in characters:
            self.fail(f"expecting {' or '.join(map(repr, characters))}")
        self._position += 1
        return found

    def element(self) -> Any:
        """Takes the next value."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._read_more()):
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                self.fail(str(error))
            else:
                # A number at the very end of the buffer may have further digits.
                if end < len(self._buffer) or not self._read_more():
                    self._position = end
                    return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        # Other faults are known at once: the rest of a large file is not read for them.
        is_near_end = error.pos + _LONGEST_CUT_TOKEN > len(self._buffer)
        return is_near_end or error.msg.startswith("Unterminated string")

    def _read_more(self) -> bool:
        """Drops what was taken and reads on; False at the end of the file."""
        if self._is_end:
            return False
        # As much again as a long element has by now: each is decoded a few times only.
        num_left = len(self._buffer) - self._position
        text = self._file.read(max(_READ_CHARACTERS, num_left))
        self._is_end = not text
        if text:
            taken, rest = self._buffer[: self._position], self._buffer[self._position :]
            after_line_end = len(taken) - (taken.rfind("\n") + 1)
            self._characters_before = after_line_end + ("\n" not in taken) * self._characters_before
            self._lines_before += taken.count("\n")
            self._buffer, self._position = rest + text, 0
        return bool(text)

    def fail(self, what: str, position: int | None = None) -> NoReturn:
        """Raises DataError with line and column of `position` in the buffer; None: of the next."""
        before = self._buffer[: self._position if position is None else position]
        line = 1 + self._lines_before + before.count("\n")
        column = 1 + len(before) - (before.rfind("\n") + 1)
        column += ("\n" not in before) * self._characters_before
        raise DataError(
            f"{self._path}, line {line:,}, column {column:,}: not valid JSON ({what})."
            " The file starts with [ and must be one array of objects; mend it or leave it out"
            " with exclude_files."
        ) from None
