"""Names of other tools: what their settings are called here, and how their values become ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from arguments import KINDS
from llm_training.foreign_names.common import COMMON
from llm_training.foreign_names.conversions import literal
from llm_training.foreign_names.fine_tuners import AXOLOTL, LLAMA_FACTORY, TRL
from llm_training.foreign_names.form import (
    CannotConvert,
    ForeignName,
    Settings,
    Tool,
    ends_of,
)
from llm_training.foreign_names.hugging_face import TRAINING_ARGUMENTS
from llm_training.foreign_names.nanogpt import NANOGPT
from llm_training.foreign_names.pretrainers import LIGHTNING, LITGPT, MEGATRON, TORCHTITAN

__all__ = ["TOOLS", "CannotConvert", "ForeignName", "Settings", "Tool", "explain"]

TOOLS = (
    *(NANOGPT, TRAINING_ARGUMENTS, TRL, LLAMA_FACTORY, AXOLOTL, LITGPT, TORCHTITAN, MEGATRON),
    *(LIGHTNING, COMMON),
)


def explain(name: str, value: object) -> str | None:
    """What an argument of another tool is called here: a sentence without its full stop.

    Args:
        name: as it was given, dotted where it stood in a section (`training.steps`).
        value: as a file holds it, or the words behind a flag.

    Returns:
        None where no tool is known to have the name, or it is ours with a value of ours.
    """
    plain = _plain(value)
    if name in KINDS and (_fits(name, value) or _fits(name, plain)):
        return None
    owners: dict[str, list[Tool]] = {}  # by what is said of the name
    for tool, entry in _known(name):
        said = _meaning(entry, name, plain)
        if said is None:
            return None
        owners.setdefault(said, []).append(tool)
    if not owners:
        return None
    if len(owners) == 1:
        [(said, tools)] = owners.items()
        return f"{name} is {_listed([tool.owner for tool in tools])} name: {said}"
    meanings = (f"as {_listed([t.owner for t in tools])} name: {s}" for s, tools in owners.items())
    return f"{name} means several things; {'; '.join(meanings)}"


@functools.cache
def _index() -> dict[str, list[tuple[Tool, ForeignName]]]:
    index: dict[str, list[tuple[Tool, ForeignName]]] = {}
    for tool in TOOLS:
        for entry in tool.names:
            index.setdefault(entry.name, []).append((tool, entry))
    return index


def _known(path: str) -> list[tuple[Tool, ForeignName]]:
    return next((_index()[name] for name in ends_of(path) if name in _index()), [])


def _meaning(entry: ForeignName, name: str, value: Any) -> str | None:
    """`here it is max_steps (give --max_steps 5000)`; None: value and name are ours as they are."""
    try:
        ours = entry.convert(value, {entry.name: value})
    except CannotConvert as problem:
        if not entry.ours:
            return f"it has no counterpart here: {problem}"
        return f"here it is {' and '.join(entry.ours)} ({problem})"
    if ours == {name: value}:
        return None
    if not entry.ours:
        return f"it has no counterpart here: {entry.note}"
    if value is None or not ours or not all(_fits(*item) for item in ours.items()):
        return f"here it is {' and '.join(entry.ours)}" + (f" ({entry.note})" if entry.note else "")
    return f"here it is {' and '.join(ours)} (give {' '.join(_flags(ours))})"


def _fits(name: str, value: Any) -> bool:
    """Whether an argument takes a value of this type."""
    kind = KINDS[name]
    if value is None:
        return kind.nullable or kind.type in (list, dict)
    words = value if isinstance(value, list) else [value]
    if kind.choices and not all(word in kind.choices for word in words):
        return False
    return type(value) is kind.type or (kind.type is float and type(value) is int)


def _flags(ours: Settings) -> Iterator[str]:
    for name, value in ours.items():
        if isinstance(value, dict):
            yield f"--{name} {','.join(f'{key}={_word(item)}' for key, item in value.items())}"
        elif isinstance(value, list):
            yield f"--{name} {' '.join(map(_word, value))}"
        else:
            yield f"--{name} {_word(value)}"


def _word(value: Any) -> str:
    """A value as one writes it behind a flag."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else "..."


def _plain(value: object) -> Any:
    """What a file would hold: the words behind a flag become numbers and switches."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        words = [literal(word) for word in value]
        return True if not words else words[0] if len(words) == 1 else words
    return value


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
