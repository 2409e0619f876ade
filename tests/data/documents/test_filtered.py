"""Proves that short and repeated documents are left out, each counted once, before any split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from llm_training.data.documents.filtered import FilteredSource
from llm_training.data.documents.sources import Document
from llm_training.data.documents.split import split_whole
from llm_training.data.ledger import Ledger


@dataclass
class Listed:
    """A source of the documents that it is given."""

    given: list[Document]

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        return iter(self.given)

    def key(self) -> Any:
        return "listed"

    def num_bytes(self) -> int:
        return 7


def listed(*texts: str) -> Listed:
    return Listed(
        [Document(text, len(text.encode()), None, f"row {i}") for i, text in enumerate(texts, 1)]
    )


def in_pieces(where: str, *texts: str) -> list[Document]:
    total = sum(map(len, texts))
    return [
        Document(text, len(text), None, where, text is texts[-1], num_characters=total)
        for text in texts
    ]


def test_short_documents_are_counted_and_named() -> None:
    ledger = Ledger()
    source = FilteredSource(listed("äöü", "abcd", "ab", "abcde"), min_document_characters=4)
    assert [document.text for document in source.documents(ledger)] == ["abcd", "abcde"]
    assert ledger.left_out["documents under 4 characters"].names == ["row 1", "row 3"]


def test_a_text_is_given_once_and_again_in_the_next_pass() -> None:
    source = FilteredSource(listed("a", "b", "a", "a ", "b"), drop_duplicates=True)
    for _ in range(2):
        ledger = Ledger()
        assert [document.text for document in source.documents(ledger)] == ["a", "b", "a "]
        assert ledger.left_out["duplicates"].names == ["row 3", "row 5"]


def test_pieces_are_exempt_from_duplicates_and_count_as_one_document() -> None:
    given = [*in_pieces("a.txt", "xy", "z"), *in_pieces("b.txt", "xy", "z"), *listed("xy").given]
    assert list(FilteredSource(Listed(given), drop_duplicates=True).documents(Ledger())) == given
    ledger = Ledger()
    source = FilteredSource(Listed(given), min_document_characters=4)
    assert list(source.documents(ledger)) == []
    assert ledger.left_out["documents under 4 characters"].names == ["a.txt", "b.txt", "row 1"]
    assert ledger.left_out["documents under 4 characters"].bytes == 3 + 3 + 2
    assert (
        list(FilteredSource(Listed(given), min_document_characters=3).documents(Ledger()))
        == given[:-1]
    )


def test_no_validation_document_is_a_training_document() -> None:
    source = FilteredSource(listed(*(f"text {i % 7}" for i in range(60))), drop_duplicates=True)
    texts: dict[str, set[str]] = {"train": set(), "validation": set()}
    for part in split_whole(source.documents(Ledger()), Fraction(1, 3)):
        texts[part.split].add(part.document.text)
    assert len(texts["train"]) == 5
    assert len(texts["validation"]) == 2
    assert not texts["train"] & texts["validation"]


def test_the_key_follows_the_settings() -> None:
    source = listed("a")
    keys = [
        FilteredSource(source, n, drop).key()
        for n, drop in ((0, False), (2, False), (3, False), (3, True))
    ]
    assert all(keys.count(key) == 1 for key in keys)
    assert FilteredSource(source).num_bytes() == 7
