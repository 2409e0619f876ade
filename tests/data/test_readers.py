"""Proves that each format gives its texts exactly, and that each fault is named where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_training.data.errors import DataError
from llm_training.data.readers import UnreadableFile, check_text, kind_of, read_texts


def texts_of(path: Path, column: str = "text") -> list[str]:
    return [text for _, text in read_texts(path, kind_of(path) or "text", column)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    text = "\ufeffline\r\nzweite Zeile: ä\u2028\ttab \x0c\n"
    assert texts_of(write(tmp_path / "a.txt", text)) == [text]


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "n": 1}) for text in ("a\nb", "", "c\u2028d")]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines) + "\n\n")
    assert texts_of(path) == ["a\nb", "", "c\u2028d"]


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ["line 2", "not an object"]),
        ("a.jsonl", '{"body": "a", "n": 1}\n', ["line 1", "'text'", "'body', 'n'", "text_column"]),
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\0c", "byte 2 is NUL"),
        (b"caf\xe9 au lait", "byte 3 "),
        ("é".encode()[:1], "byte 0 "),
        (b"12345678\xc3\xa9123\xff", "byte 13 "),
        # The chunks end inside the character.
        (b"1234567\xe2\x82\xac\xff", "byte 10 "),
        (b"1234567\xe2\x82x", "byte 7 "),
        (b"12345678901\0", "byte 11 is NUL"),
    ],
)
def test_the_first_bad_byte_is_found_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.setattr("llm_training.data.readers._CHECK_BYTES", 8)
    with pytest.raises(UnreadableFile, match=words):
        check_text(write(tmp_path / "a.txt", content))


def test_a_table_that_is_not_utf8_yields_nothing_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(UnreadableFile, match="byte 27"):
        next(read_texts(path, "json", "text"))
