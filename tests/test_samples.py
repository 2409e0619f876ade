"""samples.jsonl has every text once and whole, its table is the same, the console readable."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from llm_training.samples import (
    Sample,
    append_samples,
    as_table,
    read_samples,
    rewind_samples,
    short_line,
    summary_of,
    table_of,
)


def two(step: int) -> list[Sample]:
    return [
        Sample(step, 100 * step, "Größe\n", "greedy", " ist 4 m\u2028\n\x00"),
        Sample(step, 100 * step, "Größe\n", "sampled", " 漢字\r\nx"),
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    append_samples(path, two(10))
    append_samples(path, two(20))
    assert read_samples(path) == two(10) + two(20)
    first = path.read_bytes().splitlines()[0]
    assert "Größe".encode() in first  # as a person can read it
    assert list(json.loads(first)) == ["step", "tokens", "prompt", "kind", "text"]


def test_later_steps_and_torn_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rewind_samples(path, 5)
    assert not path.exists()
    for step in (10, 20, 30):
        append_samples(path, two(step))
    with open(path, "ab") as file:
        file.write(b'{"step": 20, "tok')
    rewind_samples(path, 20)
    assert path.read_bytes().endswith(b"\n")
    assert read_samples(path) == two(10) + two(20)
    append_samples(path, two(30))
    assert read_samples(path) == two(10) + two(20) + two(30)
    rewind_samples(path, -1)
    assert path.read_bytes() == b""
    assert as_table(path)["data"] == []


def test_the_table_is_the_file_and_a_data_frame_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append_samples(path, two(10))
    append_samples(path, two(20))
    assert table_of(path) == tmp_path / "samples.json"
    assert json.loads(table_of(path).read_text("utf-8")) == as_table(path)
    frame = pd.read_json(table_of(path), orient="split")  # as MLflow reads its tables
    assert list(frame.columns) == ["step", "tokens", "prompt", "kind", "text"]
    assert frame["text"].tolist() == [sample.text for sample in read_samples(path)]
    rewind_samples(path, 10)
    assert len(json.loads(table_of(path).read_text("utf-8"))["data"]) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["samples.json", "samples.jsonl"]


def test_a_line_in_mid_run_is_one_line_of_the_terminal() -> None:
    sample = Sample(200, 1, "def ", "greedy", "f(x):\n    return \x1b[31m")
    line = 'sample step 200 | greedy  | "def " "f(x):\\n    return ·[31m"'
    assert short_line(sample, 100) == line
    cut = short_line(Sample(200, 1, "a" * 500 + "the end", "sampled", "b" * 500), 80)
    assert len(cut) == 80
    assert cut.startswith('sample step 200 | sampled | "...aaa')
    assert 'the end" "bbb' in cut and cut.endswith('bb..."')


def test_the_summary_tells_prompt_and_continuation_apart() -> None:
    samples = [
        Sample(9, 1, "def ", "greedy", "f(x):\n\treturn x"),
        Sample(9, 1, "def ", "sampled", "word " * 9),
        Sample(9, 1, "second", "greedy", ""),
        Sample(9, 1, "second", "sampled", "\n  "),
    ]
    assert summary_of(samples, 34) == [
        'Sample   "def "',
        "  greedy",
        "    f(x):",
        "        return x",
        "  sampled",
        "    word word word word word word",
        "    word word word",
        'Sample   "second"',
        "  greedy",
        '    ""',
        "  sampled",
        '    "\\n  "',
    ]


def test_the_summary_cuts_what_is_long() -> None:
    (prompt, _, *text) = summary_of([Sample(9, 1, "p" * 99 + "end", "greedy", "x\n" * 50)], 40)
    assert prompt.startswith('Sample   "...ppp') and prompt.endswith('pend"') and len(prompt) == 40
    assert text[:2] == ["    x", "    x"] and len(text) == 17
    assert text[-1] == "    ... 35 more lines in samples.jsonl"
    (long,) = summary_of([Sample(9, 1, "p", "greedy", "y" * 30)], 40)[2:]
    assert long == "    " + "y" * 30
    assert len(summary_of([Sample(9, 1, "p", "greedy", "y" * 90)], 40)[2:]) == 3
