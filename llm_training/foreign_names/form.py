"""What is known of another tool's setting: its name, ours, and how its value becomes ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# The settings of a foreign file by the names that the tool's table has for them.
Settings = Mapping[str, Any]
# From a value, and all settings of its file, to values of our arguments; {}: nothing to say.
Conversion = Callable[[Any, Settings], dict[str, Any]]


class CannotConvert(ValueError):
    """A value without a counterpart, or one that needs what is not known; says what to do."""


@dataclass(frozen=True)
class ForeignName:
    """A setting of another tool.

    Attributes:
        name: as the tool spells it; dotted where its section is part of the name.
        ours: the arguments that take its place; empty: it has no counterpart here.
        note: what becomes of the value, or why there is no counterpart and what to do.
        convert: makes our values of its value.
        idle: a value, beside null, false, 0 and empty ones, at which nothing is lost without it.
    """

    name: str
    ours: tuple[str, ...]
    note: str
    convert: Conversion
    idle: Any = None

    def is_idle(self, value: Any) -> bool:
        """Whether nothing is lost where this setting is left out."""
        return self.convert is not _nothing or not value or value in ("no", "none", self.idle)


@dataclass(frozen=True)
class Tool:
    """A program whose settings are known here.

    Attributes:
        title: its name.
        owner: as in "... name": nanoGPT's.
        names: its settings.
        base: a tool whose settings it takes too.
        defaults: what it does where a file is silent, by its own names.
        own: `names` by their name; made here.
    """

    title: str
    owner: str
    names: tuple[ForeignName, ...]
    base: Tool | None = None
    defaults: Settings = field(default_factory=dict)
    own: Mapping[str, ForeignName] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", {entry.name: entry for entry in self.names})
        assert len(self.own) == len(self.names), f"{self.title}: a name stands twice"

    def find(self, path: str) -> ForeignName | None:
        """The setting of this dotted path, or of its end: `train.max_steps`, then `max_steps`."""
        for name in ends_of(path):
            tool: Tool | None = self
            while tool is not None:
                if name in tool.own:
                    return tool.own[name]
                tool = tool.base
        return None


def ends_of(path: str) -> Iterator[str]:
    """A dotted path, then without its first section, and so on to its last name."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def renamed(ours: str, names: str, note: str = "") -> tuple[ForeignName, ...]:
    """Settings that differ from one of our arguments in their name only."""
    return converted(ours, names, lambda value, _: {ours: value}, note)


def converted(
    ours: str, names: str, convert: Conversion, note: str = ""
) -> tuple[ForeignName, ...]:
    """Settings whose values mean something else here; both lists of names have spaces between."""
    return tuple(ForeignName(name, tuple(ours.split()), note, convert) for name in names.split())


def left_out(names: str, note: str, idle: Any = None) -> tuple[ForeignName, ...]:
    """Settings without a counterpart; the note says why, and what to do."""
    return tuple(ForeignName(name, (), note, _nothing, idle) for name in names.split())


def _nothing(value: Any, settings: Settings) -> dict[str, Any]:
    return {}
