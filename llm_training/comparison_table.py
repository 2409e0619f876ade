"""A table for the terminal with a column for each run, as wide as the terminal and no wider."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

GAP = "  "
MAX_LABEL = 34
MIN_COLUMN, MAX_COLUMN = 16, 44
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
KEPT_IN_FRONT = 5  # characters of what long values have in common, before they begin to differ


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        label: what it is about.
        cells: a text for each run; empty where the line is a heading or a remark.
    """

    label: str
    cells: Sequence[str] = ()


def table_lines(names: Sequence[str], rows: Iterable[Row], width: int) -> list[str]:
    """The table in lines of at most `width` characters.

    Runs that do not fit side by side stand below each other, in as many tables as it takes. Values
    that are too long are cut, so that the place where they differ stays in sight.
    """
    rows = list(rows)
    label_width = min(MAX_LABEL, max(len(row.label) for row in rows))
    room = max(width - label_width, MIN_COLUMN + len(GAP))
    at_once = max(1, min(len(names), room // (MIN_COLUMN + len(GAP))))
    lines: list[str] = []
    for first in range(0, len(names), at_once):
        last = min(first + at_once, len(names))
        widest = min(MAX_COLUMN, room // (last - first) - len(GAP))
        lines += [""] * bool(lines)
        lines += _block([Row("", list(names)), *rows], slice(first, last), label_width, widest)
    return lines


def _block(rows: Sequence[Row], shown: slice, label_width: int, widest: int) -> Iterator[str]:
    """One table of the runs that fit side by side."""
    cells = [cut_alike(row.cells, widest)[shown] for row in rows]
    columns = range(max(map(len, cells)))
    widths = [max(len(own[i]) for own in cells if own) for i in columns]
    for row, own in zip(rows, cells, strict=True):
        if not own:
            yield row.label  # a heading may be wider than its column
            continue
        label = cut(row.label, label_width).ljust(label_width)
        texts = [text.ljust(width) for text, width in zip(own, widths, strict=True)]
        yield GAP.join([label, *texts]).rstrip()


def cut_alike(texts: Sequence[str], width: int) -> list[str]:
    """Texts of at most `width` characters, cut so that those which differ still do if they can."""
    plain = [" ".join(text.split()) for text in texts]
    result = [cut(text, width) for text in plain]
    if len(set(result)) == len(set(plain)):
        return result
    common = _common_length([text for text in plain if len(text) > width])
    skipped = max(0, common - KEPT_IN_FRONT)
    return [
        cut(ELLIPSIS + text[skipped:], width) if skipped and len(text) > width else cut(text, width)
        for text in plain
    ]


def _common_length(texts: Sequence[str]) -> int:
    """Of how many characters the texts are the same from the start."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + ELLIPSIS
