"""Proves that what is shown of the data is what the model gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arguments import Arguments
from llm_training import show_data
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.show_data import DIM, PLAIN, marked_text

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"line {i} of the text" for i in range(60)))
    return Arguments(
        model_type="gpt2",
        config_overrides={"n_layer": 1, "n_embd": 8, "n_head": 1},
        train_file=[str(file)],
        document_separator="line",
        tokenizer_name="byte",
        block_size=40,
        cache_dir=str(tmp_path / "cache"),
    )


def test_rows_show_documents_and_what_is_not_predicted(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.document_mask = True
    assert show_data.main(arguments, num_rows=2) == 0
    shown = capsys.readouterr().out
    assert "One epoch: " in shown and "rows of 40 tokens" in shown
    assert shown.count("=== row ") == 2
    assert "tokens in 3 documents" in shown or "tokens in 2 documents" in shown
    assert "⟦l⟧ine " in shown and "of the text<|endoftext|>" in shown


def test_without_a_mask_only_the_first_token_of_a_row_is_not_predicted(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_data.main(arguments, num_rows=1) == 0
    shown = capsys.readouterr().out
    assert shown.count("⟦") == 1
    assert "39 predicted" in shown


def test_a_validation_set_is_counted_and_its_first_row_shown(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "math.txt").write_text("one and one is two, " * 9)
    arguments.validation_sets = {"math": {"validation_file": [str(tmp_path / "math.txt")]}}
    assert show_data.main(arguments, num_rows=1) == 0
    shown = capsys.readouterr().out
    assert "math: validation: " in shown
    assert "validation (math): 181 tokens = 176 predicted + 5 first in a row" in shown
    assert "Validation set math:\n\n=== row 0: 40 tokens in 1 documents" in shown
    assert "⟦o⟧ne and one is two" in shown


def test_marks_are_dim_in_a_terminal() -> None:
    tokenizer = train_tokenizer("byte", (), 0)
    ids = [ord(letter) for letter in "abcd"]
    is_dim = [True, False, False, True]
    assert marked_text(ids, is_dim, tokenizer, use_color=False) == "⟦a⟧bc⟦d⟧"
    assert marked_text(ids, is_dim, tokenizer, use_color=True) == f"{DIM}a{PLAIN}bc{DIM}d{PLAIN}"
    assert marked_text([7, 8], [True, False], None, use_color=False) == "⟦7 ⟧8 "


def test_a_fault_in_the_data_is_one_line(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.train_file = ["nowhere"]
    assert show_data.main(arguments, num_rows=1) == 1
    assert capsys.readouterr().err.startswith("show_data: train_file: 'nowhere'")


def test_the_command_line(arguments: Arguments, tmp_path: Path) -> None:
    words = ["--model_type", "gpt2", "--tokenizer_name", "byte", "--block_size", "32"]
    words += ["--train_file", arguments.train_file[0], "--report_to", "none", "--rows", "1"]
    command = [sys.executable, "-m", "llm_training.show_data", *words]
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("=== row ") == 1
    assert np.array([line.startswith("train: ") for line in ended.stdout.splitlines()]).sum() == 2
