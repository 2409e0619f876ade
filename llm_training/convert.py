"""`--convert FILE`: another tool's settings as an argument file of ours, and what was left out.

The file is read, never run; which tool it is of is told by its names. The argument file goes to
stdout or into a new file, all else that is to be said to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arguments import KINDS, Arguments, describe
from llm_training.argument_checks import RANGES, SECRET, find_problems, shown
from llm_training.argument_files import Table, plain, read_file
from llm_training.argument_values import file_value
from llm_training.foreign_names import TOOLS, CannotConvert, Settings, Tool
from llm_training.foreign_names.assignments import read_assignments
from llm_training.foreign_names.common import COMMON
from llm_training.foreign_names.form import ForeignName, ends_of
from llm_training.foreign_names.nanogpt import NANOGPT
from llm_training.launch_settings import LaunchSettings

# Objects that are one value, not a section of settings.
OBJECTS = {
    *("accelerator_config", "config_overrides", "deepspeed", "fsdp_config", "dataset_kwargs"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"),
    *("lr_scheduler_kwargs", "model_init_kwargs", "parallelism_config", "special_tokens"),
}
MAX_SETTINGS = 2000
NAME_OF_SECRET = re.compile(r"(^|_)(token|key|secret|password)$")
DEFAULTS = describe(Arguments())


class ForeignFileError(ValueError):
    """The file cannot be converted; says why and what to do."""


@dataclass
class Converted:
    """What came of a file.

    Attributes:
        tool: whose names it was read by.
        values: our arguments; they have our types and lie in our ranges.
        taken: what became of each setting that has a counterpart.
        silent: what the tool does where the file says nothing, and we would do otherwise.
        left: what has no counterpart, with the reason.
        unknown: what no table knows.
        missing: what `train_llm.py` would still refuse, such as that no data is named.
    """

    tool: Tool
    values: dict[str, Any] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def convert_command(words: Sequence[str]) -> int:
    """`--convert FILE [--convert_to OUT] [--convert_from TOOL]`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python train_llm.py", description=__doc__)
    parser.add_argument(
        "--convert",
        metavar="FILE",
        required=True,
        help="file of another tool, or nanoGPT's ckpt.pt",
    )
    parser.add_argument(
        "--convert_to",
        metavar="OUT",
        help="new .json file (without it: stdout), or new folder for the model of a ckpt.pt",
    )
    titles = ", ".join(tool.title for tool in TOOLS)
    parser.add_argument("--convert_from", metavar="TOOL", help=f"whose file it is: {titles}")
    given = parser.parse_args(words)
    if given.convert.endswith((".pt", ".pth")):
        from llm_training.nanogpt_checkpoint import checkpoint_command

        return checkpoint_command(given.convert, given.convert_to)
    return convert_main(given.convert, given.convert_to, given.convert_from)


def convert_main(path: str, out: str | None = None, tool: str | None = None) -> int:
    """Converts a file: the argument file to `out` or stdout, the report to stderr.

    Returns:
        The exit status: 0, or 2 where nothing was converted.
    """
    try:
        converted = convert_file(path, tool)
        text = json.dumps(converted.values, indent=2, ensure_ascii=False) + "\n"
        if out is not None:
            _write_new(Path(out), text)
    except ForeignFileError as error:
        print(f"--convert {path}: {error}", file=sys.stderr)
        return 2
    if out is None:
        print(text, end="")
    print("\n".join(_report(converted, path, out or "FILE.json")), file=sys.stderr)
    return 0


