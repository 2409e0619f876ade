"""The device of the tests in this folder: a GPU, or another one to try out the tests themselves.

python -m pytest -m gpu                                 # on a machine with a GPU
GPU_TESTS_DEVICE=cpu python -m pytest -m gpu tests/gpu/test_runs.py    # do they work at all?
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    """What `--device` takes; without a GPU, and without the variable, the test is left out."""
    chosen = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return chosen


@pytest.fixture
def gpu(device: str) -> str:
    """For tests that mean nothing elsewhere."""
    if device != "cuda":
        pytest.skip("it is about a CUDA device")
    return device
