"""Documents of a dataset that is read over the network as they are needed, epoch after epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_training.data.documents.formats import DocumentFormat
from llm_training.data.documents.sources import EMPTY_DOCUMENT, Document, utf8_length
from llm_training.data.documents.table_rows import BadRow
from llm_training.data.errors import DataError, one_line
from llm_training.data.ledger import Ledger, LeftOut

if TYPE_CHECKING:
    import datasets

BAD_DOCUMENT = "rows that hold no document"


@dataclass(frozen=True)
class StreamPlace:
    """A border between two rows of a stream.

    Attributes:
        epoch: how often the stream was gone through before.
        row: rows of this epoch that lie before the border.
        dataset_state: where that is, in the words of the `datasets` library.
        left_out: rows that were left out so far, over all epochs, by reason.
    """

    epoch: int
    row: int
    dataset_state: Mapping[str, Any]
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamPlace:
        """The inverse of `dataclasses.asdict`."""
        left_out = {reason: LeftOut(**entry) for reason, entry in values["left_out"].items()}
        return cls(**{**values, "left_out": left_out})


class StreamedDocument(NamedTuple):
    """A document, and the border behind its row."""

    document: Document
    after: StreamPlace


class DocumentStream:
    """The documents of one split, which can be gone on with from any border between its rows.

    The library's shuffle buffer is not used: rows that lie in it are lost on resume. From the
    second epoch on the library reads the shards in another order, which the epoch's number gives.

    Attributes:
        name: dataset and split, for messages.
        num_shards: files, or parts of such, that the library reads one after the other.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        name: str,
        document_format: DocumentFormat,
        *,
        skip_bad_documents: bool = False,
    ):
        """
        Raises:
            DataError: it has not the columns that the format reads.
        """
        _check_columns(dataset, name, document_format.columns)
        self.name = name
        self.num_shards: int = dataset.num_shards
        self._dataset = dataset.select_columns(list(document_format.columns))
        self._first_state = self._dataset.state_dict()
        self._format = document_format
        self._skip_bad_documents = skip_bad_documents

    def begin(self) -> StreamPlace:
        """The border before the first row."""
        return StreamPlace(epoch=0, row=0, dataset_state=self._first_state)

    def documents(self, place: StreamPlace) -> Iterator[StreamedDocument]:
        """The documents from a border on, without an end: after each epoch comes the next.

        Raises:
            DataError: a row holds no document, the library fails, or a whole epoch is empty.
        """
        while True:
            place = yield from self.rest_of_epoch(place)

    def rest_of_epoch(self, place: StreamPlace) -> Generator[StreamedDocument, None, StreamPlace]:
        """The documents from a border to the end of its epoch; returns where the next one begins.

        Raises:
            DataError: as `documents`.
        """
        ledger = Ledger(left_out=_copy(place.left_out))
        left_out, number, state = place.left_out, place.row, place.dataset_state
        is_empty = place.row == 0
        for number, row, state in self._rows(place):
            where = f"{self.name}, row {number:,}"
            if place.epoch:
                where += f" of epoch {place.epoch + 1:,}"
            document = self._document(row, where, ledger)
            if document is None:
                left_out = _copy(ledger.left_out)  # borders share what does not change between them
                continue
            is_empty = False
            yield StreamedDocument(document, StreamPlace(place.epoch, number, state, left_out))
        if is_empty:
            raise DataError(
                f"{self.name} has no document: of {number:,} rows, every one was left out. Check"
                " dataset_name, dataset_config_name and the columns that are read."
            )
        # The state is of the epoch that ended, so the library does not apply it to the next.
        return StreamPlace(place.epoch + 1, 0, state, left_out)

    def _rows(self, place: StreamPlace) -> Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]]:
        """The rows with their number in the epoch, from 1, and the library's state behind each."""
        self._dataset.set_epoch(place.epoch)
        self._dataset.load_state_dict(place.dataset_state)
        number = place.row
        try:
            for row in self._dataset:
                number += 1
                yield number, row, self._dataset.state_dict()
        # The library raises whatever its parts raise.
        except Exception as error:
            raise DataError(
                f"{self.name} cannot be read on after row {number:,}: {one_line(error)} Check the"
                " network (the library tried several times) and the shard, then start the same"
                " command again: it goes on from the last checkpoint."
            ) from error

    def _document(self, row: Mapping[str, Any], where: str, ledger: Ledger) -> Document | None:
        try:
            rendered = self._format.render(row, where)
            if rendered.text:
                num_bytes = utf8_length(rendered.text, where)
                return Document(rendered.text, num_bytes, None, where, learned=rendered.learned)
        except DataError as error:
            if not self._skip_bad_documents:
                raise
            ledger.leave_out(error.reason if isinstance(error, BadRow) else BAD_DOCUMENT, where)
        else:
            ledger.leave_out(EMPTY_DOCUMENT, where)
        return None

    def key(self) -> Any:
        """Plain values that change when the documents may have changed."""
        return {
            "stream": self.name,
            "shards": self.num_shards,
            "format": self._format.key(),
            "skip_bad_documents": self._skip_bad_documents,
        }


def _copy(left_out: Mapping[str, LeftOut]) -> dict[str, LeftOut]:
    return {reason: replace(entry, names=[*entry.names]) for reason, entry in left_out.items()}


def _check_columns(dataset: datasets.IterableDataset, name: str, columns: tuple[str, ...]) -> None:
    names = dataset.column_names
    if names is None:  # the library learns them from the first row
        names = list(next(iter(dataset), dict.fromkeys(columns)))
    if missing := [column for column in columns if column not in names]:
        raise DataError(
            f"{name} has no {' and no '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, names))}. Name the one that holds the text with text_column,"
            " or conversations with messages_column."
        )


def open_stream(
    name: str,
    config_name: str | None,
    document_format: DocumentFormat,
    *,
    split: str = "train",
    revision: str | None = None,
    skip_bad_documents: bool = False,
) -> DocumentStream:
    """One split of a dataset, of which nothing is downloaded beforehand.

    Args:
        name: a hub id, or a local folder of data files.
        revision: branch, tag or commit on the hub; a commit alone is sure to stay what it is.
        skip_bad_documents: rows that hold no document are left out and counted, not an error.

    Raises:
        DataError: it cannot be opened, has no such split, or not the columns that are read.
    """
    import datasets

    folder = Path(name).expanduser()
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"dataset_name {name!r} was written by save_to_disk and lies on this disk already:"
            " leave out streaming."
        )
    path = str(folder) if folder.is_dir() else name
    try:
        splits = datasets.load_dataset(path, config_name, revision=revision, streaming=True)
    # The library raises whatever its parts raise.
    except Exception as error:
        raise DataError(
            f"dataset_name {name!r} cannot be opened for streaming: {one_line(error)} Check the"
            " name, dataset_config_name and dataset_revision; a hub id needs a reachable hub, a"
            " local folder must hold data files."
        ) from error
    if split not in splits:
        raise DataError(
            f"dataset_name {name!r} has no split {split!r}; it has"
            f" {', '.join(map(repr, splits))}. Choose another dataset or dataset_config_name."
        )
    parts = [name, config_name, revision and f"@{revision}", f"[{split}]"]
    return DocumentStream(
        splits[split],
        " ".join(part for part in parts if part),
        document_format,
        skip_bad_documents=skip_bad_documents,
    )
