"""Arguments from files, flags and earlier runs, with all that is wrong with them in one report.

Reading takes three steps: an earlier run, files and flags become values, each converted by the type
hint of its field; the values are held against their ranges, each other, the disk, the machine and
the launch (`find_problems`); what was left open is derived. Only then is `HfArgumentParser`
imported, which makes the objects: `--help`, `--show_arguments` and mistakes need the standard
library alone, and YAML files PyYAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from arguments import GROUPS, KINDS, Arguments, describe, resolve_batch_sizes
from llm_training.argument_checks import SECRET, URL_LOGIN, find_problems, names_in, shown
from llm_training.argument_files import Entry, Table, literal, plain, read_file, repeated
from llm_training.argument_help import USAGE, help_text
from llm_training.argument_values import file_value, flag_value
from llm_training.earlier_run import EarlierRun, read_earlier_run
from llm_training.foreign_names import explain
from llm_training.launch_settings import LaunchSettings, read_launch_settings, shown_value
from llm_training.resolved_arguments import LAUNCH, as_yaml, section_name

HINT = "All arguments: python train_llm.py --help"
FLAG = "command line"
DEFAULT = "default"

# A section may be called by the whole name of its group, too.
SECTIONS = {
    name: section_name(group)
    for group in GROUPS
    for name in (section_name(group), group._argument_group_name.replace(" ", "_"))
}
SECTION_OF = {
    field.name: section_name(group) for group in GROUPS for field in dataclasses.fields(group)
}


class ArgumentProblems(ValueError):
    """Everything that is wrong with the arguments; `str()` of it is the report."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} with the arguments:", *(f"  - {text}" for text in problems), HINT]
        super().__init__("\n".join(lines))


class Setting(NamedTuple):
    """What was given for an argument, and where: plain values, or the words of a flag."""

    origin: str
    value: Any


class Derived(NamedTuple):
    """What follows for an argument that null left open, and from what."""

    value: Any
    origin: str


class Resolution(NamedTuple):
    """What came of reading.

    Attributes:
        arguments: with their origins; where there are problems, as far as they could be read.
        problems: everything that is wrong with them.
        is_shown: whether `--show_arguments` was given.
        earlier: the run that is run again, if any.
    """

    arguments: Arguments
    problems: list[str]
    is_shown: bool
    earlier: EarlierRun | None


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The arguments of this run, from the words behind the script's name; rank 0 does the talking.

    Raises:
        SystemExit: 0 after `--help` or `--show_arguments`; 2 after a report of all problems on
            stderr.
    """
    is_first = (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"
    if "--help" in argv or "-h" in argv:
        _say(help_text(), is_first)
        raise SystemExit(0)
    if not argv:
        _say(f"usage: {USAGE}{HINT}\n", is_first, is_error=True)
        raise SystemExit(2)
    found = resolve_arguments(argv)
    if found.is_shown:
        _say(as_yaml(found.arguments), is_first)
    if found.problems:
        _say(f"{ArgumentProblems(found.problems)}\n", is_first, is_error=True)
        raise SystemExit(2)
    if found.is_shown:
        raise SystemExit(0)
    if found.earlier:
        place = f"{found.arguments.run_name} in {found.arguments.output_dir}"
        _say(f"Again    {found.earlier.name}, now as {place}\n", is_first)
    return _build(found.arguments)


def _say(text: str, is_first: bool, *, is_error: bool = False) -> None:
    stream = sys.stderr if is_error else sys.stdout
    if isinstance(stream, TextIOWrapper):  # where a locale has no such character
        stream.reconfigure(errors="backslashreplace")
    if is_first:
        print(text, end="", file=stream, flush=True)


def read_arguments(argv: Sequence[str], num_processes: int | None = None) -> Arguments:
    """Arguments from files and flags, checked and completed; the values are `resolve_arguments`'s.

    Raises:
        ArgumentProblems: with all that is wrong.
    """
    found = resolve_arguments(argv, num_processes)
    if found.problems:
        raise ArgumentProblems(found.problems)
    return _build(found.arguments)


def resolve_arguments(argv: Sequence[str], num_processes: int | None = None) -> Resolution:
    """Arguments from files and flags, with their origins and all that is wrong with them.

    Args:
        argv: argument files, of which later ones win, then flags, which win over all files.
        num_processes: processes that train together, on different rows; None: as this process was
            started, and what the launcher says is checked too.

    Returns:
        The arguments; where nothing is wrong, run_name, output_dir and the three batch sizes are
        resolved. They hold neither from_run nor show_arguments, on which nothing of a run depends.
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
    flag_settings = _flag_settings(flags, problems)
    below = {name: settings[name] for name in flag_settings if name in settings}
    settings |= flag_settings
    values = _values(settings, problems)
    is_shown, wish = values.pop("show_arguments", False), values.pop("from_run", None)
    earlier = None
    if wish is not None:
        try:
            earlier = read_earlier_run(wish, values.get("tracking_uri"))
            left = _earlier_settings(earlier, values, launch.data_parallel_size, problems)
            settings, values = left | settings, _values(left, problems) | values
            below = left | below
        except ValueError as error:
            unread.append(f"from_run ({settings['from_run'].origin}): {error}")
    _add_keys(flag_settings, below, values, problems)
    given = {name: settings[name].origin for name in settings}
    arguments = Arguments(**values).with_origins(given)

    # What has no good value, or may have one in a file that could not be read, is not judged.
    doubtful = names_in(*problems) | (KINDS.keys() - settings.keys() if unread else set())
    # Where a value holds a secret, that is told alone: the other rules would repeat the value.
    rules = find_problems(arguments, launch)
    rules = [text for text in rules if not (SECRET.search(text) or URL_LOGIN.search(text))]
    rules = [_with_origins(text, settings) for text in rules if not names_in(text) & doubtful]
    problems = unread + problems + rules
    derived = {} if problems else _derived(arguments, paths, launch.data_parallel_size, earlier)
    changes = {name: value for name, (value, _) in derived.items()}
    origins = _origins(settings, values, derived) | _launch_origins(launch)
    resolved = dataclasses.replace(arguments, **changes).with_origins(origins)
    return Resolution(resolved, problems, is_shown, earlier)


