"""Proves that token files are used where they lie, and checked against what is known of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arguments import DataArguments
from llm_training.data import DataError, PreparedData, prepare_data
from llm_training.data.tokenizers import train_tokenizer


def write_ids(path: Path, ids: list[int]) -> Path:
    np.array(ids, "<u2").tofile(path)
    return path


def prepare(folder: Path, source: str | None = None, **settings: Any) -> PreparedData:
    arguments = DataArguments(cache_dir=str(folder / "cache"), **settings)
    return prepare_data(arguments, tokenizer_source=source, say=lambda _: None)


def test_the_last_tokens_are_validation(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "ids.bin", list(range(100)))
    data = prepare(tmp_path, train_file=[str(path)], validation_split_percentage=10)
    assert data.train is not None
    assert data.validation is not None
    assert data.train.path == data.validation.path == path
    assert data.train.tokens.tolist() == list(range(90))
    assert data.validation.tokens.tolist() == list(range(90, 100))
    assert (data.vocab_size, data.tokenizer) == (100, None)
    assert data.ledger.splits["train"].tokens == 90


def test_the_file_beside_is_validation(tmp_path: Path) -> None:
    train = write_ids(tmp_path / "train.bin", [1, 2, 3])
    write_ids(tmp_path / "val.bin", [4, 500])
    data = prepare(tmp_path, train_file=[str(train)])
    assert data.validation is not None
    assert data.validation.tokens.tolist() == [4, 500]
    assert data.vocab_size == 501
    other = write_ids(tmp_path / "other.bin", [6])
    data = prepare(tmp_path, train_file=[str(train)], validation_file=[str(other)])
    assert data.validation is not None
    assert data.validation.tokens.tolist() == [6]
    data = prepare(tmp_path, train_file=[str(train)], validation_split_percentage=0)
    assert data.validation is None


def test_evaluation_alone_needs_no_training_file(tmp_path: Path) -> None:
    data = prepare(tmp_path, validation_file=[str(write_ids(tmp_path / "a.bin", [1, 2]))])
    assert data.train is None
    assert data.validation is not None


def test_our_own_store_brings_its_type_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    made = prepare(tmp_path, train_file=[str(tmp_path / "a.txt")], tokenizer_name="byte")
    assert made.train is not None
    again = prepare(tmp_path, train_file=[str(made.train.path)])
    assert again.train == made.train
    assert again.validation == made.validation
    assert again.vocab_size == 257
    assert again.tokenizer is not None
    assert again.tokenizer.decode(again.train.tokens[:9]) == "some text"
    # The tokenizer was saved and read again, its content is the same.
    assert again.fingerprint == made.fingerprint


def test_ids_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "tok")
    path = write_ids(tmp_path / "ids.bin", list(range(258)))
    settings: dict[str, Any] = {"train_file": [str(path)], "tokenizer_name": str(tmp_path / "tok")}
    with pytest.raises(
        DataError, match=r"holds token id 257, but the tokenizer .* only 257 tokens"
    ):
        prepare(tmp_path, **settings)
    write_ids(path, [1, 2, 3] * 20)
    assert prepare(tmp_path, **settings).vocab_size == 257


def test_a_model_without_tokenizer_will_do(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = write_ids(tmp_path / "ids.bin", [1] * 40)
    data = prepare(tmp_path, source=str(tmp_path / "model"), train_file=[str(path)])
    assert data.tokenizer is None


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        (["a.bin", "a.txt"], {}, "cannot be mixed"),
        (["a.bin", "b.bin"], {}, "must be the only one"),
        (["a.bin"], {"validation_file": ["a.txt"]}, "validation_file names a.txt"),
        (["a.bin"], {"tokenizer_name": "bpe"}, "makes a tokenizer from text"),
        (["a.bin"], {"validation_split_percentage": 5}, "only 3 tokens, too few"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    settings: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    write_ids(tmp_path / "a.bin", [1, 2, 3])
    write_ids(tmp_path / "b.bin", [1, 2, 3])
    with pytest.raises(DataError, match=words):
        prepare(tmp_path, train_file=files, **settings)


def test_a_foreign_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ids(tmp_path / "ids.bin", list(range(100)))
    first = prepare(tmp_path, train_file=[str(path)])

    def read_again(*_: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr("llm_training.data.bin_files.scan_tokens", read_again)
    assert prepare(tmp_path, train_file=[str(path)]).fingerprint == first.fingerprint
    write_ids(path, list(range(101)))
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path, train_file=[str(path)])
