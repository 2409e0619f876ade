"""samples.jsonl: what the model made of the run's prompts, step by step, and how it is shown.

A line is `{"step": 200, "tokens": 409600, "prompt": "def ", "kind": "greedy", "text": "f(x):"}`:
`tokens` were predicted in training until then, and `text` is what the model put behind the prompt.
samples.json beside it is the same as one table.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llm_training.durable import write_json

Kind = Literal["greedy", "sampled"]

INDENT = 4
MIN_WIDTH = 20  # of a text, on however narrow a terminal
PROMPT_SHARE = 3  # of a line of the console: a third
MAX_LINES = 16  # of a continuation, at the end of a run


@dataclass(frozen=True)
class Sample:
    """What the model put behind a prompt.

    Attributes:
        step: after how many steps.
        tokens: predicted in training until then.
        prompt: the text that was to be continued.
        kind: `greedy`, the likeliest token each time, or `sampled`.
        text: the continuation, without the prompt.
    """

    step: int
    tokens: int
    prompt: str
    kind: Kind
    text: str


COLUMNS = [field.name for field in fields(Sample)]


# ------------------------------------------------------------------------------------- the files


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file in their order; none where it is not there. Torn lines are passed."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [sample for line in lines if (sample := _to_sample(line)) is not None]


def append_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Adds the samples of a step, in one write, and makes the table anew."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    with open(path, "ab", buffering=0) as file:
        file.write("".join(lines).encode("utf-8"))
    write_table(path)


def rewind_samples(path: Path, step: int) -> None:
    """Removes what was made after `step`, which will be computed again, and torn lines.

    Written beside and renamed: a kill in here leaves the old file or the new one.
    """
    if not path.exists():
        return
    kept = [sample for sample in read_samples(path) if sample.step <= step]
    beside = path.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    with open(beside, "wb") as file:
        for sample in kept:
            file.write(json.dumps(asdict(sample), ensure_ascii=False).encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    write_table(path)


def table_of(path: Path) -> Path:
    """Where the table of a samples.jsonl lies."""
    return path.with_suffix(".json")


def as_table(path: Path) -> dict[str, Any]:
    """A samples.jsonl in the form in which MLflow keeps tables: `columns`, and `data` by rows."""
    rows = [asdict(sample) for sample in read_samples(path)]
    return {"columns": COLUMNS, "data": [[row[name] for name in COLUMNS] for row in rows]}


def write_table(path: Path) -> None:
    """Writes `as_table` beside the samples.jsonl at `path`; the file is whole at every moment."""
    write_json(table_of(path), as_table(path))


def _to_sample(line: bytes) -> Sample | None:
    try:
        return Sample(**json.loads(line))
    except (ValueError, TypeError):
        return None


# ----------------------------------------------------------------------------------- the console


def short_line(sample: Sample, width: int) -> str:
    """One line on a sample in mid-run, cut to `width`; line ends are written as \\n.

    For instance `sample step 200 | greedy  | "def read" "_lines(path):\\n    with open(path)..."`.
    """
    head = f"sample step {sample.step} | {sample.kind:7} | "
    prompt = _cut_front(_quoted(sample.prompt), max(MIN_WIDTH, width // PROMPT_SHARE))
    left = max(MIN_WIDTH, width - len(head) - len(prompt) - 1)
    return f"{head}{prompt} {_cut_back(_quoted(sample.text), left)}"


def summary_of(samples: Sequence[Sample], width: int) -> list[str]:
    """The samples at the end of a run: each prompt in quotes, and under it what followed it.

    Args:
        samples: of one step; those of one prompt stand together.
        width: of a line.
    """
    lines, prompt = [], None
    for sample in samples:
        if sample.prompt != prompt:
            prompt = sample.prompt
            lines.append("Sample   " + _cut_front(_quoted(prompt), max(MIN_WIDTH, width - 9)))
        lines += [f"  {sample.kind}", *_indented(sample.text, width)]
    return lines


def _indented(text: str, width: int) -> list[str]:
    """A continuation in lines of their own: long ones go on below, and too many are cut."""
    lines = []
    if not text.strip():
        text = _cut_back(_quoted(text), max(MIN_WIDTH, width - INDENT))
    for line in _shown(text).split("\n"):
        lines += textwrap.wrap(
            line.expandtabs(4),
            max(MIN_WIDTH, width - INDENT),
            drop_whitespace=False,
            replace_whitespace=False,
            break_on_hyphens=False,
        ) or [""]
    left = len(lines) - MAX_LINES
    if left > 1:
        lines = [*lines[:MAX_LINES], f"... {left} more lines in samples.jsonl"]
    return [(" " * INDENT + line).rstrip() for line in lines]


def _quoted(text: str) -> str:
    return json.dumps(_shown(text), ensure_ascii=False)


def _shown(text: str) -> str:
    """The text without what would move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


def _cut_back(quoted: str, length: int) -> str:
    return quoted if len(quoted) <= length else quoted[: length - 4] + '..."'


def _cut_front(quoted: str, length: int) -> str:
    """The end of a prompt is what is continued."""
    return quoted if len(quoted) <= length else '"...' + quoted[4 - length :]
