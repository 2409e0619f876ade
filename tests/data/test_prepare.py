"""Proves the way from text to stores: exact tokens and sums, built once, reused, rebuilt when due.

The tokenizer sees no validation text; every document ends with one end-of-text token.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arguments import DataArguments
from llm_training.data import DataError, PreparedData, TokenStore, prepare_data
from llm_training.data.documents.table_rows import NO_TEXT, NOT_JSON
from llm_training.data.tokens.tokenizers import train_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """100 documents in one .jsonl and 20 in text files; three rows are empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = ["" if i in (0, 50, 99) else f"document {i}\nwith größe {i % 7}" for i in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for i in range(20):
        (folder / f"text{i:02}.txt").write_text(f"text {i}\n" * (i + 1))
    (folder / "photo.png").write_bytes(b"\x89PNG")
    return folder


def settings(corpus: Path, **changes: Any) -> DataArguments:
    values: dict[str, Any] = {
        "train_file": [str(corpus)],
        "tokenizer_name": "byte",
        "cache_dir": str(corpus.parent / "cache"),
        "validation_split_percentage": 10.0,
    }
    return DataArguments(**{**values, **changes})


def prepare(corpus: Path, said: list[str] | None = None, **changes: Any) -> PreparedData:
    lines = [] if said is None else said
    return prepare_data(settings(corpus, **changes), say=lines.append)


def documents(store: TokenStore | None, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The texts of a store, split at its end-of-text tokens."""
    assert store is not None
    assert tokenizer is not None
    ends = np.flatnonzero(store.tokens == tokenizer.eos_token_id)
    assert ends[-1] == store.num_tokens - 1
    pieces = np.split(store.tokens, ends + 1)[:-1]
    return [str(tokenizer.decode(piece[:-1])) for piece in pieces]


def expected_documents(corpus: Path) -> list[str]:
    rows: list[str] = [json.loads(line)["text"] for line in (corpus / "rows.jsonl").open()]
    return [row for row in rows if row] + [p.read_text() for p in sorted(corpus.glob("*.txt"))]


def folders_in(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_document_is_in_one_split_in_order_with_one_end(corpus: Path, kind: str) -> None:
    data = prepare(corpus, tokenizer_name=kind, vocab_size=300)
    train = documents(data.train, data.tokenizer)
    validation = documents(data.validation, data.tokenizer)
    expected = expected_documents(corpus)
    assert validation == expected[9::10]
    assert train == [text for i, text in enumerate(expected) if i % 10 != 9]
    assert data.train is not None
    assert data.train.dtype == np.uint16
    assert data.train.tokens.max() < data.vocab_size == data.train.vocab_size


def test_the_ledger_adds_up(corpus: Path) -> None:
    data = prepare(corpus)
    ledger = data.ledger
    splits = ledger.splits
    assert ledger.documents_seen == 100 + 20
    assert splits["train"].documents + splits["validation"].documents == 117
    assert ledger.left_out["empty documents"].count == 3
    assert ledger.ignored_files["files without a known text suffix"].names == ["photo.png"]
    num_bytes = sum(len(text.encode()) for text in expected_documents(corpus))
    assert splits["train"].bytes + splits["validation"].bytes == num_bytes
    # Bytes are this tokenizer's tokens, and each document has an end.
    assert splits["train"].tokens + splits["validation"].tokens == num_bytes + 117
    assert data.train is not None
    assert splits["train"].tokens == data.train.num_tokens == len(data.train.tokens)
    assert splits["train"].files == 1 + 18


def test_what_is_left_out_is_in_the_ledger_with_its_bytes(corpus: Path) -> None:
    rows = ["same text", "x", "same text", "another text"]
    lines = [json.dumps({"text": row}) for row in rows] + ["{broken", json.dumps({"text": None})]
    file = corpus / "rows.jsonl"
    file.write_text("\n".join(lines))
    data = prepare(
        file,
        drop_duplicates=True,
        min_document_characters=3,
        skip_bad_documents=True,
        validation_split_percentage=0,
    )
    ledger = data.ledger
    assert ledger.documents_seen == len(lines)
    assert {reason: entry.count for reason, entry in ledger.left_out.items()} == {
        "duplicates": 1,
        "documents under 3 characters": 1,
        NOT_JSON: 1,
        NO_TEXT: 1,
    }
    assert ledger.left_out["duplicates"].bytes == len("same text")
    assert ledger.bytes_seen == sum(map(len, rows))
    assert documents(data.train, data.tokenizer) == ["same text", "another text"]


def test_a_store_is_the_same_from_one_process_or_many(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"tokenizer_name": "bpe", "vocab_size": 300}
    alone = prepare(corpus, **changes, cache_dir=str(corpus.parent / "alone"))
    monkeypatch.setattr("llm_training.data.prepare._BYTES_A_PROCESS", 1)
    monkeypatch.setattr("llm_training.data.tokens.encoding._BATCH_CHARACTERS", 200)
    together = prepare(corpus, **changes)
    assert together.fingerprint == alone.fingerprint
    assert together.ledger == alone.ledger


def test_a_document_of_many_pieces_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i}\n" for i in range(1_000))
    (tmp_path / "book.txt").write_text(text)
    whole = prepare(tmp_path / "book.txt", cache_dir=str(tmp_path / "whole"))
    monkeypatch.setattr("llm_training.data.documents.text_pieces.PIECE_CHARACTERS", 300)
    parts = prepare(tmp_path / "book.txt", cache_dir=str(tmp_path / "parts"))
    assert parts.fingerprint == whole.fingerprint
    assert parts.ledger == whole.ledger
    assert parts.train is not None and parts.train.ends is not None
    assert parts.train.ends.tolist() == [parts.train.num_tokens]


def test_a_store_can_be_read_by_nanogpt(corpus: Path) -> None:
    data = prepare(corpus, tokenizer_name="char")
    assert data.train is not None and data.tokenizer is not None
    with (data.train.path.parent / "meta.pkl").open("rb") as file:
        meta = pickle.load(file)
    assert meta["vocab_size"] == len(data.tokenizer)
    tokens = np.fromfile(data.train.path, np.uint16)[:50]
    assert "".join(meta["itos"][i] for i in tokens.tolist() if i in meta["itos"]).startswith(
        "document 1\nwith"
    )


def test_few_documents_are_cut_at_their_end(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1_000))
    (tmp_path / "book.txt").write_text(text)
    said: list[str] = []
    data = prepare(tmp_path / "book.txt", said)
    [train] = documents(data.train, data.tokenizer)
    [validation] = documents(data.validation, data.tokenizer)
    assert train + validation == text
    assert validation.startswith("line 9")
    assert len(validation) == pytest.approx(len(text) / 10, abs=10)
    assert (data.ledger.documents_seen, data.ledger.documents_cut) == (1, 1)
    assert any("the last 10% of the characters" in line for line in said)


def test_validation_of_its_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("held out")
    data = prepare(corpus, validation_file=[str(tmp_path / "val.txt")])
    assert documents(data.validation, data.tokenizer) == ["held out"]
    assert documents(data.train, data.tokenizer) == expected_documents(corpus)


def test_no_validation_and_no_training(corpus: Path) -> None:
    data = prepare(corpus, validation_split_percentage=0)
    assert data.validation is None
    assert data.train is not None
    assert data.train.num_documents == 117
    data = prepare(corpus, train_file=[], validation_file=[str(corpus)])
    assert data.train is None
    assert documents(data.validation, data.tokenizer) == expected_documents(corpus)


def test_the_tokenizer_sees_no_validation_text(tmp_path: Path) -> None:
    for i in range(20):
        # The tenth and twentieth file are for validation.
        (tmp_path / f"{i:02}.txt").write_text("secret §" if i % 10 == 9 else "plain text")
    data = prepare(tmp_path, tokenizer_name="char", cache_dir=str(tmp_path / ".cache"))
    assert data.tokenizer is not None
    assert "§" not in data.tokenizer.get_vocab()
    assert documents(data.validation, data.tokenizer)[0] == "<unk>e<unk><unk>et <unk>"


def test_a_special_token_in_the_text_ends_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|endoftext|> after\n" * 9)
    data = prepare(tmp_path / "a.txt", validation_split_percentage=0)
    assert documents(data.train, data.tokenizer) == ["before <|endoftext|> after\n" * 9]


def test_unchanged_data_is_not_read_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, tokenizer_name="bpe", vocab_size=300)
    monkeypatch.setattr("llm_training.data.documents.sources.read_texts", None)
    said: list[str] = []
    (corpus / "other.png").write_bytes(b"")
    second = prepare(corpus, said, tokenizer_name="bpe", vocab_size=300)
    assert len(said) == 1
    assert "unchanged" in said[0]
    assert (second.train, second.validation) == (first.train, first.validation)
    assert (second.fingerprint, second.vocab_size) == (first.fingerprint, first.vocab_size)
    assert second.ledger.splits == first.ledger.splits
    assert second.ledger.left_out == first.ledger.left_out
    # The listing is always today's.
    assert second.ledger.ignored_files["files without a known text suffix"].count == 2


@pytest.mark.parametrize(
    ("change", "new_tokens"),
    [
        ({"validation_split_percentage": 20.0}, True),
        ({"tokenizer_name": "char"}, True),
        ({"exclude_files": ["text0*"]}, True),
        # Not a matter of byte tokenizers.
        ({"vocab_size": 999}, False),
        ({"block_size": 7}, False),
    ],
)
def test_other_settings_get_their_own_folder(
    corpus: Path, change: dict[str, Any], new_tokens: bool
) -> None:
    first = prepare(corpus)
    second = prepare(corpus, **change)
    assert len(folders_in(corpus.parent / "cache")) == 1 + new_tokens
    assert (second.fingerprint != first.fingerprint) == new_tokens


def test_changed_text_gets_its_own_folder(corpus: Path) -> None:
    first = prepare(corpus)
    os.utime(corpus / "text00.txt", ns=(0, 0))
    touched = prepare(corpus)
    assert len(folders_in(corpus.parent / "cache")) == 2
    # Other files on the disk, the same tokens in them.
    assert touched.fingerprint == first.fingerprint
    (corpus / "text00.txt").write_text("other text")
    assert prepare(corpus).fingerprint != first.fingerprint


def test_a_store_made_elsewhere_has_the_same_fingerprint(corpus: Path, tmp_path: Path) -> None:
    first = prepare(corpus)
    copy = tmp_path / "elsewhere" / "corpus"
    shutil.copytree(corpus, copy)
    second = prepare(copy)
    assert second.fingerprint == first.fingerprint
    assert second.train is not None
    assert first.train is not None
    assert second.train.path != first.train.path


def test_a_damaged_store_is_made_again(corpus: Path) -> None:
    first = prepare(corpus)
    assert first.train is not None
    content = first.train.path.read_bytes()
    first.train.path.write_bytes(content[:-2])
    said: list[str] = []
    prepare(corpus, said)
    assert any("is damaged and is made again" in line for line in said)
    assert first.train.path.read_bytes() == content


def test_a_failure_leaves_no_store(corpus: Path) -> None:
    (corpus / "text19.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"text19.txt is not UTF-8"):
        prepare(corpus)
    assert folders_in(corpus.parent / "cache") == []


def test_a_tokenizer_of_ones_own(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer("bpe", expected_documents(corpus), 280).save_pretrained(tmp_path / "tok")
    named = prepare(corpus, tokenizer_name=str(tmp_path / "tok"))
    source = prepare_data(
        settings(corpus, tokenizer_name=None),
        tokenizer_source=str(tmp_path / "tok"),
        say=lambda _: None,
    )
    assert documents(named.train, named.tokenizer) == documents(source.train, source.tokenizer)
    assert named.fingerprint == source.fingerprint
    assert named.train is not None
    saved = AutoTokenizer.from_pretrained(named.train.path.parent / "tokenizer")
    assert len(saved) == named.vocab_size == 280
    with pytest.raises(DataError, match="There is no tokenizer"):
        prepare(corpus, tokenizer_name=None)


def test_a_dataset_in_place_of_files(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": [f"row {i}" for i in range(30)]})
    rows.save_to_disk(tmp_path / "rows")
    changes: dict[str, Any] = {
        "train_file": [],
        "dataset_name": str(tmp_path / "rows"),
        "text_column": "body",
    }
    data = prepare(tmp_path / "none", **changes)
    assert documents(data.validation, data.tokenizer) == ["row 9", "row 19", "row 29"]
    assert data.ledger.splits["train"].files == 0
    both = datasets.DatasetDict({"train": rows, "validation": rows.select([4])})
    both.save_to_disk(tmp_path / "both")
    changes["dataset_name"] = str(tmp_path / "both")
    data = prepare(tmp_path / "none", **changes)
    assert documents(data.validation, data.tokenizer) == ["row 4"]
    assert data.train is not None
    assert data.train.num_documents == 30
    assert prepare(tmp_path / "none", **changes, validation_split_percentage=0).validation is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_file": []}, "There is no data"),
        ({"dataset_name": "x"}, "both given"),
        ({"validation_split_percentage": 100}, "from 0 to below 100"),
        ({"train_file": [], "tokenizer_name": "char"}, "made from training data"),
        ({"tokenizer_name": "bpe", "vocab_size": 10}, "257 or more"),
    ],
)
def test_settings_that_do_not_go_together(
    corpus: Path, changes: dict[str, Any], words: str
) -> None:
    if changes.get("tokenizer_name") == "char":
        changes = {**changes, "validation_file": [str(corpus)]}
    with pytest.raises(DataError, match=words):
        prepare(corpus, **changes)


def test_nothing_left_is_told_with_counts(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (folder / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"No document is left for the train split: .*2 empty doc"):
        prepare(folder, skip_bad_files=True)
    (folder / "b.txt").write_text("x")
    with pytest.raises(DataError, match="for the validation split"):
        prepare(folder)


def test_a_file_in_both_splits_is_told(corpus: Path) -> None:
    said: list[str] = []
    prepare(corpus, said, validation_file=[str(corpus / "text00.txt")])
    assert said[0].startswith("WARNING: 1 files are in both")


def test_too_little_room_is_told_before_the_work(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(corpus)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"needs about .* are free"):
        prepare(corpus)


def prepare_and_report(arguments: dict[str, Any], report: Any) -> None:
    said: list[str] = []
    data = prepare_data(DataArguments(**arguments), say=said.append)
    report.put((data.fingerprint, any("written to" in line for line in said)))


def test_processes_that_start_together_build_once(corpus: Path) -> None:
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    arguments = dataclasses.asdict(settings(corpus))
    processes = [
        context.Process(target=prepare_and_report, args=(arguments, report)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [report.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for _, built in results) == [False, True]
    assert len({fingerprint for fingerprint, _ in results}) == 1
