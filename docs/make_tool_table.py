"""Write the tables of docs/other_tools.md from the names that the messages go by: `make docs`.

`--check` writes nothing and exits with 1 when the tables are not what the names say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_training.foreign_names import TOOLS, Tool

PAGE = Path(__file__).with_name("other_tools.md")
BEGIN = "<!-- tools: begin -->"
END = "<!-- tools: end -->"


def tool_tables() -> str:
    """The names of every tool in Markdown; those that mean the same share a line."""
    return "\n".join(_table(tool) for tool in TOOLS)


def _table(tool: Tool) -> str:
    rows: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for entry in tool.names:
        rows.setdefault((entry.ours, entry.note), []).append(f"`{entry.name}`")
    lines = [f"### {tool.title}", ""]
    if tool.base:
        lines += [f"And what {tool.base.title} has.", ""]
    lines += ["| there | here | how, or why not |", "|---|---|---|"]
    for (ours, note), names in rows.items():
        cells = (", ".join(names), ", ".join(f"`{name}`" for name in ours) or "-", note)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def with_tables(text: str, tables: str) -> str:
    """The page with the tables between its two markers.

    Raises:
        ValueError: the page does not have each marker once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN} and {END}, each once, in this order")
    return f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    check = parser.parse_args().check

    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old, tool_tables())
    if new == old:
        return 0
    if check:
        print(f"The tables of docs/{PAGE.name} are stale: run make docs", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    print(f"Wrote the tables of docs/{PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
