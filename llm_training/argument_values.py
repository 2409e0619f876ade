"""What a file or a flag gives for an argument, as the argument takes it; nothing is guessed."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from typing import Any

from arguments import KINDS, SOURCE_ARGUMENTS, Kind
from llm_training.argument_checks import shown
from llm_training.argument_files import literal, plain, read_json
from llm_training.validation_sets import SET_ARGUMENTS

VARIABLE = re.compile(r"\$?\$\{(?:([A-Za-z_]\w*)\})?")


def file_value(name: str, given: Any) -> Any:
    """The value that a file gives for the argument `name`.

    Raises:
        ValueError: it does not fit; the message says what does, and repeats no variable's value.
    """

    def convert(value: Any) -> Any:
        # A variable holds text only, so that of a number is read as behind a flag.
        is_number = KINDS[name].type in (bool, int, float) and value != given
        is_word = is_number and isinstance(value, str)
        return _argument_value(name, literal(value) if is_word else value)

    return _without_secrets(convert, given)


def flag_value(name: str, words: list[str]) -> Any:
    """The value of the words behind the flag `name`; raises as `file_value`."""
    return _without_secrets(lambda value: _argument_value(name, _from_words(name, value)), words)


def _without_secrets(convert: Callable[[Any], Any], given: Any) -> Any:
    """What `convert` makes of `given` with its variables; of its complaints, those without them."""
    value = expanded(given)
    try:
        return convert(value)
    except ValueError as error:
        if value == given:
            raise
        reason = error
    try:
        convert(given)
    except ValueError as error:
        reason = error
    else:
        reason = ValueError(f"what the environment says for {shown(given)} does not fit")
    raise reason from None


def _argument_value(name: str, value: Any) -> Any:
    converted = _convert(KINDS[name], value)
    if name == "train_mixture":
        return _mixture(converted)
    return _validation_sets(converted) if name == "validation_sets" else converted


def expanded(value: Any) -> Any:
    """`value` with `${NAME}` replaced in its texts, and a ~/ at their start by the home folder.

    Raises:
        ValueError: a variable is not set, or a `${` names none; `$${` stands for `${`.
    """
    if isinstance(value, list):
        return [expanded(element) for element in value]
    if isinstance(value, dict):
        return {key: expanded(element) for key, element in value.items()}
    if not isinstance(value, str):
        return value
    known = {**os.environ, "PYTHON_STDLIB": sysconfig.get_path("stdlib")}

    def replace(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        if match[1] is None:
            raise ValueError(f"{shown(value)}: after ${{ stands no NAME}}; write $${{ for the text")
        if match[1] not in known:
            raise ValueError(f"{shown(value)}: set {match[1]} in the environment")
        return known[match[1]]

    text = VARIABLE.sub(replace, value)
    return os.path.expanduser(text) if text.startswith("~/") else text


def _from_words(name: str, words: list[str]) -> Any:
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
    return words[0] if kind.type is str else literal(words[0])


def _overrides(text: str) -> dict[str, Any]:
    """The changes that `{"n_layer": 6, "n_embd": 384}` or `n_layer=6,n_embd=384` names."""
    if text.lstrip().startswith("{"):
        return dict(plain(read_json(text)))
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ValueError(f"takes a JSON object or n_layer=6,n_embd=384, not {shown(text)}")
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {key} stands twice; keep one")
    return {key: literal(word) for key, word in pairs}


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
    converted = _parts(sources, kinds, '{"train_file": "folder", "weight": 1}')
    return {source: {"weight": 1.0} | settings for source, settings in converted.items()}


def _validation_sets(sets: dict[str, Any]) -> dict[str, Any]:
    """The sets of `validation_sets`; raises as `_mixture`."""
    kinds = {name: KINDS[name] for name in SET_ARGUMENTS}
    return _parts(sets, kinds, '{"validation_file": "math.jsonl"}')


def _parts(parts: dict[str, Any], kinds: dict[str, Kind], example: str) -> dict[str, Any]:
    """Parts of the data by their names, each with the settings of `kinds` that it has.

    Raises:
        ValueError: with the first that does not fit.
    """
    converted: dict[str, Any] = {}
    for source, settings in parts.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{source} takes an object like {example}, not {shown(settings)}")
        converted[source] = {}
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
    if kind.type in (bool, int, float) and type(value) is str and type(literal(value)) is not str:
        return "; write it without quotes"
    if kind.type is str and type(value) in (bool, int, float):
        return "; write it in quotes"
    if value == "":
        return "; give one, or leave the argument out"
    close = difflib.get_close_matches(str(value), kind.choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""
