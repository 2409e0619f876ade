"""Proves which files an entry names, what is left out and counted, and which faults stop."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_training.data.documents.formats import PlainText, Rendered
from llm_training.data.documents.sources import SourceFile, TextFiles, find_files
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger

TEXT = PlainText("text")


@dataclass(frozen=True)
class Exchange:
    """A conversation of a question and an answer, in place of the real format."""

    columns = ("question", "answer")
    gives_conversations = True

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        question, answer = (row[column] for column in self.columns)
        if not answer:
            raise DataError(f"{where}: there is no answer. Give one.")
        return Rendered(question + answer, ((len(question), len(question + answer)),))

    def key(self) -> Any:
        return "exchange"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a bit of everything."""
    for name in (
        "b.txt",
        "a.py",
        "sub/c.md",
        "sub/deep/d.txt",
        "sub/photo.png",
        "sub/__pycache__/x.py",
        ".git/e.txt",
        ".hidden.txt",
        "tokens.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    return tmp_path


def find(
    *entries: str | Path, exclude: Sequence[str] = (), ledger: Ledger | None = None
) -> list[SourceFile]:
    given = [str(entry) for entry in entries]
    return find_files(given, exclude, ledger or Ledger(), argument="train_file")


def names(files: list[SourceFile]) -> list[str]:
    return [file.name for file in files]


def read(files: list[SourceFile], ledger: Ledger, *, skip: bool = False) -> list[str]:
    source = TextFiles(files, TEXT, skip_bad_files=skip)
    return [document.text for document in source.documents(ledger)]


def test_a_folder_is_taken_whole_in_order_and_the_rest_is_counted(folder: Path) -> None:
    ledger = Ledger()
    assert names(find(folder, ledger=ledger)) == ["a.py", "b.txt", "sub/c.md", "sub/deep/d.txt"]
    assert {reason: entry.count for reason, entry in ledger.ignored_files.items()} == {
        "files without a known text suffix": 1,
        "files in __pycache__, or hidden": 3,
        "token files (.bin, .npy), which must be named themselves": 1,
    }


def test_globs(folder: Path) -> None:
    assert names(find(folder / "*.txt")) == ["b.txt"]
    assert names(find(folder / "**" / "*.txt")) == ["b.txt", "sub/deep/d.txt"]
    # A folder that a glob matches is taken whole, as the shell would hand it on.
    assert names(find(folder / "su*")) == ["sub/c.md", "sub/deep/d.txt"]


def test_home_and_relative_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert names(find("~/b.txt")) == ["b.txt"]
    monkeypatch.chdir(folder)
    assert names(find("b.txt", "sub")) == ["b.txt", "c.md", "deep/d.txt"]
    assert names(find(".", exclude=["*/sub/*"])) == ["a.py", "b.txt"]


def test_a_file_counts_once(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder / "b.txt")
    entries = (folder / "sub/c.md", folder, folder / "**/*.txt", folder / "link.txt")
    assert names(find(*entries)) == ["c.md", "a.py", "b.txt", "sub/deep/d.txt"]


def test_a_link_to_a_folder_above_ends(folder: Path) -> None:
    (folder / "sub" / "round").symlink_to(folder, target_is_directory=True)
    assert len(find(folder)) == 4


def test_exclude_matches_paths_and_names_but_no_named_file(folder: Path) -> None:
    ledger = Ledger()
    found = find(folder, exclude=["*/deep/*", "a.*"], ledger=ledger)
    assert names(found) == ["b.txt", "sub/c.md"]
    assert ledger.ignored_files["files that exclude_files matches"].count == 2
    assert names(find(folder / "a.py", exclude=["a.*"])) == ["a.py"]


def test_a_named_file_is_read_whatever_its_name(folder: Path) -> None:
    [file] = find(folder / "sub" / "photo.png")
    assert (file.kind, file.is_named) == ("text", True)
    (folder / "what[1].txt").write_text("x")
    assert names(find(folder / "what[1].txt")) == ["what[1].txt"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nowhere.txt", "train_file: .*nowhere.txt' does not exist"),
        ("*.nothing", "matches nothing"),
        ("sub/*.png", "no file to read in .* 1 files without a known text suffix"),
    ],
)
def test_an_entry_that_names_nothing_is_an_error(folder: Path, entry: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        find(folder / entry)


def test_documents_and_their_size(folder: Path) -> None:
    (folder / "b.txt").write_text("größe\n")
    [document] = TextFiles(find(folder / "b.txt"), TEXT).documents(Ledger())
    assert (document.text, document.num_bytes) == ("größe\n", 8)
    assert document.file == str(folder / "b.txt")


def test_bad_files_are_skipped_only_when_asked_and_not_named(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"")
    (folder / "sub/c.md").write_bytes(b"caf\xe9")
    ledger = Ledger()
    assert read(find(folder), ledger, skip=True) == ["text of a.py\n", "text of sub/deep/d.txt\n"]
    assert ledger.left_out["empty files"].names == ["b.txt"]
    assert ledger.left_out["files that are not UTF-8 text"].names == ["sub/c.md"]
    with pytest.raises(DataError, match=r"b.txt is empty \(0 bytes\). Set skip_bad_files"):
        read(find(folder), Ledger())
    with pytest.raises(DataError, match=r"c.md is not UTF-8 text: byte 3 \(0xe9\)"):
        read(find(folder / "sub/c.md"), Ledger(), skip=True)


def test_empty_documents_are_counted(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    ledger = Ledger()
    assert read(find(path), ledger) == ["a", "b"]
    assert ledger.left_out["empty documents"].names == [f"{path}, line 2"]


def test_half_a_surrogate_pair_is_no_text(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text('{"text": "ab\\ud800"}\n')
    with pytest.raises(DataError, match="line 1: character 2 is half of a surrogate pair"):
        read(find(path), Ledger())


def test_a_file_that_changes_or_goes_is_noticed(folder: Path) -> None:
    files = find(folder / "b.txt")
    os.utime(folder / "b.txt", ns=(0, 0))
    with pytest.raises(DataError, match="changed while it was being read"):
        read(files, Ledger())
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(files, Ledger())


def test_a_file_that_changes_while_it_is_read_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_training.data.documents.text_pieces.PIECE_CHARACTERS", 10)
    monkeypatch.setattr("llm_training.data.documents.text_pieces._READ_CHARACTERS", 10)
    path = folder / "b.txt"
    path.write_text("some words " * 10_000)
    documents = TextFiles(find(path), TEXT).documents(Ledger())
    next(documents)
    path.write_bytes(b"\xff" * 200_000)
    with pytest.raises(DataError, match="changed while it was being read"):
        list(documents)


def test_documents_are_read_as_they_are_asked_for(folder: Path) -> None:
    documents = TextFiles(find(folder), TEXT).documents(Ledger())
    next(documents)
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        next(documents)


def test_the_key_follows_the_files_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    def key() -> object:
        return TextFiles(find(folder), TEXT).key()

    before = key()
    assert key() == before
    os.utime(folder / "b.txt", ns=(0, 0))
    assert key() != before


def test_the_key_follows_the_settings(folder: Path) -> None:
    files = find(folder)
    sources = (
        TextFiles(files, TEXT),
        TextFiles(files, PlainText("body")),
        TextFiles(files, TEXT, skip_bad_files=True),
        TextFiles(files, TEXT, skip_bad_documents=True),
        TextFiles(files, TEXT, document_separator="line"),
    )
    keys = [source.key() for source in sources]
    assert all(keys.count(key) == 1 for key in keys)


def test_a_separator_parts_text_files_and_empty_lines_are_counted(folder: Path) -> None:
    path = folder / "b.txt"
    path.write_text("one\n\nzwö\n")
    ledger = Ledger()
    documents = list(TextFiles(find(path), TEXT, document_separator="line").documents(ledger))
    assert [(d.text, d.num_bytes, d.where) for d in documents] == [
        ("one", 3, f"{path}, line 1"),
        ("zwö", 4, f"{path}, line 3"),
    ]
    assert ledger.left_out["empty documents"].names == [f"{path}, line 2"]
    path.write_text("\n \n")
    source = TextFiles(find(folder), TEXT, skip_bad_files=True, document_separator="blank_line")
    assert len(list(source.documents(ledger))) == 3
    assert ledger.left_out["empty files"].names == ["b.txt"]


def test_a_long_text_is_given_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.documents.text_pieces.PIECE_CHARACTERS", 10)
    text = "größe\nund noch mehr\n"
    (folder / "b.txt").write_text(text)
    documents = list(TextFiles(find(folder / "b.txt"), TEXT).documents(Ledger()))
    assert "".join(document.text for document in documents) == text
    assert [document.is_last for document in documents] == [False, False, False, True]
    assert {document.num_characters for document in documents} == {20}
    assert sum(document.num_bytes for document in documents) == 22


def test_packed_files_are_found_and_read(folder: Path) -> None:
    (folder / "p.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (folder / "p.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed row"}\n'))
    (folder / "p.bin.gz").write_bytes(b"")
    files = find(folder / "p.*")
    assert names(files) == ["p.jsonl.gz", "p.txt.gz"]
    assert read(files, Ledger()) == ["packed row", "packed text"]
    # The text is larger than the files.
    assert TextFiles(files, TEXT).num_bytes() > sum(file.num_bytes for file in files)
    # A named file is unpacked whatever its name.
    (folder / "notes.gz").write_bytes(gzip.compress(b"notes"))
    assert read(find(folder / "notes.gz"), Ledger()) == ["notes"]
    (folder / "p.txt.gz").write_bytes(gzip.compress(b"packed text")[:-3])
    with pytest.raises(DataError, match=r"p.txt.gz cannot be unpacked"):
        read(find(folder / "p.*"), Ledger(), skip=True)


def test_a_folder_of_the_datasets_library_is_read_as_files(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(folder / "saved")
    ledger = Ledger()
    assert read(find(folder / "saved", ledger=ledger), Ledger()) == ["a", "b"]
    [entry] = ledger.ignored_files.values()
    assert entry.names == ["dataset_info.json", "state.json"]
    # Elsewhere, the names mean nothing.
    (folder / "sub" / "state.json").write_text('{"text": "of a state"}')
    assert read(find(folder / "sub" / "*.json"), Ledger()) == ["of a state"]


def test_conversations_are_read_from_tables(folder: Path) -> None:
    path = folder / "rows.csv"
    path.write_text("id,answer,question\n1,4,2+2?\n2,,3+3?\n")
    source = TextFiles(find(path), Exchange(), skip_bad_documents=True)
    ledger = Ledger()
    [document] = source.documents(ledger)
    assert (document.text, document.learned) == ("2+2?4", ((4, 5),))
    assert ledger.left_out["rows without a usable text"].names == [f"{path}, line 3"]
    with pytest.raises(DataError, match="line 3: there is no answer"):
        list(TextFiles(find(path), Exchange()).documents(Ledger()))


def test_a_text_file_holds_no_conversations(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a.py is a text file.*\(question, answer\).*\.jsonl"):
        TextFiles(find(folder), Exchange())


def test_bad_rows_stop_or_are_counted(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n{"te\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"line 2: .*skip_bad_documents"):
        read(find(path), Ledger())
    ledger = Ledger()
    documents = list(TextFiles(find(path), TEXT, skip_bad_documents=True).documents(ledger))
    assert [document.text for document in documents] == ["a", "b"]
    assert ledger.documents_seen == 2
    assert sorted(ledger.left_out) == [
        "lines that are not valid JSON",
        "rows without a usable text",
    ]
