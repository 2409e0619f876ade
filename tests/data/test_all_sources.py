"""Proves what holds between sources: one tokenizer for all, one account, one look for leakage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments
from llm_training.data import DataError, PreparedData, all_sources, prepare_data
from llm_training.data.tokens.tokenizers import tokenizer_fingerprint, train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, word in (("code", "return"), ("prose", "however")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i:02}.txt").write_text(f"{word} {i} " * (i + 3))
    return tmp_path


def prepare(
    folder: Path, said: list[str] | None = None, source: str | None = None, **changes: Any
) -> PreparedData:
    mixture = {
        name: {"train_file": [str(folder / name)], "weight": weight}
        for name, weight in (("code", 3.0), ("prose", 1.0))
    }
    settings: dict[str, Any] = {
        "train_mixture": mixture,
        "tokenizer_name": "bpe",
        "vocab_size": 280,
        "cache_dir": str(folder / "cache"),
    }
    lines = [] if said is None else said
    return prepare_data(Arguments(**settings | changes), tokenizer_source=source, say=lines.append)


def test_every_source_has_its_store_and_all_have_one_tokenizer(folder: Path) -> None:
    said: list[str] = []
    data = prepare(folder, said)
    assert list(data.stores("train")) == list(data.stores("validation")) == ["code", "prose"]
    assert [part.weight for part in data.parts.values()] == [3.0, 1.0]
    assert data.tokenizer is not None
    for word in ("return", "however"):
        assert len(data.tokenizer.encode(f" {word}")) == 1  # made from both
    marks = {tokenizer_fingerprint(part.tokenizer) for part in data.parts.values()}  # type: ignore[arg-type]
    assert marks == {tokenizer_fingerprint(data.tokenizer)}
    assert sum(line.startswith("Making the bpe tokenizer: done") for line in said) == 1
    assert any(line.startswith("prose: Tokens: written to") for line in said)
    assert any(line.startswith("code: train: 38 documents") for line in data.lines())


def test_it_is_built_once_and_a_new_source_leaves_the_others_as_they_are(folder: Path) -> None:
    tokenizer = train_tokenizer("byte", (), 0)
    tokenizer.save_pretrained(folder / "tokenizer")
    name = {"tokenizer_name": str(folder / "tokenizer")}
    first = prepare(folder, **name)
    said: list[str] = []
    mixture = {"code": {"train_file": [str(folder / "code")], "weight": 1.0}}
    mixture["third"] = {"train_file": [str(folder / "prose" / "1*.txt")], "weight": 1.0}
    second = prepare(folder, said, train_mixture=mixture, **name)
    assert any(line.startswith("code: Tokens: unchanged") for line in said)
    assert any(line.startswith("third: Tokens: written") for line in said)
    assert first.fingerprint != second.fingerprint
    assert first.parts["code"].fingerprint == second.parts["code"].fingerprint


def test_leakage_is_looked_for_over_all_sources_and_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = "one and the same sentence that is told in both of them, word for word. " * 3
    (folder / "code" / "00.txt").write_text(shared)
    for file in sorted((folder / "prose").iterdir()):
        file.write_text(shared + file.name)
    data = prepare(folder, tokenizer_name="byte")
    assert data.leakage is not None
    assert data.leakage.overlapping_documents >= 2
    assert any(line.startswith("Leakage: of 4 validation documents") for line in data.lines())
    monkeypatch.setattr(all_sources, "find_leakage", lambda *_: pytest.fail("looked again"))
    assert prepare(folder, tokenizer_name="byte").leakage == data.leakage
    assert prepare(folder, tokenizer_name="byte", leakage_report=False).leakage is None


def test_token_files_have_the_tokenizer_that_made_them(folder: Path) -> None:
    made = prepare(folder, tokenizer_name="byte")
    path = made.parts["code"].train.path  # type: ignore[union-attr]
    mixture = {
        "ids": {"train_file": [str(path)], "weight": 1.0},
        "prose": {"train_file": [str(folder / "prose")], "weight": 1.0},
    }
    with pytest.raises(DataError, match=r"source 'ids' is a token file, and .* made from text"):
        prepare(folder, train_mixture=mixture)
    data = prepare(folder, train_mixture=mixture, tokenizer_name=str(path.parent / "tokenizer"))
    assert set(data.stores("train")) == {"ids", "prose"}
    other = train_tokenizer("bpe", ["however " * 50], 270)
    other.save_pretrained(folder / "other")
    with pytest.raises(DataError, match="the sources ids, prose have different tokenizers"):
        prepare(folder, source=str(folder / "other"), train_mixture=mixture, tokenizer_name=None)


def test_a_stream_has_a_tokenizer_and_validation_beside_it(folder: Path) -> None:
    settings: dict[str, Any] = {
        "dataset_name": "some/where",
        "streaming": True,
        "tokenizer_name": "byte",
        "cache_dir": str(folder / "cache"),
    }
    data = prepare_data(Arguments(**settings), say=print)
    assert (data.stores("train"), data.stores("validation")) == ({}, {})
    assert data.tokenizer is not None and data.vocab_size == len(data.tokenizer)
    settings["validation_file"] = [str(folder / "prose")]
    data = prepare_data(Arguments(**settings), say=print)
    assert list(data.stores("validation")) == [""] and not data.stores("train")


def test_the_report_on_leakage_is_plain_json(folder: Path) -> None:
    data = prepare(folder, tokenizer_name="byte")
    (file,) = (folder / "cache").glob("leakage-*.json")
    assert json.loads(file.read_text())["documents"] == 4
    assert data.leakage is not None and data.leakage.documents == 4
