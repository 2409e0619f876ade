"""Which kind of file a name stands for, and the rows of the files that are tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from llm_training.data.documents.column_files import read_arrow, read_csv, read_parquet
from llm_training.data.documents.compressed import is_compressed, name_inside
from llm_training.data.documents.json_rows import read_json
from llm_training.data.documents.table_rows import Row
from llm_training.data.documents.text_files import EMPTY_FILE, UnreadableFile, check_text
from llm_training.data.errors import DataError

FileKind = Literal["text", "json", "csv", "parquet", "arrow", "bin"]
TABLE_SUFFIXES = ".jsonl, .json, .csv, .parquet or .arrow"

_TEXT_SUFFIXES = """
.txt .text .md .rst .tex .html .htm .xml .css .yaml .yml .toml .ini .cfg
.py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cs .java .kt .scala .go .rs .swift .m
.js .jsx .mjs .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .lean .sh .bash .sql
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
_OTHER_KINDS: dict[str, FileKind] = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "bin",
    ".npy": "bin",
}
# These are read from the middle, which a packed file does not allow.
_NEVER_PACKED = ("parquet", "arrow")
_ROW_READERS: dict[FileKind, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def kind_of(path: str | Path) -> FileKind | None:
    """The format that the suffix names, before that of a compression; None if we read no such."""
    suffix = os.path.splitext(name_inside(path))[1].lower()
    kind: FileKind | None = "text" if suffix in TEXT_SUFFIXES else _OTHER_KINDS.get(suffix)
    # Token files are used where they lie.
    return None if kind == "bin" and is_compressed(path) else kind


def read_rows(path: Path, kind: FileKind, columns: Sequence[str]) -> Iterator[Row]:
    """Yields (where, row) for each row of a table, in order; a row that is bad, as a `BadRow`.

    `where` names the row in messages: the path, and the line or row (from 1). A row holds at least
    `columns`. One line, row or cell is held whole, and some hundreds of rows of Parquet and Arrow;
    beyond that, memory is bounded.

    Raises:
        UnreadableFile: the file is empty or is not UTF-8 text; nothing was yielded before.
        DataError: its content is not what its format promises, or a column is missing.
    """
    if kind in _NEVER_PACKED:
        if is_compressed(path):
            raise DataError(
                f"{path}: .{kind} files are compressed inside, and cannot be read through"
                f" {path.suffix}. Unpack it first."
            )
    else:
        check_text(path)
    is_empty = True
    for row in _ROW_READERS[kind](path, columns):
        is_empty = False
        yield row
    if is_empty:
        raise UnreadableFile(EMPTY_FILE, "has no rows")
