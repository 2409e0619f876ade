"""Proves that memory is counted from birth to end, without taking it or a random number."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn

from llm_training.traced_memory import Outline, Passes, TracedBytes, TraceError

WIDTH = 64


class Chain(nn.Module):
    """Two matrices and nothing else; each token is a row of ones."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width))
        self.second = nn.Parameter(torch.randn(width, width))

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        ones = torch.ones(input_ids.numel(), self.first.shape[0])
        return (ones @ self.first @ self.second).sum(), None


class Curious(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return torch.ones(int(input_ids.sum())), None


def test_peaks_are_those_counted_by_hand() -> None:
    rows = 4 * WIDTH * 10  # bytes of a matrix (10, WIDTH)
    matrix = 4 * WIDTH**2
    traced = Outline(Chain).trace(Passes(2, 5))
    # Input, its product and, on the way back, the gradient of that product; 2 numbers of 4 bytes.
    assert traced.activations == pytest.approx(3 * rows + matrix, abs=32)
    assert traced.with_gradients == pytest.approx(2 * rows + 2 * matrix + rows, abs=rows + 32)
    forward = Outline(Chain).trace(Passes(2, 5, is_training=False))
    assert forward == TracedBytes(forward.activations, forward.activations)
    assert forward.activations == pytest.approx(3 * rows, abs=rows + 32)


def test_nothing_is_taken() -> None:
    before, generator = psutil.Process().memory_info().rss, torch.get_rng_state()
    outline = Outline(lambda: Chain(50_000))  # twice 10 GB
    assert outline.trace(Passes(1, 1)).with_gradients > 2e10
    assert psutil.Process().memory_info().rss - before < 5e8
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_that_reads_its_tensors_is_told() -> None:
    with pytest.raises(TraceError, match="DataDependent"):
        Outline(Curious).trace(Passes(1, 1))


def test_tensors_in_16_bits_are_half_as_large() -> None:
    outline = Outline(Chain)
    whole = outline.trace(Passes(100, 100, is_training=False))
    half = outline.trace(
        Passes(100, 100, half=torch.bfloat16, weights_are_half=True, is_training=False)
    )
    assert half.activations < 0.9 * whole.activations