# ----------------------------------------------------------------------------- what was given


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
    """What a file sets.

    Raises:
        ValueError: it cannot be read.
    """
    table = read_file(path)
    if not isinstance(table, Table):
        raise ValueError(f'holds {shown(plain(table))}, not one object {{"name": value, ...}}')
    entries = Table(_without_sections(table, path, problems))
    for key, first, second in repeated(entries):
        if key in KINDS:
            problems.append(_stands_twice(key, path, first, second))
    settings = {}
    for name, line, given in entries:
        origin = f"{path} line {line}"
        try:
            value = plain(given)
        except ValueError as error:
            problems.append(f"{name} ({origin}): {error}")
            continue
        if name in KINDS:
            settings[name] = Setting(origin, value)
        else:
            problems.append(_unknown_name(name, origin, value))
    return settings


def _without_sections(table: Table, path: str, problems: list[str]) -> Iterator[Entry]:
    """The entries of a table and of its sections; a section may be empty."""
    for key, first, second in repeated(table):
        if key not in KINDS:  # of arguments it is told together with those in sections
            problems.append(_stands_twice(key, path, first, second))
    for entry in table:
        key, line, value = entry
        section = SECTIONS.get(key.replace(" ", "_"))
        if section is None:
            yield entry
        elif isinstance(value, Table):
            yield from _of_section(section, value, path, problems)
        elif value is not None:
            advice = f"write the arguments of the group {key} in it"
            problems.append(f"{key} ({path} line {line}): is a section, not a value; {advice}")


def _stands_twice(key: str, path: str, first: int, second: int) -> str:
    return f"{key} ({path} line {first} and line {second}): the key stands twice; keep one"


def _of_section(section: str, table: Table, path: str, problems: list[str]) -> Iterator[Entry]:
    for entry in table:
        own = SECTION_OF.get(entry.key, section)
        if own == section:
            yield entry
        else:
            place = f"{entry.key} ({path} line {entry.line})"
            problems.append(f"{place}: stands in section {section}, but belongs to {own}; move it")


