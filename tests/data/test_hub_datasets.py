"""Proves that local folders of `datasets` are read like files: splits, columns, empty rows."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from llm_training.data.errors import DataError
from llm_training.data.hub_datasets import HubDataset, load_hub_dataset
from llm_training.data.ledger import Ledger


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(dataset: HubDataset, ledger: Ledger | None = None) -> list[str]:
    return [document.text for document in dataset.documents(ledger or Ledger())]


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in {"train": ["a", "", "b"], "validation": ["c"]}.items():
        lines = [json.dumps({"text": row}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    train, validation = load_hub_dataset(str(folder), None, "text")
    ledger = Ledger()
    assert texts(train, ledger) == ["a", "b"]
    assert ledger.left_out["empty documents"].names == [f"{folder} [train], row 2"]
    assert validation is not None
    assert texts(validation) == ["c"]
    assert load_hub_dataset(str(folder), None, "text")[0].key() == train.key()


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(600)]})
    rows.save_to_disk(tmp_path / "one")
    train, validation = load_hub_dataset(str(tmp_path / "one"), None, "text")
    assert texts(train) == rows["text"][:]
    assert validation is None
    both = datasets.DatasetDict({"train": rows, "validation": rows.select(range(2))})
    both.save_to_disk(tmp_path / "two")
    _, validation = load_hub_dataset(str(tmp_path / "two"), None, "text")
    assert validation is not None
    assert texts(validation) == ["text 0", "text 1"]


def test_faults_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=r"\[train\], row 2: 'text' holds nothing"):
        texts(load_hub_dataset(str(tmp_path / "rows"), None, "text")[0])
    with pytest.raises(DataError, match="no 'body'; it has 'text', 'n'"):
        texts(load_hub_dataset(str(tmp_path / "rows"), None, "body")[0])
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "test")
    with pytest.raises(DataError, match="no split 'train'; it has 'test'"):
        load_hub_dataset(str(tmp_path / "test"), None, "text")
    with pytest.raises(DataError, match=r"cannot be loaded.*reachable hub"):
        load_hub_dataset(str(tmp_path / "nowhere"), None, "text")
