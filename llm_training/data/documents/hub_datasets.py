"""Documents from the `datasets` library: the Hugging Face hub, or a local folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.data.documents.formats import DocumentFormat
from llm_training.data.documents.sources import Document, documents_of_rows
from llm_training.data.documents.table_rows import Row, require_columns
from llm_training.data.errors import DataError, one_line
from llm_training.data.ledger import Ledger

if TYPE_CHECKING:
    import datasets

# Gives a split (or a slice or sum of splits) and the names of all there are; raises anything.
_LoadSplit = Callable[[str], "tuple[datasets.Dataset, list[str]]"]

_BATCH_ROWS = 256
_OWN_VALIDATION = "validation"


@dataclass(frozen=True)
class HubDataset:
    """The documents of one split, in its order.

    Attributes:
        name: dataset and split, for messages.
        document_format: makes the rows into documents.
        skip_bad_documents: leave out rows that hold no document.
    """

    dataset: datasets.Dataset
    name: str
    document_format: DocumentFormat
    skip_bad_documents: bool = False

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents, row by row; a row, some hundreds at a time, is held whole.

        Raises:
            DataError: a column is missing, or a row holds no document and such are not skipped.
        """
        require_columns(self.dataset.column_names, self.name, self.document_format.columns)
        return documents_of_rows(
            self._rows(),
            self.document_format,
            file=None,
            skip_bad_documents=self.skip_bad_documents,
            ledger=ledger,
        )

    def _rows(self) -> Iterator[Row]:
        columns = list(self.document_format.columns)
        number = 0
        for batch in self.dataset.select_columns(columns).iter(batch_size=_BATCH_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                number += 1
                yield f"{self.name}, row {number:,}", dict(zip(columns, values, strict=True))

    def key(self) -> Any:
        return {
            "dataset": self.name,
            # The library's own mark of the content and of what was done to it.
            "rows": self.dataset._fingerprint,
            "format": self.document_format.key(),
            "skip": self.skip_bad_documents,
        }

    def num_bytes(self) -> int:
        return self.dataset.data.nbytes


def load_hub_dataset(
    name: str,
    config_name: str | None = None,
    *,
    split: str = "train",
    validation_split: str | None = None,
    revision: str | None = None,
    document_format: DocumentFormat,
    skip_bad_documents: bool = False,
) -> tuple[HubDataset, HubDataset | None]:
    """What is trained on, and what is validated on if there is such a split.

    Args:
        name: a hub id, a local folder of data files, or a folder that `save_to_disk` wrote.
        config_name: one of its configurations; not for `save_to_disk`, which has none.
        split, validation_split: as the library writes them: train, train[:10%], train+test[50:].
            None: the split called validation, if there is one that `split` does not hold.
        revision: branch, tag or commit on the hub.
        document_format, skip_bad_documents: as in `HubDataset`.

    Raises:
        DataError: it cannot be loaded, or has no such split; those that it has are named.
    """
    folder = Path(name).expanduser()
    if revision is not None and folder.is_dir():
        raise DataError(
            f"dataset_revision is {revision!r}, but dataset_name {name!r} is a local folder, which"
            " has no revisions. Leave dataset_revision null."
        )
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        load = _saved_splits(name, folder, config_name)
    else:
        load = _library_splits(str(folder) if folder.is_dir() else name, config_name, revision)

    def hub_dataset(split: str) -> tuple[HubDataset, list[str]]:
        try:
            rows, names = load(split)
        # The library raises whatever its parts raise.
        except Exception as error:
            raise DataError(
                f"dataset_name {name!r} cannot be loaded with split {split!r}: {one_line(error)}"
                " Check the name, dataset_config_name, dataset_split and dataset_validation_split;"
                " a hub id needs a reachable hub (or its copy in the local cache), a local folder"
                " must hold data files or be what save_to_disk wrote."
            ) from error
        return HubDataset(rows, f"{name} [{split}]", document_format, skip_bad_documents), names

    train, names = hub_dataset(split)
    is_free = _OWN_VALIDATION in names and _OWN_VALIDATION not in _names_in(split)
    if validation_split is None and is_free:
        validation_split = _OWN_VALIDATION
    return train, hub_dataset(validation_split)[0] if validation_split else None


def _names_in(split: str) -> list[str]:
    """The splits in train[:10%]+test: train and test."""
    return [re.sub(r"[\[(].*", "", part).strip() for part in split.split("+")]


def _library_splits(name: str, config_name: str | None, revision: str | None) -> _LoadSplit:
    import datasets

    def load(split: str) -> tuple[datasets.Dataset, list[str]]:
        # The second call takes from the cache what the first prepared.
        rows = datasets.load_dataset(name, config_name, split=split, revision=revision)
        return rows, list(rows.info.splits or ())

    return load


def _saved_splits(name: str, folder: Path, config_name: str | None) -> _LoadSplit:
    import datasets

    if config_name is not None:
        raise DataError(
            f"dataset_config_name is {config_name!r}, but dataset_name {name!r} is what"
            " save_to_disk wrote, which has no configurations. Leave dataset_config_name null."
        )
    loaded = datasets.load_from_disk(str(folder))
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}

    def load(split: str) -> tuple[datasets.Dataset, list[str]]:
        sizes = {name: len(rows) for name, rows in splits.items()}
        instructions = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in instructions]
        return datasets.concatenate_datasets(parts) if parts[1:] else parts[0], list(splits)

    return load
