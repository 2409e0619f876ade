"""Which documents, or which part of each, are kept for validation: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from llm_training.data.sources import Document

TRAIN = "train"
VALIDATION = "validation"


@dataclass(frozen=True)
class Part:
    """A document, or a part of one, that belongs to one split.

    Attributes:
        completes_cut: this is the second part of a document that was cut in two.
    """

    split: str
    document: Document
    completes_cut: bool = False


def validation_share(percentage: float) -> Fraction:
    """The percentage as an exact share: 0.1 means a thousandth, not its binary neighbour."""
    return Fraction(str(percentage)) / 100


def is_validation(ordinal: int, share: Fraction) -> bool:
    """Whether document `ordinal` (from 0) is for validation; these are spread evenly."""
    before = ordinal * share.numerator // share.denominator
    after = (ordinal + 1) * share.numerator // share.denominator
    return after > before


def documents_needed(share: Fraction) -> int:
    """With fewer documents, whole ones would not give a fair validation share."""
    return 2 * math.ceil(1 / share)


def split_whole(documents: Iterable[Document], share: Fraction) -> Iterator[Part]:
    """Gives each document to one split, in order."""
    for ordinal, document in enumerate(documents):
        yield Part(VALIDATION if is_validation(ordinal, share) else TRAIN, document)


def split_within(documents: Iterable[Document], share: Fraction) -> Iterator[Part]:
    """Gives the end of every document to validation and the rest to training."""
    for document in documents:
        cut = cut_position(document.text, share)
        if cut < len(document.text):
            yield Part(TRAIN, _slice(document, 0, cut))
            yield Part(VALIDATION, _slice(document, cut, len(document.text)), completes_cut=True)
        else:
            yield Part(TRAIN, document)


def cut_position(text: str, share: Fraction) -> int:
    """Where the validation part of a text begins: a line start, if one is near enough.

    It is the first line start at or after the last `share` of the characters. Where no line starts
    there, the cut is made at that very character, so that one long line is split too. A text too
    short to give up a character is not cut: the length of the text.
    """
    target = len(text) - math.floor(len(text) * share)
    line_start = text.find("\n", max(target - 1, 0)) + 1
    return line_start if 0 < line_start < len(text) else target


def _slice(document: Document, start: int, stop: int) -> Document:
    text = document.text[start:stop]
    return Document(text, len(text.encode("utf-8")), document.file)
