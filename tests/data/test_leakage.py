"""Proves that what validation and training data share is found, counted and placed exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from llm_training.data import leakage
from llm_training.data.leakage import NGRAM, find_leakage
from llm_training.data.tokens.token_store import TokenArray

EOS = 0


def store(*documents: list[int]) -> TokenArray:
    tokens = [token for document in documents for token in [*document, EOS]]
    ends = np.cumsum([len(document) + 1 for document in documents])
    return TokenArray(np.array(tokens, np.uint16), ends.astype(np.uint64))


def runs(tokens: TokenArray) -> dict[tuple[int, ...], list[int]]:
    """Every run of 13 tokens within a document, without its end, and where it begins."""
    found: dict[tuple[int, ...], list[int]] = {}
    assert tokens.ends is not None
    for begin, end in pairwise([0, *tokens.ends.tolist()]):
        for place in range(begin, end - NGRAM):
            key = tuple(tokens.tokens[place : place + NGRAM].tolist())
            found.setdefault(key, []).append(place)
    return found


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60_000, count).tolist()


@pytest.mark.parametrize("chunk", [16, 50, 2**20])
@pytest.mark.parametrize("seed", range(6))
def test_overlaps_are_those_of_a_plain_search(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leakage, "_CHUNK_TOKENS", chunk)
    draw = np.random.default_rng(seed)
    # So few different tokens that runs meet by chance, inside and across documents.
    documents = [draw.integers(1, 3, draw.integers(1, 60)).tolist() for _ in range(40)]
    train, validation = store(*documents[:30]), store(*documents[30:], documents[3])
    in_train = runs(train)
    covered: set[int] = set()
    touched: set[int] = set()
    assert validation.ends is not None
    for key, places in runs(validation).items():
        if key in in_train:
            covered |= {place + i for place in places for i in range(NGRAM)}
            touched |= {int(np.searchsorted(validation.ends, p, "right")) for p in places}
    report = find_leakage([train], [validation], lambda tokens: None)
    assert report.overlapping_tokens == len(covered)
    assert report.overlapping_documents == len(touched)
    same = [document for document in [*documents[30:], documents[3]] if document in documents[:30]]
    assert report.same_documents == len(same)
    for example in report.examples:
        seen, met = (
            side.tokens[example[name] : example[name] + NGRAM].tolist()
            for side, name in ((validation, "validation"), (train, "train"))
        )
        assert seen == met


def test_short_documents_are_found_as_a_whole() -> None:
    report = find_leakage([store([1, 2], [3])], [store([3], [2, 1], [1, 2])], print)
    assert (report.documents, report.same_documents, report.overlapping_documents) == (3, 2, 0)


def test_places_are_counted_over_all_stores() -> None:
    shared = words(1, 20)
    train = [store(words(2, 50)), store([*words(3, 10), *shared, *words(4, 5)])]
    validation = [store(words(5, 30)), store([*words(6, 4), *shared])]
    report = find_leakage(train, validation, lambda tokens: None)
    assert report.examples == [{"validation": 31 + 4, "train": 51 + 10}]
    assert report.overlapping_tokens == 20
    assert "1 share 13 tokens in a row" in report.line()


def test_twelve_tokens_are_no_overlap() -> None:
    shared = words(1, NGRAM - 1)
    train = store([*words(2, 30), *shared, *words(3, 30)])
    report = find_leakage([train], [store([*words(4, 9), *shared])], lambda tokens: None)
    assert (report.overlapping_documents, report.examples) == (0, [])


def test_no_overlap_at_all() -> None:
    report = find_leakage([store(words(1, 500))], [store(words(2, 100))], lambda tokens: None)
    assert (report.tokens, report.overlapping_tokens, report.same_documents) == (101, 0, 0)


def test_much_validation_data_is_looked_at_in_part_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leakage, "_CHUNK_TOKENS", 32)
    monkeypatch.setattr(leakage, "MOST_VALIDATION_TOKENS", 64)
    validation = store(words(1, 40), words(2, 40), words(3, 40))
    report = find_leakage([store(words(2, 40))], [validation], lambda tokens: None)
    assert not report.is_complete
    assert report.tokens == 64
    assert "only the first 64 tokens looked at" in report.line()


def test_without_borders_runs_alone_are_compared() -> None:
    tokens: NDArray[np.uint16] = np.array(words(1, 40), np.uint16)
    report = find_leakage([TokenArray(tokens)], [TokenArray(tokens[5:25])], lambda tokens: None)
    assert (report.documents, report.overlapping_tokens) == (0, 20)
    assert report.examples[0] == {"validation": 0, "train": 5}


def test_no_validation_data_gives_an_empty_report() -> None:
    assert find_leakage([store([1, 2])], [], print).documents == 0
