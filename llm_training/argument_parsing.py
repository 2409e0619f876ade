"""Arguments from files and flags, with everything that is wrong with them in one report.

Reading takes three steps: files and flags become values, each converted by the type hint of its
field (`_convert`); the values are held against their ranges, each other, the disk, the machine and
the launch (`find_problems`); what was left open is derived (`_derived`). Only then is
`HfArgumentParser` imported, which makes the objects: `--help` and mistakes need the standard
library alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from arguments import (
    GROUPS,
    KINDS,
    SOURCE_ARGUMENTS,
    Arguments,
    Kind,
    describe,
    resolve_batch_sizes,
)
from llm_training.argument_checks import find_problems, names_in, shown
from llm_training.launch_settings import LaunchSettings, read_launch_settings

USAGE = """\
python train_llm.py [FILE.json ...] [--name value ...]
       python train_llm.py train_configs/quickstart.json --learning_rate 1e-3
       accelerate launch --config_file accelerate_configs/NAME.yaml train_llm.py FILE.json
"""
RULES = """\
Flags win over files, and later files over earlier ones. --name alone means true and --no_name
false; null empties what may be null; ${NAME} in a text is the environment's NAME, and ~/ at its
start the home folder.
"""
HINT = "All arguments: python train_llm.py --help"
FLAG = "command line"


class ArgumentProblems(ValueError):
    """Everything that is wrong with the arguments; `str()` of it is the report."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} with the arguments:", *(f"  - {text}" for text in problems), HINT]
        super().__init__("\n".join(lines))


class Setting(NamedTuple):
    """What was given for an argument, and where: JSON from a file, or the words of a flag."""

    origin: str
    value: Any


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The arguments of this run, from the words behind the script's name; rank 0 does the talking.

    Raises:
        SystemExit: 0 after `--help`; 2 after a report of all problems on stderr.
    """
    is_first = (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"
    if "--help" in argv or "-h" in argv:
        if is_first:
            print(help_text(), end="")
        raise SystemExit(0)
    try:
        if argv:
            return read_arguments(argv)
        report = f"usage: {USAGE}{HINT}"
    except ArgumentProblems as problems:
        report = str(problems)
    if is_first:
        print(report, file=sys.stderr)
    raise SystemExit(2)


def read_arguments(argv: Sequence[str], num_processes: int | None = None) -> Arguments:
    """Arguments from JSON files and flags, checked and completed.

    Args:
        argv: argument files, of which later ones win, then flags, which win over all files.
        num_processes: processes that train together, on different rows; None: as this process was
            started, and what the launcher says is checked too.

    Returns:
        The arguments with run_name, output_dir and the three batch sizes resolved.

    Raises:
        ArgumentProblems: with all that is wrong.
    """
    launch = LaunchSettings(num_processes=num_processes or 1)
    if num_processes is None:
        launch = read_launch_settings()
    paths, flags = _split(argv)
    problems: list[str] = []
    settings: dict[str, Setting] = {}
    unread = []
    for path in paths:
        try:
            settings |= _file_settings(path, problems)
        except ValueError as error:
            unread.append(f"argument file {path}: {error}")
    settings |= _flag_settings(flags, problems)
    arguments = Arguments(**_values(settings, problems))

    # What has no good value, or may have one in a file that could not be read, is not judged.
    doubtful = names_in(*problems) | (KINDS.keys() - settings.keys() if unread else set())
    rules = find_problems(arguments, launch)
    rules = [_with_origins(text, settings) for text in rules if not names_in(text) & doubtful]
    if problems := unread + problems + rules:
        raise ArgumentProblems(problems)
    return _build(describe(arguments) | _derived(arguments, paths, launch.data_parallel_size))


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The argument files, and the name of each flag with the words behind it."""
    paths: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word):  # so that -1 and "-- text" are values
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        else:
            (flags[-1][1] if flags else paths).append(word)
    return paths, flags


def _file_settings(path: str, problems: list[str]) -> dict[str, Setting]:
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{error.strerror}; name a JSON file, or write --name value") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None
    values, repeated = _load_json(text)
    if not isinstance(values, dict):
        raise ValueError(f'holds {shown(values)}, not one object {{"name": value, ...}}')
    problems += [f"{name} ({path}): the key stands twice; keep one" for name in repeated]
    problems += [_unknown_name(name, path) for name in values if name not in KINDS]
    return {name: Setting(path, value) for name, value in values.items() if name in KINDS}


