"""Proves what holds between sources: one tokenizer for all, one account, one look for leakage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
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


# ------------------------------------------------------------------------------- validation sets


def with_sets(folder: Path, *words: str) -> dict[str, Any]:
    """Settings that name a set of one text for each word."""
    sets = {}
    for word in words:
        file = folder / f"{word}.txt"
        file.write_text(f"{word} is what it is about, again and again: {word}. " * 5)
        sets[word] = {"validation_file": [str(file)]}
    return {"validation_sets": sets}


def text_of(data: PreparedData) -> str:
    assert data.validation is not None and data.tokenizer is not None
    return str(data.tokenizer.decode(data.validation.tokens.tolist(), skip_special_tokens=True))


def test_a_set_is_in_the_runs_tokens_and_changes_nothing_else(folder: Path) -> None:
    plain = prepare(folder)
    said: list[str] = []
    sets = with_sets(folder, "math", "law")
    data = prepare(folder, said, **sets)
    assert data.fingerprint == plain.fingerprint
    assert data.stores("validation").keys() == plain.stores("validation").keys()
    assert list(data.validation_sets) == ["math", "law"]
    for name, part in data.validation_sets.items():
        assert part.train is None and part.tokenizer is data.tokenizer
        assert text_of(part) == (folder / f"{name}.txt").read_text()
    assert len({part.fingerprint for part in data.validation_sets.values()}) == 2
    assert any(line.startswith("math: validation: 1 documents") for line in data.lines())
    assert any(line.startswith("law: Tokens: written to") for line in said)
    said.clear()
    prepare(folder, said, **sets)
    assert any(line.startswith("law: Tokens: unchanged") for line in said)


def test_what_a_set_shares_with_training_is_looked_for_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = with_sets(folder, "math", "law")
    shared = (folder / "math.txt").read_text()
    for file in sorted((folder / "prose").iterdir()):
        file.write_text(shared)
    found = prepare(folder, tokenizer_name="byte", **sets).validation_sets
    assert found["math"].leakage is not None and found["math"].leakage.same_documents == 1
    assert found["law"].leakage is not None and found["law"].leakage.same_documents == 0
    monkeypatch.setattr(all_sources, "find_leakage", lambda *_: pytest.fail("looked again"))
    again = prepare(folder, tokenizer_name="byte", **sets).validation_sets
    assert again["math"].leakage == found["math"].leakage


def test_a_set_has_columns_of_its_own_and_takes_the_others_from_the_run(folder: Path) -> None:
    sets = with_sets(folder)
    for name, column in (("own", "body"), ("as_the_run", "content")):
        file = folder / f"{name}.jsonl"
        file.write_text(json.dumps({"body": "b " * 20, "content": "c " * 20}))
        sets["validation_sets"][name] = {"validation_file": [str(file)]}
        if column == "body":
            sets["validation_sets"][name]["text_column"] = column
    data = prepare(folder, tokenizer_name="byte", text_column="content", **sets)
    texts = {name: text_of(part) for name, part in data.validation_sets.items()}
    assert texts == {"own": "b " * 20, "as_the_run": "c " * 20}


def test_a_set_may_be_another_split_of_a_dataset(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i} " * 9 for i in range(4)]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    sets = {"validation_sets": {"held_out": {"dataset_validation_split": "test"}}}
    data = prepare(
        folder, tokenizer_name="byte", train_mixture={}, dataset_name=str(folder / "saved"), **sets
    )
    assert text_of(data.validation_sets["held_out"]) == "".join(f"test {i} " * 9 for i in range(4))
    assert data.validation is not None and "test" not in text_of(data)


def test_a_set_may_be_a_token_file_of_the_same_tokenizer(folder: Path) -> None:
    def files_of(kind: str) -> Path:
        own = with_sets(folder, "math")["validation_sets"]["math"]
        made = prepare(
            folder, train_mixture={}, train_file=own["validation_file"], tokenizer_name=kind
        )
        return made.train.path  # type: ignore[union-attr]

    def prepare_with(path: Path) -> PreparedData:
        sets = {"math": {"validation_file": [str(path)]}}
        return prepare(folder, tokenizer_name="byte", validation_sets=sets)

    path = files_of("byte")
    part = prepare_with(path).validation_sets["math"]
    assert part.validation is not None and part.validation.path == path
    with pytest.raises(DataError, match=r"validation_sets, math: its token file .* was made with"):
        prepare_with(files_of("bpe"))


def test_a_token_file_that_says_nothing_is_taken_for_the_runs_tokens(folder: Path) -> None:
    def prepare_with(*ids: int) -> PreparedData:
        path = folder / "plain.bin"
        np.array(ids, "<u2").tofile(path)
        sets = {"plain": {"validation_file": [str(path)]}}
        return prepare(folder, tokenizer_name="byte", validation_sets=sets)

    assert prepare_with(*b"plain", 256).validation_sets["plain"].num_tokens("validation") == 6
    with pytest.raises(DataError, match=r"validation_sets, plain: .* has only 257 tokens"):
        prepare_with(*b"plain", 300)


def test_a_fault_of_a_set_names_it(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    sets = {"void": {"validation_file": [str(folder / "empty.txt")]}}
    with pytest.raises(DataError, match=r"^validation_sets, void: .*empty"):
        prepare(folder, tokenizer_name="byte", validation_sets=sets)


def test_there_may_be_nothing_but_sets_and_sets_beside_a_stream(folder: Path) -> None:
    plain = {"tokenizer_name": "byte", "cache_dir": str(folder / "cache")}
    stream = {"dataset_name": "some/where", "streaming": True}
    for changes in ({}, stream):
        settings: dict[str, Any] = plain | changes | with_sets(folder, "math")
        data = prepare_data(Arguments(**settings), say=lambda _: None)
        assert (data.stores("train"), data.stores("validation")) == ({}, {})
        assert text_of(data.validation_sets["math"]) == (folder / "math.txt").read_text()
