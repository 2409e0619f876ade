"""Proves that each format gives its texts exactly, and that each fault is named where it is."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_training.data.documents.formats import PlainText
from llm_training.data.documents.readers import FileKind, kind_of, read_rows
from llm_training.data.documents.sources import documents_of_rows
from llm_training.data.documents.table_rows import BadRow
from llm_training.data.documents.text_files import UnreadableFile
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger

KINDS: dict[str, FileKind] = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def rows_of(path: Path, column: str = "text") -> list[object]:
    """The values of a column, and the reasons of bad rows."""
    return [
        row.reason if isinstance(row, BadRow) else row[column]
        for _, row in read_rows(path, KINDS.get(path.suffix, "json"), [column])
    ]


def texts_of(path: Path, column: str = "text", ledger: Ledger | None = None) -> list[str]:
    """The documents; bad ones are errors, unless there is a ledger to count them."""
    rows = read_rows(path, KINDS.get(path.suffix, "json"), [column])
    documents = documents_of_rows(
        rows,
        PlainText(column),
        file=str(path),
        skip_bad_documents=ledger is not None,
        ledger=ledger or Ledger(),
    )
    return [document.text for document in documents]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("A.PY.gz", "text"),
        ("a.jsonl.ZST", "json"),
        ("a.json.xz", "json"),
        ("a.csv.bz2", "csv"),
        ("a.arrow", "arrow"),
        ("a.npy", "bin"),
        ("a.bin.gz", None),
        ("a.gz", None),
        ("photo.png", None),
    ],
)
def test_the_kind_is_the_suffix_before_the_compression(name: str, kind: FileKind | None) -> None:
    assert kind_of(f"folder.txt/{name}") == kind


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "n": 1}) for text in ("a\nb", "", "c\u2028d")]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines) + "\n\n")
    assert rows_of(path) == ["a\nb", "", "c\u2028d"]


def test_json_array(tmp_path: Path) -> None:
    content = json.dumps([{"body": "one"}, {"body": "two"}], indent=1)
    assert texts_of(write(tmp_path / "a.json", "\n" + content), "body") == ["one", "two"]


def test_csv_with_long_and_quoted_fields(tmp_path: Path) -> None:
    long = "word " * 40_000
    path = write(tmp_path / "a.csv", f'\ufeffid,text\r\n1,"a ""b"",\nc"\r\n2,{long}\r\n')
    assert texts_of(path) == ['a "b",\nc', long]


def test_parquet(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"n": range(700), "text": texts}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == texts


@pytest.mark.parametrize("new_writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams(tmp_path: Path, new_writer: Any) -> None:
    texts = [f"text {i}" for i in range(700)]
    table = pa.table({"n": range(700), "text": texts})
    with new_writer(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    rows = list(read_rows(tmp_path / "a.arrow", "arrow", ["text"]))
    assert [row["text"] for _, row in rows if not isinstance(row, BadRow)] == texts
    assert rows[-1][0] == f"{tmp_path / 'a.arrow'}, row 700"
    with pytest.raises(DataError, match="no 'body'; it has 'n', 'text'"):
        texts_of(tmp_path / "a.arrow", "body")
    write(tmp_path / "a.arrow", (tmp_path / "a.arrow").read_bytes()[:-2000])
    with pytest.raises(DataError, match="cannot be read as Arrow after row"):
        texts_of(tmp_path / "a.arrow")


def test_what_the_datasets_library_writes_is_an_arrow_stream(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "rows")
    [path] = (tmp_path / "rows").glob("*.arrow")
    assert texts_of(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst"])
def test_packed_column_files_are_refused(tmp_path: Path, name: str) -> None:
    kind = kind_of(name)
    assert kind is not None
    with pytest.raises(DataError, match=r"compressed inside.*Unpack it"):
        next(read_rows(write(tmp_path / name, b"x"), kind, ["text"]))


def test_bad_rows_are_given_each_by_itself_and_the_good_ones_too(tmp_path: Path) -> None:
    deep = "[" * 100_000
    lines = ['{"text": "a"}', '{"text": ', '["b"]', '{"body": 1}', deep, '{"text": "c"}']
    assert rows_of(write(tmp_path / "a.jsonl", "\n".join(lines))) == [
        "a",
        "lines that are not valid JSON",
        "rows that are no table rows",
        "rows without the columns asked for",
        "lines that are not valid JSON",
        "c",
    ]
    path = write(tmp_path / "a.csv", "id,text\n1,a\n2,b,too many\n3,c\n")
    assert rows_of(path) == ["a", "rows that are no table rows", "c"]


def test_one_value_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    binary = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == ["a", "rows without a usable text", "c"]
    with pytest.raises(DataError, match="row 2: not UTF-8 text"):
        texts_of(tmp_path / "a.parquet")


def test_skipped_documents_are_counted_under_their_reason(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": 17}', '{"text": null}', '{"text": "\\ud800"}', "{", "{}"]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": ""}', '{"text": "b"}']))
    ledger = Ledger()
    assert texts_of(path, ledger=ledger) == ["a", "b"]
    assert {reason: entry.names for reason, entry in ledger.left_out.items()} == {
        "rows without a usable text": [f"{path}, line 2", f"{path}, line 3"],
        "texts with half of a surrogate pair": [f"{path}, line 4"],
        "lines that are not valid JSON": [f"{path}, line 5"],
        "rows without the columns asked for": [f"{path}, line 6"],
        "empty documents": [f"{path}, line 7"],
    }


def test_a_column_that_a_whole_file_lacks_is_no_skipped_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,body\n1,x\n")
    with pytest.raises(DataError, match="no 'text'"):
        texts_of(path, ledger=Ledger())


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,id,text\na,1,b\n")
    with pytest.raises(DataError, match="several columns called 'text'"):
        texts_of(path)


@pytest.mark.parametrize("size", [1, 2, 7, 40, 10_000])
def test_an_array_is_read_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("llm_training.data.documents.json_rows._READ_CHARACTERS", size)
    rows = [
        {"text": text, "n": n} for n in (-1.5e-7, 12345, None) for text in ('ä\n"', "", "x" * 99)
    ]
    rows.append({"text": "\U0001f600 as an escape", "n": [True, {}, float("-inf")]})
    for content in (json.dumps(rows), json.dumps(rows, indent=2) + "\n \n"):
        path = write(tmp_path / "a.json", "\ufeff \n" + content)
        found = [row for _, row in read_rows(path, "json", ["text", "n"])]
        assert found == rows
    path = write(tmp_path / "a.json", '[{"text": "a"}, 12345, {"text": "b"}]')
    assert rows_of(path) == ["a", "rows that are no table rows", "b"]


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"},\n {"text": }]', "line 2, column 11: not valid JSON .Expecting value"),
        ('[{"text": "a"}\n\n {"text": "b"}]', "line 3, column 2: .*expecting ',' or ']'"),
        ('[{"text": "a"},\n', "line 2, column 1: .*Expecting value"),
        ('[{"text": "a"},\n{"text": "b', "line 2, column 10: .*Unterminated string"),
        ('[{"text": "a"}]\n]', "line 2, column 1: .*something follows"),
        ("\n [", "line 2, column 3: "),
    ],
)
def test_a_fault_in_an_array_is_named_by_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str, size: int
) -> None:
    monkeypatch.setattr("llm_training.data.documents.json_rows._READ_CHARACTERS", size)
    # No row can be told apart after it, so that it is an error even where bad rows are skipped.
    with pytest.raises(DataError, match=words):
        texts_of(write(tmp_path / "a.json", content), ledger=Ledger())


def test_a_long_array_is_not_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(20_000):
            file.write(f'{{"text": "{number:01000}"}},\n')
        file.write('{"text": "end"}]')
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, "json", ["text"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_001
    # The file has 20 MB; the check of its text takes 4 MB of it at a time.
    assert peak < 15e6


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ["line 2", "not an object"]),
        (
            "a.jsonl",
            '{"body": "a", "n": 1}\n',
            ["line 1", "no 'text'", "'body', 'n'", "text_column"],
        ),
        ("a.jsonl", '\n{"text": null}\n', ["line 2", "nothing (null)"]),
        ("a.jsonl", '{"text": 17}\n', ["line 1", "17 (int)"]),
        ("a.json", '[{"text": "a"},\n {"text": }]', ["a.json, line 2", "not valid JSON"]),
        ("a.json", '[{"text": "a"}, {"text": 1}]', ["element 2", "1 (int)"]),
        ("a.csv", "id,body\n1,x\n", ["a.csv", "'text'", "'id', 'body'"]),
        ("a.csv", "id,text\n1,x\n2\n", ["line 3", "nothing (null)"]),
        ("a.csv", 'text\n"abc"d\n', ["line 2", "not valid CSV"]),
        ("a.parquet", "PAR1 no parquet", ["a.parquet", "cannot be read as Parquet"]),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        texts_of(write(tmp_path / name, content))
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_parquet_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(DataError, match="no 'text'; it has 'body'"):
        texts_of(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match="row 2: 'text' holds nothing"):
        texts_of(path)
    write(path, path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut short or damaged"):
        texts_of(path)


@pytest.mark.parametrize("name", ["a.arrow", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_empty_file_is_unreadable(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnreadableFile, match="is empty"):
        texts_of(write(tmp_path / name, ""))


def test_tables_without_rows_are_unreadable(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for path in (
        tmp_path / "a.parquet",
        write(tmp_path / "a.csv", "text\n"),
        write(tmp_path / "a.json", "[]"),
        write(tmp_path / "a.jsonl", "\n \n"),
    ):
        with pytest.raises(UnreadableFile, match="no rows"):
            texts_of(path)


def test_a_table_that_is_not_utf8_yields_nothing_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(UnreadableFile, match="byte 27"):
        next(read_rows(path, "json", ["text"]))
