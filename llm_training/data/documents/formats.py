"""How a row of a table becomes the text of a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from llm_training.data.errors import DataError


class Rendered(NamedTuple):
    """The text of one row, and of conversations the parts that are learned (see `Document`)."""

    text: str
    learned: tuple[tuple[int, int], ...] | None = None


class DocumentFormat(Protocol):
    """How the values of a row are made into one text.

    Attributes:
        columns: the columns that it reads, by name.
        gives_conversations: whether only parts of its documents are learned.
    """

    gives_conversations: bool

    @property
    def columns(self) -> tuple[str, ...]: ...

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """The document of one row; raises DataError, beginning with `where`, if it holds none."""

    def key(self) -> Any:
        """Plain values that change when the same row would give another document."""


@dataclass(frozen=True)
class PlainText:
    """One column holds the text."""

    text_column: str
    gives_conversations = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_column,)

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        value = row[self.text_column]
        if isinstance(value, str):
            return Rendered(value)
        found = "nothing (null)" if value is None else f"{value!r:.60} ({type(value).__name__})"
        raise DataError(
            f"{where}: {self.text_column!r} holds {found}, but every document must be a text."
            " Mend or remove such rows, leave them out with skip_bad_documents, or name another"
            " column with text_column."
        )

    def key(self) -> Any:
        return {"text_column": self.text_column}
