"""Proves the validation split: evenly spread, exact, and without loss where texts are cut."""

from __future__ import annotations

from fractions import Fraction

import pytest

from llm_training.data.sources import Document
from llm_training.data.split import (
    TRAIN,
    VALIDATION,
    cut_position,
    documents_needed,
    is_validation,
    split_whole,
    split_within,
    validation_share,
)


def documents(*texts: str) -> list[Document]:
    return [Document(text, len(text.encode()), "a.txt") for text in texts]


@pytest.mark.parametrize(
    ("percentage", "ordinals"),
    [
        (25.0, [3, 7, 11, 15, 19]),
        (10.0, [9, 19]),
        (40.0, [2, 4, 7, 9, 12, 14, 17, 19]),
        (0.0, []),
    ],
)
def test_whole_documents_are_spread_evenly(percentage: float, ordinals: list[int]) -> None:
    share = validation_share(percentage)
    assert [i for i in range(20) if is_validation(i, share)] == ordinals


def test_the_share_is_exact_for_any_number() -> None:
    share = validation_share(0.1)
    assert share == Fraction(1, 1000)
    assert sum(is_validation(i, share) for i in range(50_000)) == 50


def test_split_whole_keeps_every_document_in_order() -> None:
    texts = [f"text {i}" for i in range(8)]
    parts = list(split_whole(documents(*texts), Fraction(1, 4)))
    assert [part.document.text for part in parts] == texts
    assert [i for i, part in enumerate(parts) if part.split == VALIDATION] == [3, 7]


@pytest.mark.parametrize(("share", "needed"), [(Fraction(1, 20), 40), (Fraction(3, 10), 8)])
def test_documents_needed(share: Fraction, needed: int) -> None:
    assert documents_needed(share) == needed


@pytest.mark.parametrize(
    ("text", "position"),
    [
        # The target, 8 of 10 characters, is a line start itself.
        ("abc\nefg\nij", 8),
        # The next line start is at 9.
        ("abcdefgh\nj", 9),
        # No line starts after the target: the character.
        ("abc\nefghij", 8),
        ("abcdefghi\n", 8),
        # Too short to give up a fifth.
        ("abcd", 4),
    ],
)
def test_cut_position(text: str, position: int) -> None:
    assert cut_position(text, Fraction(1, 5)) == position


def test_split_within_loses_nothing() -> None:
    texts = ["line of é\n" * 30, "x", "one long line " * 20]
    parts = list(split_within(documents(*texts), Fraction(1, 10)))
    assert [part.split for part in parts] == [TRAIN, VALIDATION, TRAIN, TRAIN, VALIDATION]
    assert [part.completes_cut for part in parts] == [False, True, False, False, True]
    assert "".join(part.document.text for part in parts) == "".join(texts)
    assert all(p.document.num_bytes == len(p.document.text.encode()) for p in parts)
    assert parts[1].document.text == "line of é\n" * 3
