"""Argument files as they are written: JSON, YAML and TOML, with the line of every name.

Nothing here knows which arguments there are. What JSON says with one meaning is taken; what only
YAML or TOML can say, or what two readers of YAML would understand differently, is refused where it
stands. PyYAML is imported only for a YAML file.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

YAML_ENDINGS = (".yaml", ".yml")
INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")  # Python refuses longer ones
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")

KeyPath = tuple[str, ...]  # of a key in a TOML file


class Entry(NamedTuple):
    """A name in a file, the line where it stands (from 1), and what it is set to."""

    key: str
    line: int
    value: Any


class Table(list[Entry]):
    """An object of a file as it is written: in order, and with names that stand twice."""


class Unclear(NamedTuple):
    """A value that no rule covers, and why."""

    reason: str


def read_file(path: str) -> Any:
    """What a file holds, by its ending; one without .yaml, .yml or .toml is read as JSON.

    Returns:
        A `Table`, whose values are of JSON's types, tables or `Unclear`; or whatever else stands
        in place of one.

    Raises:
        ValueError: it cannot be read; says why and where.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        advice = "name a JSON, YAML or TOML file, or write --name value"
        raise ValueError(f"{error.strerror}; {advice}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None
    ending = Path(path).suffix.lower()
    if ending in YAML_ENDINGS:
        return read_yaml(text)
    return read_toml(text) if ending == ".toml" else read_json(text)


def plain(value: Any) -> Any:
    """The value without lines: tables become dicts.

    Raises:
        ValueError: something in it is unclear, or stands twice.
    """
    if isinstance(value, Unclear):
        raise ValueError(value.reason)
    if isinstance(value, Table):
        for key, first, second in repeated(value):
            raise ValueError(f"the key {key} stands twice, on line {first} and line {second}")
        return {entry.key: plain(entry.value) for entry in value}
    return [plain(element) for element in value] if isinstance(value, list) else value


def literal(word: str) -> Any:
    """A word as JSON would read it: a number, true, false or null, and else text."""
    if INTEGER.fullmatch(word):
        return int(word)
    if NUMBER.fullmatch(word):
        return float(word)
    return {"true": True, "false": False, "null": None, "none": None}.get(word.lower(), word)


def repeated(table: Table) -> Iterator[tuple[str, int, int]]:
    """The keys that stand twice in a table, with both lines."""
    lines: dict[str, int] = {}
    for key, line, _ in table:
        if key in lines:
            yield key, lines[key], line
        lines.setdefault(key, line)


# ------------------------------------------------------------------------------------------- JSON


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not valid JSON.
    """
    try:
        json.loads(text)
        return _json_value(text, _skip_space(text, 0))[0]
    except (ValueError, RecursionError) as error:
        advice = ""
        if isinstance(error, json.JSONDecodeError) and text[error.pos :].startswith(("#", "/")):
            advice = "; JSON has no comments: remove it, or use YAML or TOML, which have # comments"
        raise ValueError(f"not valid JSON: {error}{advice}") from None


def _json_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at` in a valid JSON text, and where it ends."""
    if text[at] not in "{[":
        return json.JSONDecoder().raw_decode(text, at)
    table, values = Table(), list[Any]()
    is_table, at = text[at] == "{", _skip_space(text, at + 1)
    while text[at] not in "}]":
        if is_table:
            line = text.count("\n", 0, at) + 1
            key, at = json.JSONDecoder().raw_decode(text, at)
            at = _skip_space(text, _skip_space(text, at) + 1)  # over the colon
        value, at = _json_value(text, at)
        if is_table:
            table.append(Entry(key, line, value))
        values.append(value)
        at = _skip_space(text, at)
        if text[at] == ",":
            at = _skip_space(text, at + 1)
    return table if is_table else values, at + 1


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


# ------------------------------------------------------------------------------------------- YAML


def read_yaml(text: str) -> Any:
    """The value of a YAML text, with numbers, true, false and null as JSON has them.

    Raises:
        ValueError: it is not valid YAML, or uses what JSON has no like of.
    """
    import yaml  # 0.02 s, and only for YAML

    shorthand = {
        yaml.AnchorToken: "an anchor",
        yaml.AliasToken: "an alias",
        yaml.TagToken: "a tag",
        yaml.DirectiveToken: "a directive",
    }
    try:
        for token in yaml.scan(text):
            if name := shorthand.get(type(token)):
                line = token.start_mark.line + 1
                raise ValueError(f"line {line} has {name}, which is not read: write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _yaml_value(node)
    except (yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise ValueError(f"not valid YAML: {told}") from None


def _yaml_value(node: Any) -> Any:
    """What a node of PyYAML's tree says."""
    if node.id == "sequence":
        return [_yaml_value(element) for element in node.value]
    if node.id == "scalar":
        is_quoted = node.style is not None
        return node.value if is_quoted else _yaml_scalar(node.value, node.tag.rpartition(":")[2])
    table = Table()
    for key, value in node.value:
        name, line = _yaml_value(key), key.start_mark.line + 1
        if isinstance(name, str):
            table.append(Entry(name, line, _yaml_value(value)))
        else:
            written = str(key.value)
            unclear = Unclear(f"the key {written} on line {line} is not text: put it in quotes")
            table.append(Entry(written, line, unclear))
    return table


def _yaml_scalar(text: str, kind: str) -> Any:
    """A word without quotes: as JSON reads it, else text.

    Where YAML 1.1 reads something else (`no` as false, 017 as 15), it is unclear. Only 1e-4, which
    YAML 1.1 takes for text, is a number.

    Args:
        kind: what YAML 1.1 takes it for: "int", "bool", "str", "timestamp", ...
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    has_zeros = re.match(r"[-+]?0[0-9]", text)
    if INTEGER.fullmatch(text) and kind == "int" and not has_zeros:
        return int(text)
    if NUMBER.fullmatch(text) and kind in ("float", "str") and not has_zeros:
        return float(text)
    if kind == "str" and not NUMBER.fullmatch(text):
        return text
    known = {"bool": "true or false", "timestamp": "a date"}.get(kind, "a number in another form")
    plainer = {"bool": "true or false", "timestamp": "text"}.get(kind, "a plain number")
    plainer = "" if plainer == "text" else f", or {plainer} without"
    reason = f"{text} is text to some readers of YAML and {known} to others"
    return Unclear(f'{reason}: write "{text}" in quotes{plainer}')


# ------------------------------------------------------------------------------------------- TOML

# The parts of a TOML text that matter for its lines: strings and comments hide the rest.
TOML_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\''
    r"|#[^\n]*|[\[\]{}=\n]|[^\"'#\[\]{}=\n]+",
    re.DOTALL,
)


def read_toml(text: str) -> Any:
    """The value of a TOML text.

    Raises:
        ValueError: it is not valid TOML.
    """
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not valid TOML: {error}") from None
    return _toml_value(values, (), 1, _toml_lines(text))


def _toml_value(value: Any, path: KeyPath, line: int, lines: Mapping[KeyPath, int]) -> Any:
    """The value at `path`; what has no line of its own is on `line`."""
    if isinstance(value, dict):
        places = {key: lines.get((*path, key), line) for key in value}
        return Table(
            Entry(key, places[key], _toml_value(inner, (*path, key), places[key], lines))
            for key, inner in value.items()
        )
    if isinstance(value, list):
        return [_toml_value(element, path, line, lines) for element in value]
    if isinstance(value, (date, time)):
        return Unclear(f'{value} is a date or a time: write "{value}" in quotes')
    if value == "null":
        return Unclear("TOML has no null: leave it out, or give null by a flag or in a YAML file")
    return value


def _toml_lines(text: str) -> dict[KeyPath, int]:
    """The line where each table and key of a valid TOML text first stands."""
    lines: dict[KeyPath, int] = {}
    header: KeyPath = ()
    key, is_in_key, depth, line, first_line = "", True, 0, 1, 1
    for token in [*TOML_TOKEN.findall(text), "\n"]:
        if token == "\n" and depth == 0:
            if key := key.strip():
                is_header = key.startswith("[")
                path = _toml_path(key.strip("[]") if is_header else key)
                header, path = (path, path) if is_header else (header, header + path)
                for end in range(1, len(path) + 1):
                    lines.setdefault(path[:end], first_line)
            key, is_in_key, first_line = "", True, line + 1
        elif not token.startswith("#"):
            is_in_key = is_in_key and token != "="
            key += token if is_in_key else ""
            depth += (token in "[{") - (token in "]}")
        line += token.count("\n")
    return lines


def _toml_path(key: str) -> KeyPath:
    """The parts of a key: `a."b.c"` is a and b.c."""
    value, path = tomllib.loads(f"{key} = 0"), []
    while isinstance(value, dict):
        ((part, value),) = value.items()
        path.append(part)
    return tuple(path)
