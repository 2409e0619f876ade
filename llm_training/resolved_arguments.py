"""Resolved arguments written down, with their origins, so that they can be read and run again."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from arguments import GROUPS, Arguments, describe

BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
# In `Arguments.origins`, in front of the name of what the launcher decides: no argument.
LAUNCH = "launch."
# What a YAML file may not hold as it is, nor a terminal show.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def section_name(group: Any) -> str:
    """The name of a group in argument files: precision, for "precision and memory"."""
    return str(group._argument_group_name).split(" and ")[0]


def escaped(value: Any) -> Any:
    """`value` as a file must hold it: `$${` for the `${` with which a variable would begin."""
    if isinstance(value, list):
        return [escaped(element) for element in value]
    if isinstance(value, dict):
        return {key: escaped(element) for key, element in value.items()}
    return value.replace("${", "$${") if isinstance(value, str) else value


def as_settings(arguments: Arguments) -> dict[str, Any]:
    """All arguments as a JSON argument file holds them."""
    return dict(escaped(describe(arguments)))


def as_yaml(arguments: Arguments) -> str:
    """All arguments as a YAML argument file in sections, each with its origin as a comment.

    What the launcher decides stands at the end, as comments: it is no argument.
    """
    settings, origins = as_settings(arguments), arguments.origins
    lines = ["# Every argument and where it comes from: python train_llm.py THIS_FILE runs it."]
    for group in GROUPS:
        lines += ["", f"{section_name(group)}:"]
        for field in dataclasses.fields(group):
            line = f"  {field.name}: {_yaml(settings[field.name])}"
            origin = origins.get(field.name)
            if field.name in BATCH_SIZES and (origin or "").startswith("derived"):
                line = f"  # {line.strip()}"  # another number of processes derives another one
            lines.append(f"{line}  # {_printable(origin)}" if origin else line)
    launch = {name: text for name, text in origins.items() if name.startswith(LAUNCH)}
    if launch:
        lines += ["", "# Decided by the launch, which is no part of the arguments:"]
        for name, text in launch.items():
            lines.append(f"# {name.removeprefix(LAUNCH)}: {_printable(text)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value on one line, as JSON but for what YAML 1.1 would read otherwise."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_yaml(key)}: {_yaml(inner)}' for key, inner in value.items())}}}"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return re.sub(r"^(-?[0-9]+)e", r"\1.0e", text)  # 1e-08 would be text
    return _printable(text)


def _printable(text: str) -> str:
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
