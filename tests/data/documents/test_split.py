"""Proves the validation split: evenly spread, exact, and without loss where texts are cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from fractions import Fraction

import pytest

from llm_training.data.documents.sources import Document
from llm_training.data.documents.split import (
    TRAIN,
    VALIDATION,
    Part,
    count_documents,
    cut_position,
    documents_needed,
    is_validation,
    share_of_few,
    split_whole,
    split_within,
    validation_share,
)
from llm_training.data.errors import DataError


def documents(*texts: str) -> list[Document]:
    return [Document(text, len(text.encode()), "a.txt", "a.txt") for text in texts]


def in_pieces(text: str, ends: list[int]) -> list[Document]:
    """A text cut at `ends`, as one document."""
    cuts = sorted({0, *ends, len(text)})
    pieces = documents(*(text[start:stop] for start, stop in itertools.pairwise(cuts)))
    return [
        piece._replace(is_last=i == len(pieces), num_characters=len(text) if pieces[1:] else None)
        for i, piece in enumerate(pieces, 1)
    ]


def joined(parts: Iterable[Part]) -> list[tuple[str, str, int, bool]]:
    """(split, text, bytes, completes_cut) of each part of a document, its pieces together."""
    found = []
    pieces: list[Part] = []
    for part in parts:
        assert part.document.text
        pieces.append(part)
        assert part.split == pieces[0].split
        if part.document.is_last:
            text = "".join(piece.document.text for piece in pieces)
            num_bytes = sum(piece.document.num_bytes for piece in pieces)
            assert not any(piece.completes_cut for piece in pieces[:-1])
            found.append((part.split, text, num_bytes, part.completes_cut))
            pieces = []
    assert not pieces
    return found


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


@pytest.mark.parametrize("reach", [3, 10, 10_000])
@pytest.mark.parametrize("seed", range(25))
def test_a_document_in_pieces_is_cut_where_it_would_be_whole(
    monkeypatch: pytest.MonkeyPatch, seed: int, reach: int
) -> None:
    monkeypatch.setattr("llm_training.data.documents.split._REACH_CHARACTERS", reach)
    chance = random.Random(seed)
    texts = [
        "".join(
            chance.choices(
                ["ab", "é", "\n", "long" * 9], [6, 1, seed % 5, 1], k=chance.choice([1, 9, 99])
            )
        )
        for _ in range(6)
    ]
    pieces = [
        piece
        for text in texts
        for piece in in_pieces(text, chance.choices(range(1, len(text) + 1), k=chance.randrange(9)))
    ]
    for share in (Fraction(1, 20), Fraction(1, 3), Fraction(9, 10)):
        whole = joined(split_within(documents(*texts), share))
        assert joined(split_within(pieces, share)) == whole
        assert "".join(part[1] for part in whole) == "".join(texts)


def test_pieces_are_handed_on_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.documents.split._REACH_CHARACTERS", 4)
    pieces = in_pieces("x" * 100, list(range(5, 100, 5)))
    parts = list(split_within(pieces, Fraction(1, 2)))
    assert len(parts) == 20
    assert max(len(part.document.text) for part in parts) == 5


def test_pieces_of_a_document_go_to_one_split_and_count_once() -> None:
    given = [*documents("a", "b"), *in_pieces("abcdef", [2, 4]), *documents("c", "d")]
    parts = list(split_whole(given, Fraction(1, 3)))
    assert [part.document.text for part in parts if part.split == VALIDATION] == ["ab", "cd", "ef"]
    assert count_documents(given, 99) == 5
    assert count_documents(iter(given), 3) == 3


@pytest.mark.parametrize("num_documents", range(60))
def test_few_whole_documents_give_validation_one(num_documents: int) -> None:
    share = share_of_few(num_documents, Fraction(1, 20))
    chosen = [i for i in range(num_documents) if is_validation(i, share)]
    assert len(chosen) == (num_documents // 20 or num_documents >= 2)
    assert share_of_few(num_documents, Fraction(0)) == 0


def test_a_conversation_is_not_cut() -> None:
    [document] = documents("question answer")
    with pytest.raises(DataError, match=r"a.txt: a conversation cannot be cut"):
        list(split_within([document._replace(learned=((9, 15),))], Fraction(1, 5)))
