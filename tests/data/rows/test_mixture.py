"""Proves that a mixture keeps its weights at every length, loses no row and needs no state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llm_training.data.errors import DataError
from llm_training.data.rows.mixture import WEIGHT_TOLERANCE, MixtureRows, block_shares
from llm_training.data.rows.store_rows import NO_ROW, StreamRows
from llm_training.data.tokens.token_store import TokenArray

SIZES = {"a": 10, "b": 25, "c": 4}
WEIGHTS = {"a": 3.0, "b": 2.0, "c": 1.0}


def make_mixture(weights: dict[str, float] | None = None) -> MixtureRows:
    rows, first = {}, 0
    for name, size in SIZES.items():
        rows[name] = StreamRows(TokenArray(np.arange(first, first + 2 * size, dtype=np.uint16)), 2)
        first += 2 * size
    return MixtureRows(rows, weights or WEIGHTS)


def source_of(row: int) -> str:
    return "a" if row < 10 else "b" if row < 35 else "c"


@pytest.mark.parametrize("start", [0, 6, 600])
def test_every_block_has_exactly_the_weights(start: int) -> None:
    rows = make_mixture().at(np.arange(start, start + 6), seed=5)
    assert Counter(source_of(row) for row in rows.tolist()) == {"a": 3, "b": 2, "c": 1}


def test_every_source_is_gone_through_before_it_begins_again() -> None:
    rows = make_mixture().at(np.arange(600), seed=5)
    for name, size in SIZES.items():
        seen = [row for row in rows.tolist() if source_of(row) == name]
        whole = len(seen) // size * size
        # Within a block the order is mixed, so an epoch may end a few samples apart.
        counts = Counter(seen[:whole])
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1


def test_an_order_is_a_function_of_seed_and_position_alone() -> None:
    mixture = make_mixture()
    whole = mixture.at(np.arange(1000), seed=5)
    parts = [make_mixture().at(np.arange(p, p + 8), seed=5) for p in range(0, 1000, 8)]
    assert whole.tolist() == np.concatenate(parts).tolist()
    assert whole.tolist() != mixture.at(np.arange(1000), seed=6).tolist()


def test_sources_are_not_shuffled_alike() -> None:
    rows = {name: StreamRows(TokenArray(np.zeros(40, np.uint16)), 2) for name in "ab"}
    order = MixtureRows(rows, {"a": 1, "b": 1}).at(np.arange(40), seed=1)
    first, second = ([row % 20 for row in order if row // 20 == k] for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_a_batch_holds_the_rows_that_its_numbers_name() -> None:
    batch = make_mixture().batch(np.array([0, 38, 10, NO_ROW]))
    assert batch["input_ids"].tolist() == [[0, 1], [76, 77], [20, 21], [0, 0]]
    assert batch["labels"][3].tolist() == [-100, -100]


def test_accounts_and_epochs_are_told_by_source() -> None:
    mixture = make_mixture()
    assert {name: account.rows for name, account in mixture.accounts().items()} == SIZES
    assert mixture.epochs(60) == {"a": 3.0, "b": 0.8, "c": 2.5}
    assert "b 33.3% = 0.80 epochs" in mixture.describe(60)
    assert mixture.marks != make_mixture({"a": 1, "b": 1, "c": 1}).marks


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([3, 2, 1], [3, 2, 1]),
        ([0.5, 0.5], [1, 1]),
        ([7.5, 2.5], [3, 1]),
        ([1, 0, 1], [1, 0, 1]),
        ([4], [1]),
    ],
)
def test_shares_are_the_smallest_that_keep_the_ratios(weights: list, shares: list) -> None:
    assert block_shares(weights) == shares


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1000], [1e-5, 1], [0.123, 0.456, 0.789]])
def test_weights_are_met_within_the_tolerance(weights: list[float]) -> None:
    shares = block_shares(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert share / sum(shares) == pytest.approx(weight / sum(weights), rel=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="make no mixture"):
        block_shares(weights)


def test_a_weight_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="too small"):
        block_shares([1e-9, 1])


def test_a_source_without_a_row_is_refused_unless_its_weight_is_0() -> None:
    rows = {"a": StreamRows(TokenArray(np.zeros(9, np.uint16)), 4)}
    rows["b"] = StreamRows(TokenArray(np.zeros(3, np.uint16)), 4)
    with pytest.raises(DataError, match="source 'b' has not one row of 4 tokens"):
        MixtureRows(rows, {"a": 1, "b": 1})
    assert set(MixtureRows(rows, {"a": 1, "b": 0}).at(np.arange(50), 0).tolist()) == {0, 1}
