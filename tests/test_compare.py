"""Proves that runs are compared truly: what differs, how they ended, and whether it counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from llm_training import compare
from llm_training.compare import main
from llm_training.comparison_table import Row, cut_alike, table_lines
from tests.argument_cases import run_python
from tests.recorded_run_files import log_lines, loss_at, write_log, write_run


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def leave_two_runs() -> None:
    """A better by 0.2 nats per token, where 0.028 are noise."""
    write_run(Path("a"), arguments={"learning_rate": 1e-3, "seed": 42})
    write_run(
        Path("b"),
        floor=2.8,
        arguments={"learning_rate": 2e-3, "hf_token": "hf_secret", "warmup_steps": 0},
        provenance={"git_revision": "0" * 40, "validation_set_tokens": {"math": 8}},
    )


def table(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """The table by the labels of its rows, with the cells that two spaces part; no figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw", lambda *_: Path("compare.png"))
        assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {own[0]: own[1:] for own in cells}


def test_what_differs_is_listed_and_what_is_equal_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave_two_runs()
    rows = table(capsys, "a", "b")
    assert rows["a"] == ["b"]  # the heading
    assert rows["learning_rate"] == ["0.001", "0.002"]
    assert rows["git_revision"] == ["78c5cf578572+changes", "000000000000"]
    assert rows["validation_set_tokens.math"] == ["7", "8"]
    # What a file does not name has its default, and names always differ.
    absent = {"seed", "warmup_steps", "max_steps", "run_name", "output_dir", "torch_version"}
    assert absent & rows.keys() == set()
    assert rows["6 equal facts not shown"] == []
    assert any(re.fullmatch(r"1\d\d equal arguments not shown", label) for label in rows)
    assert rows["hf_token"] == ["null", "[redacted]"]


def test_how_runs_ended_is_told_with_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    leave_two_runs()
    rows = table(capsys, "a", "b")
    a, b = loss_at(100, 3.0), loss_at(100, 2.8)
    assert rows["status"] == ["finished", "finished"]
    assert rows["tokens"] == ["100,000", "100,000"]
    assert rows["time"] == ["3:20", "3:20"]
    assert rows["tokens/s, median"] == ["500", "500"]
    assert rows["train/loss, last"] == [f"{a:.4f}", f"{b:.4f}"]
    assert rows["eval/loss, best"] == [f"{a + 0.1:.4f} at step 100", f"{b + 0.1:.4f} at step 100"]
    assert rows["eval/loss, last"] == [f"{a + 0.1:.4f} ± 0.0100", f"{b + 0.1:.4f} ± 0.0100"]
    assert rows["less a"] == ["-0.2000 ± 0.0283"]  # of math, the last: sqrt(2) x 0.02
    assert rows["beyond noise"] == []


@pytest.mark.parametrize(
    ("gap", "errors", "told"),
    [
        (0.027, True, "within noise"),
        (0.030, True, "beyond noise"),
        (-0.030, True, "beyond noise"),
        (0.030, False, "noise unknown"),
    ],
)
def test_noise_is_two_standard_errors_of_the_difference(
    capsys: pytest.CaptureFixture[str], gap: float, errors: bool, told: str
) -> None:
    for name, floor in (("a", 3.0), ("b", 3.0 + gap)):
        lines = log_lines(floor=floor)
        kept = [n for n in lines[0] if "math" not in n and (errors or "stderr" not in n)]
        lines = [
            {n: v for n, v in line.items() if not n.startswith("eval/") or n in kept}
            for line in lines
        ]
        write_log(Path(name), lines)
    rows = table(capsys, "a", "b")
    assert {"within noise", "beyond noise", "noise unknown"} & rows.keys() == {told}
    assert any("unpaired" in label for label in rows) == errors


def test_other_data_and_other_lengths_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    leave_two_runs()
    write_run(Path("c"), num_steps=50, provenance={"data_fingerprint": "f" * 64})
    rows = table(capsys, "a", "c")
    at_50 = f"{loss_at(50, 3.0) + 0.1:.4f}"
    assert rows["eval/loss at 50k tokens"] == [at_50, at_50]
    assert any(label.startswith("Other data than a (data_fingerprint): c.") for label in rows)
    rows = table(capsys, "a", "b")
    assert [label for label in rows if "Other data" in label or " at 1" in label] == []


def test_a_log_alone_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"))
    write_log(Path("b"), log_lines())
    rows = table(capsys, "a", "b")
    assert rows["model_type"] == ["gpt2", "?"]
    assert rows["status"] == ["finished", "not finished"]


