"""Write the README's table of arguments from the arguments themselves: `make docs`.

`--check` writes nothing and exits with 1 when the table is not what the arguments say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_training.argument_help import argument_table

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- arguments: begin -->"
END = "<!-- arguments: end -->"


def with_table(text: str, table: str) -> str:
    """Returns the page with the table between its two markers.

    Raises:
        ValueError: the page does not have each marker once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, each once, in this order")
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    check = parser.parse_args().check

    old = README.read_text(encoding="utf-8")
    new = with_table(old, argument_table())
    if new == old:
        return 0
    if check:
        print("README.md's table of arguments is stale: run make docs", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    print("Wrote the table of arguments into README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