def _flag_settings(flags: list[tuple[str, list[str]]], problems: list[str]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, words in flags:
        positive = name.removeprefix("no_")
        if name != positive and positive in KINDS and KINDS[positive].type is bool:
            name, words = positive, ["false", *words]
        if name not in KINDS:
            value = [literal(word) for word in words]
            problems.append(_unknown_name(name, FLAG, value[0] if len(value) == 1 else value))
        elif name in settings:
            problems.append(f"{name} ({FLAG}): given twice; keep one")
        else:
            settings[name] = Setting(FLAG, words)
    return settings


def _earlier_settings(
    earlier: EarlierRun, values: Mapping[str, Any], num_processes: int, problems: list[str]
) -> dict[str, Setting]:
    """What the run that is run again leaves to this one, below the `values` that are given."""
    origin = f"run {earlier.name}"
    left = earlier.settings_below(values, num_processes)
    problems += [_unknown_name(name, origin, left[name]) for name in left if name not in KINDS]
    return {name: Setting(origin, value) for name, value in left.items() if name in KINDS}


def _unknown_name(name: str, origin: str, value: Any) -> str:
    if sentence := explain(name, value):  # another tool's name
        return f"{name} ({origin}): no such argument; {sentence}"
    close = difflib.get_close_matches(name, KINDS, n=3)
    advice = f"did you mean {' or '.join(close)}?" if close else "--help lists all"
    return f"{name} ({origin}): no such argument; {advice}"


def _values(settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Any]:
    """The settings as their arguments take them; those that do not fit become problems."""
    values = {}
    for name, (origin, given) in settings.items():
        try:
            is_flag = origin == FLAG
            values[name] = flag_value(name, given) if is_flag else file_value(name, given)
        except ValueError as error:
            problems.append(f"{name} ({origin}): {error}")
    return values


def _add_keys(
    flags: Mapping[str, Setting],
    below: Mapping[str, Setting],
    values: dict[str, Any],
    problems: list[str],
) -> None:
    """Lets a flag of the form key=value,... change these keys of a file's object and no others."""
    for name, (_, words) in flags.items():
        is_pairs = KINDS[name].type is dict and not words[0].startswith("{")
        if is_pairs and values.get(name) and name in below:
            values[name] = _values({name: below[name]}, problems).get(name, {}) | values[name]


# ----------------------------------------------------------------------------- what follows


def _with_origins(text: str, settings: Mapping[str, Setting]) -> str:
    names = [name for name in KINDS if name in settings and name in names_in(text)]
    origins = ", ".join(f"{name}: {settings[name].origin}" for name in names)
    return f"{text} ({origins})" if origins else text


def _derived(
    arguments: Arguments, paths: Sequence[str], num_processes: int, earlier: EarlierRun | None
) -> dict[str, Derived]:
    """The arguments that null leaves open and that follow from the others."""
    sizes = resolve_batch_sizes(arguments, num_processes)
    resolved = {
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "global_batch_size": sizes.global_batch,
    }
    given = [name for name in resolved if getattr(arguments, name) is not None]
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    origin = f"derived from {' and '.join([*given, processes])}"
    found = {name: Derived(size, origin) for name, size in resolved.items() if name not in given}

    run_name, output_dir = arguments.run_name, arguments.output_dir
    parent = Path(earlier.output_dir).parent if earlier else Path("runs")
    if run_name is None:
        name, origin = _name_of_run(output_dir, paths, earlier)
        run_name = name
        found["run_name"] = Derived(name, origin)
    if output_dir is None:
        found["output_dir"] = Derived(str(parent / run_name), "derived from run_name")
    return found


def _name_of_run(
    output_dir: str | None, paths: Sequence[str], earlier: EarlierRun | None
) -> tuple[str, str]:
    """What a run without a name is called, and by what."""
    folder = Path(os.path.abspath(output_dir)).name if output_dir else ""
    if earlier and not folder:
        return earlier.next_name, f"derived from run {earlier.name}"
    if paths and not earlier and Path(paths[-1]).stem:
        return Path(paths[-1]).stem, f"derived from {paths[-1]}"
    return (folder, "derived from output_dir") if folder else ("run", DEFAULT)


def _origins(
    settings: Mapping[str, Setting], values: Mapping[str, Any], derived: Mapping[str, Derived]
) -> dict[str, str]:
    """Where each argument has its value from, in the order of the groups."""
    origins = {}
    for name in SECTION_OF:
        origin = DEFAULT
        if name in derived:
            origin = derived[name].origin
        elif name in values:
            origin = settings[name].origin
        elif name in settings and name not in ("from_run", "show_arguments"):
            origin = f"{DEFAULT}, for {settings[name].origin} is refused"
        origins[name] = origin
    return origins


def _launch_origins(launch: LaunchSettings) -> dict[str, str]:
    """What the launcher and DeepSpeed's file decide beside the arguments, with where they do."""
    said = {name: (given.value, given.says) for name, given in launch.given.items()}
    if launch.num_processes > 1 or said:
        _, says = said.get("num_processes", (0, "as this process was started"))
        said = {"num_processes": (launch.num_processes, says)} | said
        said["num_processes"] = (launch.num_processes, says)
    for name, value in _flat(launch.deepspeed_config or {}):
        said[name] = (value, str(launch.deepspeed_file))
    return {
        LAUNCH + name: f"{shown_value(value)}  # {says}" for name, (value, says) in said.items()
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(arguments: Arguments) -> Arguments:
    from transformers import HfArgumentParser  # 0.6 s, and needed only now

    groups = HfArgumentParser(GROUPS).parse_dict(describe(arguments))
    values = {name: value for group in groups for name, value in vars(group).items()}
    return Arguments(**values).with_origins(arguments.origins)
