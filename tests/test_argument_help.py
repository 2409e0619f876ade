"""Proves that help and tables show every argument, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from arguments import GROUPS, KINDS
from llm_training.argument_help import argument_table, help_text
from llm_training.argument_parsing import parse_arguments
from tests.argument_cases import open_clean_place, run_python


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


def test_help_and_mistakes_import_nothing_slow() -> None:
    ended = run_python(
        "from llm_training.argument_parsing import parse_arguments\n"
        "for words in (['--help'], ['--seed', 'x']):\n"
        "    try: parse_arguments(words)\n"
        "    except SystemExit as end: print('code', end.code)\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "print('slow', sorted(tops & {'torch', 'transformers', 'numpy', 'yaml'}))\n"
    )
    assert ended.stdout.startswith("usage: python train_llm.py")
    assert ended.stdout.endswith("code 0\ncode 2\nslow []\n"), ended.stderr


@pytest.mark.parametrize("argv", [["-h"], ["good.json", "--seed", "x", "--help"]])
def test_help_goes_before_everything(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(argv)
    assert (ended.value.code, capsys.readouterr()) == (0, (help_text(), ""))


def test_help_shows_every_argument_and_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    wide = help_text()
    for name, kind in KINDS.items():
        assert f"--{name} {kind.form}" in wide
    assert (
        wide.index("\noptimization:") < wide.index("--learning_rate number") < wide.index("\nrun:")
    )
    assert '(default: ["mlflow"])' in " ".join(wide.split())
    assert max(map(len, wide.splitlines())) <= 120
    monkeypatch.setenv("COLUMNS", "70")
    assert len(help_text().splitlines()) > len(wide.splitlines())


def test_the_table_has_a_row_for_each_argument() -> None:
    rows = [line for line in argument_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KINDS)
    assert all(row.replace(r"\|", "").count("|") == 5 for row in rows)
    device = next(row for row in rows if row.startswith("| `device`"))
    assert device.startswith(r'| `device` | `auto\|cpu\|cuda\|mps` | `"auto"` | Where')
    assert argument_table().count("|---|---|---|---|") == len(GROUPS)