def convert_file(path: str, tool: str | None = None) -> Converted:
    """The settings of another tool's file as our arguments.

    Args:
        path: a JSON, YAML or TOML file, or a Python file that assigns names.
        tool: the title of the tool; None: the one that knows most of the names.

    Raises:
        ForeignFileError: it cannot be read, or holds nothing that is known.
    """
    given, unread = _read(path)
    if given and not tool and all(set(ends_of(place)) & KINDS.keys() for place in given):
        raise ForeignFileError(
            f"{path} is an argument file of train_llm.py already: python train_llm.py {path}"
        )
    found = _named_tool(tool) if tool else _recognised(given, path)
    converted = Converted(found, left=[f"{name}: not read: {why}" for name, why in unread.items()])
    known: dict[str, tuple[str, ForeignName | None, Any]] = {}
    for place, value in given.items():
        entry = found.find(place)
        ours = next((end for end in ends_of(place) if end in KINDS), None)
        name = entry.name if entry else ours
        if name is None:
            converted.unknown.append(_said(place, value))
        elif name in known:
            converted.left.append(f"{_said(place, value)}: {known[name][0]} says it already")
        else:
            known[name] = (place, entry, value)
    settings = {**found.defaults} | {name: value for name, (_, _, value) in known.items()}
    for name, (place, entry, value) in known.items():
        _take(converted, place, name, entry, value, settings)
    unread_names = {end for place in unread for end in ends_of(place)}
    for name in found.defaults:
        if name not in known and name not in unread_names:
            _take_default(converted, name, settings)
    values = converted.values
    converted.values = {name: values[name] for name in DEFAULTS if name in values}
    converted.missing = _still_wrong(converted.values)
    return converted


def _take(
    converted: Converted,
    place: str,
    name: str,
    entry: ForeignName | None,
    value: Any,
    settings: Settings,
) -> None:
    """One setting of the file."""
    said = _said(place, value)
    try:
        ours = entry.convert(value, settings) if entry else {name: value}
        new = {key: _checked(key, item) for key, item in ours.items() if _says(key, item)}
    except CannotConvert as problem:
        converted.left.append(f"{said}: {problem}")
        return
    if entry and not entry.ours:
        if not entry.is_idle(value):
            converted.left.append(f"{said}: {entry.note}")
        return
    for key, item in new.items():
        if not _set(converted.values, key, item):
            before = shown(converted.values[key])
            converted.left.append(f"{said}: {key} is {before} already, by another setting")
            return
    result = ", ".join(f"{key} = {shown(item)}" for key, item in new.items())
    converted.taken.append(f"{said}: {result or 'nothing to set'}")


def _take_default(converted: Converted, name: str, settings: Settings) -> None:
    """What the tool does where the file is silent."""
    entry = converted.tool.find(name)
    try:
        ours = entry.convert(settings[name], settings) if entry else {name: settings[name]}
    except CannotConvert as problem:
        converted.left.append(f"{_said(name, settings[name])} (its default): {problem}")
        return
    for key, item in ours.items():
        is_new = isinstance(item, dict) or key not in converted.values
        if is_new and item != DEFAULTS[key] and _set(converted.values, key, item):
            converted.silent.append(f"{key} = {shown(item)}")


def _set(values: dict[str, Any], name: str, value: Any) -> bool:
    """Sets an argument, or adds to an object; False where it has another value already."""
    if isinstance(value, dict):
        before = values.setdefault(name, {})
        values[name] = before | {key: item for key, item in value.items() if key not in before}
        return all(before.get(key, item) == item for key, item in value.items())
    return values.setdefault(name, value) == value


def _says(name: str, value: Any) -> bool:
    """Whether it is a value; null is none where the argument has no null, so the default holds."""
    return value is not None or KINDS[name].nullable


def _checked(name: str, value: Any) -> Any:
    """The value as the argument takes it: 1e3 as 1000, and a lone text as a list of one.

    Raises:
        CannotConvert: it cannot.
    """
    if KINDS[name].type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        fitting = file_value(name, value)
    except ValueError as error:
        raise CannotConvert(f"{name} {error}") from None
    for phrase, is_inside, names in RANGES:
        if name in names.split() and fitting is not None and not is_inside(fitting):
            raise CannotConvert(f"{name} must be {phrase}")
    return [value] if KINDS[name].type is list and isinstance(value, str) else value


