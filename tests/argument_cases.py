"""A good set of arguments, files that hold it, and what reading them says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_training.argument_parsing import ArgumentProblems, read_arguments

ROOT = Path(__file__).parents[1]
GOOD = {
    "model_type": "gpt2",
    "tokenizer_name": "byte",
    "train_file": "${PYTHON_STDLIB}",
    "report_to": "none",
}


def open_clean_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and an environment that says nothing about processes."""
    monkeypatch.chdir(folder)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NOT_SET"):
        monkeypatch.delenv(name, raising=False)


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def write_good(name: str = "good.json", **changes: Any) -> str:
    return write(name, json.dumps({**GOOD, **changes}))


def problems_of(*argv: str, num_processes: int = 1) -> list[str]:
    with pytest.raises(ArgumentProblems) as caught:
        read_arguments(argv, num_processes)
    return caught.value.problems


def the_problem_of(*argv: str, num_processes: int = 1) -> str:
    problems = problems_of(*argv, num_processes=num_processes)
    assert len(problems) == 1, problems
    return problems[0]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True)
