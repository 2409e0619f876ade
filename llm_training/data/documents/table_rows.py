"""Rows of tables, as every reader gives them: values by column, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_training.data.errors import DataError

NOT_JSON = "lines that are not valid JSON"
NO_OBJECT = "rows that are no table rows"
NO_COLUMN = "rows without the columns asked for"
NO_TEXT = "rows without a usable text"


class BadRow(DataError):
    """A row that `skip_bad_documents` may leave out; the rows after it can be read.

    Attributes:
        reason: the heading it is counted under.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# Where the row is, in words, and what it holds. A fault is given, not raised: raising would end
# the reader.
Row = tuple[str, Mapping[str, Any] | BadRow]


def require_columns(names: Iterable[str], where: str, columns: Sequence[str]) -> None:
    """Raises DataError, naming the columns there are, where one of `columns` is not among them."""
    names = list(names)
    if missing := [column for column in columns if column not in names]:
        raise DataError(
            f"{where} has no {' and no '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, names)) or 'nothing'}. Name the columns that hold the text or"
            " the conversation with text_column, messages_column, or prompt_column and"
            " completion_column."
        )
    if twice := [column for column in columns if names.count(column) > 1]:
        raise DataError(
            f"{where} has several columns called {twice[0]!r}. Rename them, so that it is clear"
            " which one is meant."
        )
