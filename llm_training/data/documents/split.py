"""Which documents, or which part of each, are kept for validation: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

from llm_training.data.documents.sources import Document
from llm_training.data.errors import DataError

TRAIN = "train"
VALIDATION = "validation"
# A document in pieces is held from its cut on for so long.
_REACH_CHARACTERS = 2**20


class Part(NamedTuple):
    """A document, or a part of one, that belongs to one split.

    Attributes:
        completes_cut: a document that was cut in two ends here. True once for each such document:
            on the (last piece of the) second part.
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


def share_of_few(num_documents: int, share: Fraction) -> Fraction:
    """The share that gives validation one of few whole documents, the last, in place of none.

    It is `share` itself where that gives one anyway, or where there are not two documents.
    """
    if share and num_documents >= 2 and num_documents * share < 1:
        return Fraction(1, num_documents)
    return share


def count_documents(documents: Iterable[Document], at_most: int) -> int:
    """How many documents there are, whole or in pieces; no more than `at_most` are looked at."""
    return sum(1 for _ in islice((d for d in documents if d.is_last), at_most))


@dataclass(frozen=True)
class Split:
    """How the documents of a source are divided.

    Attributes:
        share: what validation gets of them.
        within: whether every document is cut in two, as there are too few for whole ones.
    """

    share: Fraction
    within: bool = False

    def parts(self, documents: Iterable[Document]) -> Iterator[Part]:
        """Each document, or each of its two parts, with the split that it belongs to."""
        divide = split_within if self.within else split_whole
        return divide(documents, self.share)


def split_whole(documents: Iterable[Document], share: Fraction) -> Iterator[Part]:
    """Gives each document, with all its pieces, to one split, in order."""
    ordinal = 0
    for document in documents:
        yield Part(VALIDATION if is_validation(ordinal, share) else TRAIN, document)
        ordinal += document.is_last


def split_within(documents: Iterable[Document], share: Fraction) -> Iterator[Part]:
    """Gives the end of every document to validation and the rest to training.

    A document in pieces is cut at the same place as if it were whole.

    Raises:
        DataError: a document is a conversation, which has no meaning without its end.
    """
    documents = iter(documents)
    for document in documents:
        if document.learned is not None:
            raise DataError(
                f"{document.where}: a conversation cannot be cut for validation. Name a"
                " validation_file, or set validation_split_percentage to 0."
            )
        if document.num_characters is None:
            yield from _cut_whole(document, share)
        else:
            pieces = _pieces_from(document, documents)
            yield from _cut_pieces(pieces, share, document.num_characters)


def cut_position(text: str, share: Fraction) -> int:
    """Where the validation part of a text begins: a line start, if one is near enough.

    It is the first line start at or after the last `share` of the characters. Where none is within
    a million characters, the cut is made at that very character, so that one long line is split
    too. A text too short to give up a character is not cut: the length of the text.
    """
    return _line_start_near(text, _target(len(text), share), len(text))


def _target(num_characters: int, share: Fraction) -> int:
    return num_characters - math.floor(num_characters * share)


def _line_start_near(text: str, target: int, end: int) -> int:
    """The first line start in `text` from `target` (at least 1) on and before `end`; or `target`.

    `end` is where the document ends, which may be beyond the text.
    """
    line_start = text.find("\n", target - 1, target - 1 + _REACH_CHARACTERS) + 1
    return line_start if 0 < line_start < end else target


def _cut_whole(document: Document, share: Fraction) -> Iterator[Part]:
    cut = cut_position(document.text, share)
    if cut < len(document.text):
        yield Part(TRAIN, _with_text(document, document.text[:cut], is_last=True))
        rest = _with_text(document, document.text[cut:], is_last=True)
        yield Part(VALIDATION, rest, completes_cut=True)
    else:
        yield Part(TRAIN, document)


def _pieces_from(first: Document, following: Iterator[Document]) -> Iterator[Document]:
    """The pieces of one document, taken from `following` as they are asked for."""
    yield first
    while not first.is_last:
        first = next(following)
        yield first


def _cut_pieces(pieces: Iterator[Document], share: Fraction, num_characters: int) -> Iterator[Part]:
    target = _target(num_characters, share)
    # held: the pieces around the target, until it is known which line starts behind it.
    before, held, is_cut = 0, "", False
    for piece in pieces:
        if is_cut:
            yield Part(VALIDATION, piece, completes_cut=piece.is_last)
        elif target == num_characters or before + len(held + piece.text) < target:
            yield Part(TRAIN, piece)
            before += len(piece.text)
        else:
            held += piece.text
            if not piece.is_last and before + len(held) < target - 1 + _REACH_CHARACTERS:
                continue
            cut = _line_start_near(held, target - before, num_characters - before)
            yield Part(TRAIN, _with_text(piece, held[:cut], is_last=True))
            if rest := held[cut:]:
                document = _with_text(piece, rest, is_last=piece.is_last)
                yield Part(VALIDATION, document, completes_cut=piece.is_last)
            held, is_cut = "", True


def _with_text(document: Document, text: str, *, is_last: bool) -> Document:
    num_bytes = len(text.encode("utf-8"))
    return document._replace(text=text, num_bytes=num_bytes, is_last=is_last)
