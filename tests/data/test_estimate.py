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
