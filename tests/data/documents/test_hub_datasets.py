"""Proves that local folders of `datasets` are read like files: splits, columns, empty rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm_training.data.documents.formats import PlainText
from llm_training.data.documents.hub_datasets import HubDataset, load_hub_dataset
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger

TEXT = PlainText("text")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data files: ten rows to train on, of which the second is empty, and two to validate on."""
    folder = tmp_path / "data"
    folder.mkdir()
    train = ["row 0", "", *(f"row {i}" for i in range(2, 10))]
    for split, rows in {"train": train, "validation": ["own 0", "own 1"]}.items():
        lines = [json.dumps({"text": row}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(params=["files", "saved"])
def dataset_name(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> str:
    """The same dataset, as data files and as what save_to_disk wrote."""
    if request.param == "files":
        return str(folder)
    datasets.load_dataset(str(folder)).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def texts(dataset: HubDataset | None, ledger: Ledger | None = None) -> list[str]:
    assert dataset is not None
    return [document.text for document in dataset.documents(ledger or Ledger())]


def test_both_splits(dataset_name: str) -> None:
    train, validation = load_hub_dataset(dataset_name, document_format=TEXT)
    ledger = Ledger()
    assert texts(train, ledger) == ["row 0", *(f"row {i}" for i in range(2, 10))]
    assert ledger.left_out["empty documents"].names == [f"{dataset_name} [train], row 2"]
    assert texts(validation) == ["own 0", "own 1"]
    assert load_hub_dataset(dataset_name, document_format=TEXT)[0].key() == train.key()


@pytest.mark.parametrize(
    ("split", "validation_split", "expected", "validation_texts"),
    [
        ("train[:10%]", None, ["row 0"], ["own 0", "own 1"]),
        ("train[-2:]", "train[2:4]", ["row 8", "row 9"], ["row 2", "row 3"]),
        ("train[:1]+validation[1:]", None, ["row 0", "own 1"], None),
        ("validation", None, ["own 0", "own 1"], None),
        ("train[90%:]", "validation[:50%]", ["row 9"], ["own 0"]),
    ],
)
def test_slices_and_sums_of_splits(
    dataset_name: str,
    split: str,
    validation_split: str | None,
    expected: list[str],
    validation_texts: list[str] | None,
) -> None:
    train, validation = load_hub_dataset(
        dataset_name, split=split, validation_split=validation_split, document_format=TEXT
    )
    assert texts(train) == expected
    # The split called validation is no validation for those who train on it.
    assert (validation and texts(validation)) == validation_texts
    assert train.key() != load_hub_dataset(dataset_name, document_format=TEXT)[0].key()


@pytest.mark.parametrize("split", ["test", "test[:10%]", "train+test"])
def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(
    dataset_name: str, split: str
) -> None:
    for changes in ({"split": split}, {"validation_split": split}):
        with pytest.raises(DataError) as caught:
            load_hub_dataset(dataset_name, document_format=TEXT, **changes)
        for words in (f"with split '{split}'", "'train', 'validation'", "dataset_split"):
            assert words in str(caught.value)


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[:0]"])
def test_what_is_no_split_is_an_error(folder: Path, split: str) -> None:
    with pytest.raises(DataError, match="cannot be loaded with split"):
        load_hub_dataset(str(folder), split=split, document_format=TEXT)


def test_one_dataset_saved_to_disk_is_its_training_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(600)]})
    rows.save_to_disk(tmp_path / "one")
    train, validation = load_hub_dataset(str(tmp_path / "one"), document_format=TEXT)
    assert texts(train) == rows["text"][:]
    assert validation is None


def test_faults_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "rows")
    name = str(tmp_path / "rows")
    train, _ = load_hub_dataset(name, document_format=TEXT)
    with pytest.raises(DataError, match=r"\[train\], row 2: 'text' holds nothing"):
        texts(train)
    with pytest.raises(DataError, match="no 'body'; it has 'text', 'n'"):
        texts(load_hub_dataset(name, document_format=PlainText("body"), skip_bad_documents=True)[0])
    with pytest.raises(DataError, match=r"cannot be loaded.*reachable hub"):
        load_hub_dataset(str(tmp_path / "nowhere"), document_format=TEXT)


def test_bad_rows_are_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None, "b"]}).save_to_disk(tmp_path / "rows")
    train, _ = load_hub_dataset(
        str(tmp_path / "rows"), document_format=TEXT, skip_bad_documents=True
    )
    ledger = Ledger()
    assert texts(train, ledger) == ["a", "b"]
    assert ledger.left_out["rows without a usable text"].names == [f"{train.name}, row 2"]


def test_settings_that_a_local_folder_cannot_follow_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"dataset_revision is 'main'.* local folder"):
        load_hub_dataset(str(folder), revision="main", document_format=TEXT)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="dataset_config_name is 'small'"):
        load_hub_dataset(str(tmp_path / "rows"), "small", document_format=TEXT)


def test_name_configuration_and_revision_reach_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(*given: Any, **named: Any) -> datasets.Dataset:
        asked.append((*given, named))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_hub_dataset(
        "owner/name", "small", split="a", validation_split="b", revision="v1", document_format=TEXT
    )
    assert asked == [
        ("owner/name", "small", {"split": split, "revision": "v1"}) for split in ("a", "b")
    ]
