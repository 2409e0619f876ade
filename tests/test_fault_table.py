"""The table in docs/faults.md has every fault once, and names only tests that there are."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
GROUPS = ["Configuration", "Data", "Checkpoints and resume", "Process", "Tracking", "Numerics"]
UNPROVED = re.compile("not tested|not covered", re.IGNORECASE)


def rows_of(table: str) -> list[list[str]]:
    """The cells of each row: number, fault, what happens, tests."""
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def named_tests(text: str) -> list[tuple[str, str]]:
    """File and name of each test that is named."""
    return re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text)


@functools.cache
def names_in(file: str) -> set[str]:
    """The tests that a file defines, as pytest names them; nothing is imported."""
    if not (ROOT / file).is_file():
        return set()
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}::{method.name}" for method in methods}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def missing_tests(text: str) -> list[str]:
    return [f"{file}::{name}" for file, name in named_tests(text) if name not in names_in(file)]


def test_every_fault_stands_once_and_in_order() -> None:
    assert [cells[0] for cells in rows_of(TABLE)] == [str(number) for number in range(1, 61)]
    assert all(len(cells) == 4 and all(cells) for cells in rows_of(TABLE))
    assert re.findall(r"^## (.*)$", TABLE, re.MULTILINE) == GROUPS


def test_every_named_test_exists() -> None:
    assert missing_tests(TABLE) == []


def test_every_row_is_proved_or_says_that_it_is_not() -> None:
    unproved = [cells[0] for cells in rows_of(TABLE) if not named_tests(cells[3])]
    said = [cells[0] for cells in rows_of(TABLE) if UNPROVED.search(" ".join(cells[2:]))]
    assert set(unproved) <= set(said)
    assert "TODO" not in TABLE


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("tests/test_fault_table.py::test_every_named_test_exists", True),
        ("tests/test_stopping.py::TestDeadline::test_the_age_of_this_process", True),
        ("tests/test_stopping.py::test_the_age_of_this_process", False),
        ("tests/test_fault_table.py::rows_of", False),
        ("tests/test_fault_table.py::test_every_named_test", False),
        ("tests/test_no_such_file.py::test_every_named_test_exists", False),
    ],
)
def test_a_test_that_is_gone_is_found(name: str, is_there: bool) -> None:
    assert missing_tests(f"`{name}`") == ([] if is_there else [name])