def _load_json(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the keys that stand twice in one of its objects."""
    repeated: list[str] = []

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=build_object), repeated
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _flag_settings(flags: list[tuple[str, list[str]]], problems: list[str]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, words in flags:
        positive = name.removeprefix("no_")
        if name != positive and positive in KINDS and KINDS[positive].type is bool:
            name, words = positive, ["false", *words]
        if name not in KINDS:
            problems.append(_unknown_name(name, FLAG))
        elif name in settings:
            problems.append(f"{name} ({FLAG}): given twice; keep one")
        else:
            settings[name] = Setting(FLAG, words)
    return settings


def _unknown_name(name: str, origin: str) -> str:
    close = difflib.get_close_matches(name, KINDS, n=3)
    advice = f"did you mean {' or '.join(close)}?" if close else "--help lists all"
    return f"{name} ({origin}): no such argument; {advice}"


def _values(settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Any]:
    """The settings as their arguments take them; those that do not fit become problems."""
    values = {}
    for name, (origin, given) in settings.items():
        try:
            value = _expanded(given)
            if origin == FLAG:
                value = _flag_value(name, value)
            converted = _convert(KINDS[name], value)
            values[name] = _mixture(converted) if name == "train_mixture" else converted
        except ValueError as error:
            problems.append(f"{name} ({origin}): {error}")
    return values


def _expanded(value: Any) -> Any:
    """`value` with `${NAME}` replaced in its texts, and a ~/ at their start by the home folder."""
    if isinstance(value, list):
        return [_expanded(element) for element in value]
    if isinstance(value, dict):
        return {key: _expanded(element) for key, element in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    known = {**os.environ, "PYTHON_STDLIB": sysconfig.get_path("stdlib")}
    try:
        return re.sub(r"\$\{([A-Za-z_]\w*)\}", lambda match: known[match[1]], value)
    except KeyError as error:
        raise ValueError(f"{shown(value)}: set {error.args[0]} in the environment") from None


def _flag_value(name: str, words: list[str]) -> Any:
    """The words behind a flag as a JSON file would hold them."""
    kind = KINDS[name]
    if not words:
        if kind.type is bool:
            return True
        raise ValueError(f"no value; write --{name} VALUE, or --{name}=VALUE if it has dashes")
    is_null = words[0].lower() in ("null", "none") and words[0] not in kind.choices
    if is_null and len(words) == 1 and (kind.nullable or kind.type in (list, dict)):
        return None
    if kind.type is list:
        return words
    if len(words) > 1:
        raise ValueError(f"takes one value, not {len(words)}: {' '.join(words)}")
    if kind.type is dict:
        return _overrides(words[0])
    return words[0] if kind.type is str else _literal(words[0])


def _literal(word: str) -> Any:
    """A word as JSON would read it: a number, true, false or null, and else text."""
    if re.fullmatch(r"[-+]?[0-9]{1,4000}", word):  # Python refuses longer ones
        return int(word)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", word):
        return float(word)
    return {"true": True, "false": False, "null": None, "none": None}.get(word.lower(), word)


def _overrides(text: str) -> dict[str, Any]:
    """The changes that `{"n_layer": 6, "n_embd": 384}` or `n_layer=6,n_embd=384` names."""
    if text.lstrip().startswith("{"):
        value, repeated = _load_json(text)
    else:
        pairs = [pair.split("=", 1) for pair in text.split(",")]
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise ValueError(f"takes a JSON object or n_layer=6,n_embd=384, not {shown(text)}")
        value = {key: _literal(word) for key, word in pairs}
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]} stands twice; keep one")
    return value


def _convert(kind: Kind, value: Any) -> Any:
    """`value`, as JSON holds it, as the argument takes it; nothing is guessed, but 1 may be 1.0.

    Raises:
        ValueError: it does not fit; the message says what does and what to write.
    """
    if value is None and (kind.nullable or kind.type in (list, dict)):
        return None if kind.nullable else kind.type()
    if kind.type is list and isinstance(value, (str, list)):
        elements = value if isinstance(value, list) else [value]
        return [_convert(kind._replace(type=str), element) for element in elements]
    fits = type(value) is kind.type  # not isinstance, by which True is an int
    if kind.type is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # nor NaN
    elif kind.type is dict:
        fits = fits and _is_finite(value)
    elif kind.type is str:
        fits = fits and value != "" and (not kind.choices or value in kind.choices)
    if not fits:
        raise ValueError(f"takes {kind.form}, not {shown(value)}{_advice(kind, value)}")
    return float(value) if kind.type is float else value


def _mixture(sources: dict[str, Any]) -> dict[str, Any]:
    """The sources of `train_mixture`, each as its own arguments take it.

    Raises:
        ValueError: with the first that does not fit.
    """
    kinds = {name: KINDS[name] for name in SOURCE_ARGUMENTS} | {"weight": Kind(float, False, ())}
    converted = {}
    for source, settings in sources.items():
        if not isinstance(settings, dict):
            example = '{"train_file": "folder", "weight": 1}'
            raise ValueError(f"{source} takes an object like {example}, not {shown(settings)}")
        converted[source] = {"weight": 1.0}
        for name, value in settings.items():
            if name not in kinds:
                close = difflib.get_close_matches(name, kinds, n=1)
                advice = f"did you mean {close[0]}?" if close else f"it may set {', '.join(kinds)}"
                raise ValueError(f"{source} cannot set {name}; {advice}")
            try:
                converted[source][name] = _convert(kinds[name], value)
            except ValueError as error:
                raise ValueError(f"{source}, {name} {error}") from None
    return converted


def _is_finite(value: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def _advice(kind: Kind, value: Any) -> str:
    """What to write in place of a value that does not fit, where one can tell."""
    if kind.type is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind.type in (bool, int, float) and type(value) is str and type(_literal(value)) is not str:
        return "; write it without quotes"
    if kind.type is str and type(value) in (bool, int, float):
        return "; write it in quotes"
    if value == "":
        return "; give one, or leave the argument out"
    close = difflib.get_close_matches(str(value), kind.choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _with_origins(text: str, settings: Mapping[str, Setting]) -> str:
    names = [name for name in KINDS if name in settings and name in names_in(text)]
    origins = ", ".join(f"{name}: {settings[name].origin}" for name in names)
    return f"{text} ({origins})" if origins else text


def _derived(arguments: Arguments, paths: Sequence[str], num_processes: int) -> dict[str, Any]:
    """The arguments that null leaves open and that follow from the others."""
    sizes = resolve_batch_sizes(arguments, num_processes)
    folder = Path(os.path.abspath(arguments.output_dir)).name if arguments.output_dir else ""
    run_name = arguments.run_name or (Path(paths[-1]).stem if paths else folder) or "run"
    return {
        "run_name": run_name,
        "output_dir": arguments.output_dir or f"runs/{run_name}",
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "global_batch_size": sizes.global_batch,
    }


def _build(values: dict[str, Any]) -> Arguments:
    from transformers import HfArgumentParser  # 0.6 s, and needed only now

    groups = HfArgumentParser(GROUPS).parse_dict(values)
    return Arguments(**{name: value for group in groups for name, value in vars(group).items()})


def help_text() -> str:
    """What `--help` prints, as wide as the terminal."""
    import argparse

    defaults = describe(Arguments())
    parser = argparse.ArgumentParser(usage=USAGE, description=RULES, add_help=False)
    for group in GROUPS:
        section = parser.add_argument_group(group._argument_group_name, group.__doc__)
        for field in dataclasses.fields(group):
            text = f"{field.metadata['help']} (default: {json.dumps(defaults[field.name])})"
            form = KINDS[field.name].form
            section.add_argument(f"--{field.name}", metavar=form, help=text)
    return parser.format_help()


def argument_table() -> str:
    """The arguments in Markdown, a table for each group."""
    defaults = describe(Arguments())
    lines = []
    for group in GROUPS:
        lines += [f"### {group._argument_group_name.capitalize()}", "", str(group.__doc__), ""]
        lines += ["| argument | takes | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(group):
            code = (field.name, KINDS[field.name].form, json.dumps(defaults[field.name]))
            cells = [*(f"`{text}`" for text in code), field.metadata["help"]]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
