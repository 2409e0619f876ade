"""Rows of files that name their columns once: CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.data.documents.table_rows import NO_OBJECT, NO_TEXT, BadRow, Row, require_columns
from llm_training.data.documents.text_files import EMPTY_FILE, UnreadableFile, open_text
from llm_training.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# One field may be a whole book; csv's own limit is 128 KB.
_CSV_FIELD_LIMIT = 2**31 - 1
_BATCH_ROWS = 256
# Without it, a column of a whole row group is read at once.
_BUFFER_BYTES = 2**20
_ARROW_FILE_MARK = b"ARROW1"


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that `check_text` has passed.

    Raises:
        DataError: a column is missing, or quotes are wrong: where the next row starts is then
            unknown, so that such a row cannot be skipped.
    """
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with open_text(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = list(reader.fieldnames or [])
            require_columns(names, str(path), columns)
            for row in reader:
                where = f"{path}, line {reader.line_num:,}"
                yield where, _check_width(row, where, len(names), columns)
        except csv.Error as error:
            # DictReader's own count stops at the row before.
            raise DataError(
                f"{path}, line {reader.reader.line_num:,}: not valid CSV ({error})."
                " Fields that hold quotes or line ends must be quoted; mend the line."
            ) from None


def _check_width(
    row: dict[Any, Any], where: str, num_columns: int, columns: Sequence[str]
) -> dict[str, Any] | BadRow:
    if more := row.get(None):
        return BadRow(
            NO_OBJECT,
            f"{where}: {num_columns + len(more):,} fields, but the first line names"
            f" {num_columns:,}. A field that holds a comma must be quoted; mend the line, or leave"
            " such lines out with skip_bad_documents.",
        )
    return {column: row[column] for column in columns}


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows, some hundreds at a time.

    Raises:
        UnreadableFile: the file is empty.
        DataError: a column is missing, or the file is damaged.
    """
    import pyarrow.parquet

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            require_columns(file.schema_arrow.names, str(path), columns)
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))

    return _read_batches(path, "Parquet", batches(), columns)


def read_arrow(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of an Arrow file, or of an Arrow stream, which the `datasets` library writes.

    The file is mapped into memory, not read there.

    Raises:
        UnreadableFile: the file is empty.
        DataError: a column is missing, or the file is damaged.
    """
    import pyarrow.ipc

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(len(_ARROW_FILE_MARK)) == _ARROW_FILE_MARK
            mapped.seek(0)
            if is_file:
                file = pyarrow.ipc.open_file(mapped)
                require_columns(file.schema.names, str(path), columns)
                yield from (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                stream = pyarrow.ipc.open_stream(mapped)
                require_columns(stream.schema.names, str(path), columns)
                yield from stream

    return _read_batches(path, "Arrow", batches(), columns)


def _read_batches(
    path: Path, format_name: str, batches: Iterator[pyarrow.RecordBatch], columns: Sequence[str]
) -> Iterator[Row]:
    import pyarrow

    if path.stat().st_size == 0:
        raise UnreadableFile(EMPTY_FILE, "is empty (0 bytes)")
    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                part = batch.select(list(columns)).slice(start, _BATCH_ROWS)
                for row in _rows_of(part, path, number):
                    number += 1
                    yield row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as {format_name} after row {number:,} ({error})."
            " It may be cut short or damaged: fetch or write it again."
        ) from None


def _rows_of(batch: pyarrow.RecordBatch, path: Path, number: int) -> Iterator[Row]:
    """The rows of a batch that follows row `number`."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:
        # Some value is not UTF-8: row by row shows which.
        rows = [None] * batch.num_rows
    for index, row in enumerate(rows):
        where = f"{path}, row {number + index + 1:,}"
        yield where, _decode_row(batch, index, where) if row is None else row


def _decode_row(batch: pyarrow.RecordBatch, index: int, where: str) -> dict[str, Any] | BadRow:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(
            NO_TEXT,
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start:,}). Mend or remove"
            " such rows, or leave them out with skip_bad_documents.",
        )
