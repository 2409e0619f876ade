"""Proves that small texts are made into tokens, and that large ones are only estimated, well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments
from llm_training.data import estimate, prepare_data
from llm_training.data.estimate import prepare_or_estimate


def settings(text: Path, cache: Path, **changes: Any) -> Arguments:
    values: dict[str, Any] = {"train_file": [str(text)], "tokenizer_name": "bpe", "vocab_size": 512}
    values |= {"cache_dir": str(cache), "validation_split_percentage": 5.0}
    return Arguments(**(values | changes))


@pytest.fixture
def all_texts_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MOST_BYTES", 1000)
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 100_000)


def test_a_small_text_is_made_ready_for_the_run(text_folder: Path, tmp_path: Path) -> None:
    arguments = settings(text_folder, tmp_path / "cache")
    outlook = prepare_or_estimate(arguments)
    assert (outlook.estimated, outlook.num_bytes) == ([], 0)
    said: list[str] = []
    assert prepare_data(arguments, say=said.append).fingerprint == outlook.data.fingerprint
    assert said[0].startswith("Tokens: unchanged")


@pytest.mark.usefixtures("all_texts_are_large")
def test_a_large_text_is_estimated(text_folder: Path, tmp_path: Path) -> None:
    arguments = settings(text_folder, tmp_path / "cache")
    outlook = prepare_or_estimate(arguments)
    assert outlook.estimated == [""]
    assert not (tmp_path / "cache").exists()
    true = prepare_data(arguments)
    for split in ("train", "validation"):
        guessed = outlook.data.num_tokens(split)
        assert guessed == pytest.approx(true.num_tokens(split), rel=0.3)
    assert outlook.num_bytes == 2 * sum(map(outlook.data.num_tokens, ("train", "validation")))
    assert outlook.data.vocab_size == 512
    again = prepare_or_estimate(arguments)  # its store is there by now
    assert (again.estimated, again.data.fingerprint) == ([], true.fingerprint)


@pytest.mark.usefixtures("all_texts_are_large")
def test_of_a_mixture_each_source_is_estimated(text_folder: Path, tmp_path: Path) -> None:
    source = {"train_file": [str(text_folder)], "weight": 1.0}
    arguments = settings(
        text_folder, tmp_path, train_file=[], train_mixture={"a": source, "b": source}
    )
    outlook = prepare_or_estimate(arguments)
    assert outlook.estimated == ["a", "b"]
    assert set(outlook.data.stores("train")) == {"a", "b"}


def with_set(text: Path, folder: Path, **changes: Any) -> Arguments:
    file = folder / "math.txt"
    file.write_text("1 + 1 = 2. " * 500)
    return settings(
        text,
        folder / "cache",
        validation_sets={"math": {"validation_file": [str(file)]}},
        **changes,
    )


def test_a_validation_set_is_made_ready_where_it_is_small(
    text_folder: Path, tmp_path: Path
) -> None:
    arguments = with_set(text_folder, tmp_path)
    outlook = prepare_or_estimate(arguments)
    assert (outlook.estimated, outlook.num_bytes) == ([], 0)
    (made,) = outlook.data.validation_sets.values()
    (again,) = prepare_data(arguments).validation_sets.values()
    assert made.fingerprint == again.fingerprint


def test_a_validation_set_is_estimated_where_it_is_large(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = with_set(text_folder, tmp_path, tokenizer_name="byte")
    prepare_or_estimate(settings(text_folder, tmp_path / "cache", tokenizer_name="byte"))
    monkeypatch.setattr(estimate, "MOST_BYTES", 1000)
    outlook = prepare_or_estimate(arguments)  # the store of what is trained on is there
    assert outlook.estimated == ["math"]
    made = outlook.data.validation_sets["math"]
    assert made.num_tokens("validation") == 11 * 500 + 1
    assert outlook.num_bytes == 2 * made.num_tokens("validation")


@pytest.mark.usefixtures("all_texts_are_large")
def test_a_validation_set_is_estimated_beside_what_is_estimated(
    text_folder: Path, tmp_path: Path
) -> None:
    outlook = prepare_or_estimate(with_set(text_folder, tmp_path))
    assert outlook.estimated == ["", "math"]
    assert 500 < outlook.data.validation_sets["math"].num_tokens("validation") < 5501
