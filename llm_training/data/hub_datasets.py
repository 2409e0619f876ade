"""Documents from the `datasets` library: the Hugging Face hub, or a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.data.errors import DataError, one_line
from llm_training.data.ledger import Ledger
from llm_training.data.readers import require_column, require_text
from llm_training.data.sources import EMPTY_DOCUMENT, Document, utf8_length

if TYPE_CHECKING:
    import datasets

_BATCH_ROWS = 256


@dataclass(frozen=True)
class HubDataset:
    """The documents of one split, in its order.

    Attributes:
        name: dataset and split, for messages.
    """

    dataset: datasets.Dataset
    name: str
    text_column: str

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents, row by row; raises DataError for a row without text."""
        require_column(self.dataset.column_names, self.name, self.text_column)
        texts = self.dataset.select_columns([self.text_column])
        number = 0
        for batch in texts.iter(batch_size=_BATCH_ROWS):
            for value in batch[self.text_column]:
                number += 1
                where = f"{self.name}, row {number:,}"
                if text := require_text(value, where, self.text_column):
                    yield Document(text, utf8_length(text, where), file=None)
                else:
                    ledger.leave_out(EMPTY_DOCUMENT, where)

    def key(self) -> Any:
        # The library's own mark of the content and of what was done to it.
        fingerprint = self.dataset._fingerprint
        return {"dataset": self.name, "rows": fingerprint, "text_column": self.text_column}

    def num_bytes(self) -> int:
        return self.dataset.data.nbytes


def load_hub_dataset(
    name: str, config_name: str | None, text_column: str
) -> tuple[HubDataset, HubDataset | None]:
    """The `train` split and, where there is one, the `validation` split.

    Args:
        name: a hub id, a local folder of data files, or a folder that `save_to_disk` wrote.

    Raises:
        DataError: it cannot be loaded, or has no split `train`.
    """
    splits = _load_splits(name, config_name)
    if "train" not in splits:
        raise DataError(
            f"dataset_name {name!r} has no split 'train'; it has {', '.join(map(repr, splits))}."
            " Choose another dataset or dataset_config_name, or give files with train_file."
        )
    found = {
        split: HubDataset(splits[split], f"{name} [{split}]", text_column)
        for split in ("train", "validation")
        if split in splits
    }
    return found["train"], found.get("validation")


def _load_splits(name: str, config_name: str | None) -> dict[str, datasets.Dataset]:
    import datasets

    folder = Path(name).expanduser()
    was_saved_to_disk = any(
        (folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")
    )
    try:
        if was_saved_to_disk:
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name, config_name)
    # The library raises whatever its parts raise.
    except Exception as error:
        raise DataError(
            f"dataset_name {name!r} cannot be loaded: {one_line(error)} Check the name and"
            " dataset_config_name; a hub id needs a reachable hub (or its copy in the local cache),"
            " a local folder must hold data files or be what save_to_disk wrote."
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}
