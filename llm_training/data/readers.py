"""How one file of each format gives its texts, one document after the other."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llm_training.data.errors import DataError

FileKind = Literal["text", "json", "csv", "parquet", "bin"]

_TEXT_SUFFIXES = """
.txt .text .md .rst .tex .html .htm .xml .css .yaml .yml .toml .ini .cfg
.py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cs .java .kt .scala .go .rs .swift .m
.js .jsx .mjs .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .lean .sh .bash .sql
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
_TABLE_KINDS: dict[str, FileKind] = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".bin": "bin",
}
# One field may be a whole book; csv's own limit is 128 KB.
_CSV_FIELD_LIMIT = 2**31 - 1
_CHECK_BYTES = 4 * 2**20
_PARQUET_ROWS = 256

EMPTY_FILE = "empty files"
NOT_UTF8 = "files that are not UTF-8 text"


class UnreadableFile(Exception):
    """A file that `skip_bad_files` may leave out.

    Attributes:
        reason: the heading it is counted under.
        detail: what is wrong with this one, as the end of a sentence.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def kind_of(path: str | Path) -> FileKind | None:
    """The format that the suffix names; None where it names none that we read."""
    suffix = os.path.splitext(path)[1].lower()
    return "text" if suffix in TEXT_SUFFIXES else _TABLE_KINDS.get(suffix)


def read_texts(path: Path, kind: FileKind, text_column: str) -> Iterator[tuple[str, str]]:
    """Yields (where, text) for each document of a file, in order.

    `where` names the document in messages: the path, and the line or row (from 1). Texts may be
    empty. A text file and a JSON array are read whole, the other formats piece by piece.

    Raises:
        UnreadableFile: the file is empty or is not UTF-8 text; nothing was yielded before.
        DataError: its content is not what its format promises.
    """
    if kind == "parquet":
        rows = _read_parquet(path, text_column)
    else:
        check_text(path)
        if kind == "text":
            yield str(path), path.read_bytes().decode("utf-8")
            return
        rows = _read_csv(path, text_column) if kind == "csv" else _read_json(path, text_column)
    is_empty = True
    for where, value in rows:
        is_empty = False
        yield where, require_text(value, where, text_column)
    if is_empty:
        raise UnreadableFile(EMPTY_FILE, "has no rows")


def check_text(path: Path) -> None:
    """Raises UnreadableFile with the offset of the first byte that cannot be UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHECK_BYTES):
            if (nul := chunk.find(b"\0")) >= 0:
                raise UnreadableFile(NOT_UTF8, f"is binary, not text: byte {offset + nul:,} is NUL")
            _decode(decoder, chunk, offset)
            offset += len(chunk)
    _decode(decoder, b"", offset)
    if offset == 0:
        raise UnreadableFile(EMPTY_FILE, "is empty (0 bytes)")


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, offset: int) -> None:
    # The decoder holds back the start of a character that the last chunk cut; error.start counts
    # from there.
    held_back = len(decoder.getstate()[0])
    try:
        decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        position = offset - held_back + error.start
        byte = error.object[error.start]
        raise UnreadableFile(
            NOT_UTF8, f"is not UTF-8 text: byte {position:,} (0x{byte:02x}), {error.reason}"
        ) from None


def require_text(value: Any, where: str, text_column: str) -> str:
    """`value`, where it is text; else raises DataError."""
    if isinstance(value, str):
        return value
    found = "nothing (null)" if value is None else f"{value!r:.60} ({type(value).__name__})"
    raise DataError(
        f"{where}: {text_column!r} holds {found}, but every document must be a text."
        " Mend or remove such rows, or name another column with text_column."
    )


def require_column(names: list[str], where: str, text_column: str) -> None:
    """Raises DataError, naming the columns there are, where `text_column` is none of them."""
    if text_column not in names:
        raise DataError(
            f"{where} has no {text_column!r}; it has {', '.join(map(repr, names)) or 'nothing'}."
            " Name the one that holds the text with text_column."
        )


def _read_json(path: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    rows = _read_json_array(path) if _starts_with_bracket(path) else _read_json_lines(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{where} is {row!r:.60}, not an object like {{{json.dumps(text_column)}: ...}}."
                " Each document must be an object that holds its text under text_column."
            )
        require_column(list(row), where, text_column)
        yield where, row[text_column]


def _starts_with_bracket(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith("[")
    return False


def _read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
            " The file starts with [ and must be one array of objects; mend it or leave it out."
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, element {number:,}", row


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # newline="\n": Python would also end lines at a lone \r.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number:,}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno}): {line!r:.60}."
                    " A .jsonl or .json file holds one object a line, or one array of objects;"
                    " mend the line, or leave the file out with exclude_files."
                ) from None


def _read_csv(path: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            require_column(list(reader.fieldnames or []), str(path), text_column)
            for row in reader:
                yield f"{path}, line {reader.line_num:,}", row[text_column]
        except csv.Error as error:
            # DictReader's own count stops at the row before.
            raise DataError(
                f"{path}, line {reader.reader.line_num:,}: not valid CSV ({error})."
                " Fields that hold quotes or line ends must be quoted; mend the line."
            ) from None


def _read_parquet(path: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise UnreadableFile(EMPTY_FILE, "is empty (0 bytes)")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(file.schema_arrow.names, str(path), text_column)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number:,}", value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet after row {number:,} ({error})."
            " It may be cut short or damaged: fetch or write it again."
        ) from None