def test_a_run_alone_is_held_against_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    leave_two_runs()
    rows = table(capsys, "a")
    assert (rows["learning_rate"], rows["model_type"]) == (["0.001"], ["gpt2"])
    assert rows["torch_version"] == ["2.13.0"] and "seed" not in rows
    assert any(re.fullmatch(r"1\d\d default arguments not shown", label) for label in rows)


def test_runs_of_one_name_are_called_by_their_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("x/a", "y/a"):
        write_run(Path(place))
    assert table(capsys, "x/a", "y/a")["x/a"] == ["y/a"]


def test_a_metric_of_choice_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    leave_two_runs()
    rows = table(capsys, "a", "b", "--metric", "train/grad_norm", "--by", "tokens")
    assert rows["train/grad_norm, last"] == ["1.01", "1.01"]


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    leave_two_runs()
    write_log(Path("b"), [*log_lines(floor=2.8), {"step": 101, "time": 1, "train/loss": "NaN"}])
    assert main(["a", "b", "--json", "--output", "sub/curves.png"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["differing_arguments"]["learning_rate"] == [0.001, 0.002]
    assert told["figure"] == "sub/curves.png" and Path("sub/curves.png").is_file()
    a, b = told["runs"]
    assert (a["name"], a["tokens"], a["to_first"]) == ("a", 100_000, {})
    assert b["last"]["train/loss"] is None
    assert b["to_first"]["eval/loss"] == {
        "difference": pytest.approx(-0.2),
        "standard_error": pytest.approx(0.01 * 2**0.5),
        "is_paired": False,
        "is_beyond_noise": True,
    }


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["a", "nowhere"], "compare: nowhere is no folder"),
        (["a", "."], "compare: . holds neither train_log.jsonl nor arguments.json"),
        (["a", "--metric", "train/los"], "--metric train/los was logged by no run; there are "),
        (["a", "--output", "a/train_log.jsonl/x.png"], "compare: "),
    ],
)
def test_what_cannot_be_compared_is_told(
    capsys: pytest.CaptureFixture[str], words: list[str], phrase: str
) -> None:
    write_run(Path("a"))
    assert main(words) == 1
    said = capsys.readouterr()
    assert (said.out, phrase in said.err) == ("", True), said.err


def test_the_figure_is_no_empty_page() -> None:
    leave_two_runs()
    assert main(["a", "b"]) == 0
    image = matplotlib.image.imread("compare.png")
    colours = {tuple(c) for c in (255 * image[::4, ::4]).astype(int).reshape(-1, 4)}
    assert compare.build_parser().parse_args(["a"]).output == "compare.png"
    assert image.shape[:2] == (1620, 1650) and len(colours) > 50


def test_the_command_starts_without_what_is_slow() -> None:
    leave_two_runs()
    code = (
        "from llm_training.compare import main\n"
        "assert main(['a', 'b']) == 0\n"
        "slow = {'torch', 'mlflow', 'transformers', 'accelerate', 'pandas', 'matplotlib.pyplot'}\n"
        "print('slow:', sorted(slow & set(sys.modules)))"
    )
    ended = run_python(code)
    assert ended.stdout.endswith("slow: []\n"), ended.stderr


# ------------------------------------------------------------------------------------------- table


def test_lines_are_no_wider_than_the_terminal() -> None:
    names = [f"run number {number}" for number in range(7)]
    rows = [Row("Heading"), Row("  long", ["x" * 99] * 7), Row("  short", list("abcdefg"))]
    for width in (60, 80, 120, 400):
        lines = table_lines(names, rows, width)
        assert max(map(len, lines)) <= width
        assert all(any(name in line for line in lines) for name in names)
        num_tables = sum(line == "Heading" for line in lines)
        assert lines.count("") == num_tables - 1
        assert (num_tables == 1) == (width == 400)


def test_long_values_are_cut_where_they_do_not_differ() -> None:
    long = ["/data/corpus/part-1.jsonl", "/data/corpus/part-2.jsonl", "x"]
    assert cut_alike(long, 14) == ["…part-1.jsonl", "…part-2.jsonl", "x"]
    assert cut_alike(long, 99) == long
    assert cut_alike(["abcdefgh", "zbcdefgh"], 4) == ["abc…", "zbc…"]
    assert cut_alike(["a\nb", "a b"], 9) == ["a b", "a b"]