def _still_wrong(values: Mapping[str, Any]) -> list[str]:
    fitting = {name: file_value(name, value) for name, value in values.items()}
    return find_problems(Arguments(**fitting), LaunchSettings())


def _read(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file by their dotted names, and why some are not read."""
    try:
        if path.endswith(".py"):
            return read_assignments(Path(path).read_text("utf-8-sig"))
        table = read_file(path)
    except OSError as error:
        raise ForeignFileError(f"{error.strerror}; correct the path") from None
    except ValueError as error:
        raise ForeignFileError(f"{error}") from None
    if not isinstance(table, Table):
        raise ForeignFileError("it holds no names with values")
    given: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for place, line, value in _flat(table):
        try:
            if place in given:
                raise ValueError("it stands twice")
            given[place] = plain(value)
        except ValueError as error:
            unread[place] = f"line {line}: {error}"
        if len(given) > MAX_SETTINGS:
            raise ForeignFileError(f"it holds more than {MAX_SETTINGS} settings")
    return given, unread


def _flat(table: Table, section: str = "") -> Iterator[tuple[str, int, Any]]:
    for key, line, value in table:
        if isinstance(value, Table) and key not in OBJECTS:
            yield from _flat(value, f"{section}{key}.")
        else:
            yield section + key, line, value


def _named_tool(title: str) -> Tool:
    for tool in TOOLS:
        if title.lower() in (tool.title.lower(), tool.title.lower().split()[0]):
            return tool
    titles = ", ".join(tool.title for tool in TOOLS)
    raise ForeignFileError(f"no tool called {title} is known: {titles}")


def _recognised(given: Mapping[str, Any], path: str) -> Tool:
    """The tool that knows most of the names; a name that few tools have weighs more.

    Raises:
        ForeignFileError: no name is known.
    """
    rest = [tool for tool in TOOLS if tool not in (NANOGPT, COMMON)]
    candidates = [NANOGPT] if path.endswith(".py") else [COMMON, *rest]
    found = {place: [tool for tool in candidates if tool.find(place)] for place in given}
    scores = {tool.title: 0.0 for tool in candidates}
    for place, tools in found.items():
        for tool in tools:
            entry = tool.find(place)
            scores[tool.title] += (2 if entry and "." in entry.name else 1) / len(tools)
    if not any(scores.values()) and not any(
        end in KINDS for place in given for end in ends_of(place)
    ):
        raise ForeignFileError(
            "none of its names is known; docs/other_tools.md lists those that are"
        )
    return max(candidates, key=lambda tool: scores[tool.title])


def _said(place: str, value: Any) -> str:
    text = shown(value)
    is_secret = NAME_OF_SECRET.search(place) or SECRET.search(text)
    return f"{place} = {'(not shown)' if is_secret else text}"


def _write_new(path: Path, text: str) -> None:
    if path.suffix != ".json":
        raise ForeignFileError(f"--convert_to {path}: it will hold JSON, so name a .json file")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ForeignFileError(f"{path} exists: name a new file in --convert_to") from None
    except OSError as error:
        raise ForeignFileError(f"{path} cannot be written: {error.strerror}") from None


def _report(converted: Converted, path: str, out: str) -> Iterator[str]:
    title = converted.tool.title
    yield f"{path}: read by the names of {title}"
    rest = "" if converted.tool.defaults else " Where the file is silent, our defaults hold."
    chapters = {
        f"Converted.{rest}": converted.taken,
        f"{title} does so where the file is silent:": converted.silent,
        "Left out:": converted.left,
        "Left out, for no table knows it:": converted.unknown,
        "To be mended before it runs:": converted.missing,
    }
    for heading, lines in chapters.items():
        if lines:
            yield from ("", heading, *(f"  {line}" for line in lines))
    yield from ("", f"Look at it, then: python train_llm.py {out}")
