"""The arguments explained: what `--help` prints, and the tables of the README."""

from __future__ import annotations

import dataclasses
import json

from arguments import GROUPS, KINDS, Arguments, describe

USAGE = """\
python train_llm.py [FILE ...] [--name value ...]
       python train_llm.py train_configs/quickstart.json --learning_rate 1e-3
       python train_llm.py --from_run runs/quickstart
       python train_llm.py --convert FOREIGN_FILE [--convert_to FILE.json]
       accelerate launch --config_file accelerate_configs/NAME.yaml train_llm.py FILE.json
"""
RULES = """\
Files are JSON, YAML (.yaml, .yml) or TOML (.toml); names stand alone or in sections called as the
groups below. Flags win over files, and later files over earlier ones. --name alone means true and
--no_name false; null empties what may be null; ${NAME} in a text is the environment's NAME, $${ the
text ${, and ~/ at its start the home folder.
"""


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
