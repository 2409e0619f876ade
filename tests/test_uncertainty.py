"""Standard errors of mean losses are what repeated sampling finds; pairing makes them smaller."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_training.uncertainty import paired_difference, ratio_and_error


def test_a_case_by_hand() -> None:
    # Mean 12 / 6 = 2; residuals 3 - 2, 5 - 4, 4 - 6 = 1, 1, -2; sqrt(3 / 2 * 6) / 6 = 0.5.
    mean, error = ratio_and_error(np.array([3.0, 5.0, 4.0]), np.array([1, 2, 3]))
    assert (mean, error) == (2.0, pytest.approx(0.5))


def test_groups_of_one_size_have_the_error_of_a_plain_mean() -> None:
    losses = np.random.default_rng(0).normal(3, 1, 50)
    mean, error = ratio_and_error(losses * 7, np.full(50, 7))
    assert mean == pytest.approx(losses.mean())
    assert error == pytest.approx(losses.std(ddof=1) / math.sqrt(50))


def test_groups_without_a_token_say_nothing() -> None:
    expected = ratio_and_error(np.array([3.0, 5.0, 4.0]), np.array([1, 2, 3]))
    assert ratio_and_error(np.array([0, 3.0, 5.0, 0, 4.0]), np.array([0, 1, 2, 0, 3])) == expected


def test_less_than_two_groups_have_no_error() -> None:
    mean, error = ratio_and_error(np.array([6.0, 0.0]), np.array([3, 0]))
    assert mean == 2.0 and math.isnan(error)
    mean, error = ratio_and_error(np.zeros(2), np.zeros(2, np.int64))
    assert mean == 0.0 and math.isnan(error)


def test_equal_groups_have_no_error() -> None:
    assert ratio_and_error(np.array([2.0, 4.0, 6.0]), np.array([1, 2, 3])) == (2.0, 0.0)


def test_a_broken_loss_stays_broken() -> None:
    mean, error = ratio_and_error(np.array([math.nan, 1.0]), np.array([1, 1]))
    assert math.isnan(mean) and math.isnan(error)


def draw(generator: np.random.Generator, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups of unequal size, each of a hardness of its own."""
    counts = generator.integers(1, 200, num_groups)
    hardness = generator.gamma(4, 0.8, num_groups)
    return counts * hardness + generator.normal(0, np.sqrt(counts)), counts


def test_the_error_is_the_spread_of_repeated_samples() -> None:
    generator = np.random.default_rng(1)
    found = np.array([ratio_and_error(*draw(generator, 200)) for _ in range(2000)])
    spread = found[:, 0].std(ddof=1)
    assert found[:, 1].mean() == pytest.approx(spread, rel=0.05)
    # One that took tokens for independent observations would be several times too small.
    assert spread > 5 / math.sqrt(200 * 100)


def test_the_error_is_that_of_a_bootstrap() -> None:
    generator = np.random.default_rng(2)
    losses, counts = draw(generator, 300)
    drawn = generator.integers(0, 300, (3000, 300))
    means = losses[drawn].sum(1) / counts[drawn].sum(1)
    assert ratio_and_error(losses, counts)[1] == pytest.approx(means.std(ddof=1), rel=0.06)


def test_a_difference_of_the_same_groups_is_surer_than_either_loss() -> None:
    generator = np.random.default_rng(3)
    differences = []
    for _ in range(1000):
        before, counts = draw(generator, 200)
        now = before - 0.05 * counts + generator.normal(0, 0.1 * np.sqrt(counts))
        differences.append(paired_difference(now, before, counts))
    found = np.array(differences)
    assert found[:, 0].mean() == pytest.approx(-0.05, abs=1e-3)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(ddof=1), rel=0.08)
    assert found[:, 1].max() < ratio_and_error(before, counts)[1] / 20


def test_a_difference_has_its_sign_and_its_literal_error() -> None:
    now, before = np.array([2.0, 5.0, 7.0]), np.array([3.0, 5.0, 6.0])
    # Differences -1, 0, 1 of tokens 1, 1, 2: mean 0; sqrt(3 / 2 * 2) / 4.
    assert paired_difference(now, before, np.array([1, 1, 2])) == (0.0, math.sqrt(3) / 4)
    assert paired_difference(now - 4, before, np.array([1, 1, 2]))[0] == -3.0
    assert paired_difference(now, now, np.array([1, 1, 2])) == (0.0, 0.0)
