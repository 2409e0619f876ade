"""Proves on a GPU that a run logs what its tensors held, and the GPU's load where its driver tells.

The second needs nvidia-ml-py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_training.system_metrics import HeldMemory, SystemMetrics

pytestmark = pytest.mark.gpu


def test_memory_is_what_tensors_held_at_most(gpu: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    large = torch.empty(64 * 2**20, dtype=torch.uint8, device=gpu)
    del large
    metrics = HeldMemory(torch.device(gpu)).read()
    assert metrics["perf/memory_bytes"] >= before + 64 * 2**20
    assert 0 < metrics["perf/memory_ratio"] < 1


def test_the_load_of_every_gpu_is_logged(gpu: str, tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    metrics = SystemMetrics(tmp_path).read()
    assert 0 <= metrics["system/gpu_0_utilization_percentage"] <= 100
    assert 0 < metrics["system/gpu_0_memory_usage_percentage"] <= 100
    assert metrics["system/gpu_0_memory_usage_megabytes"] > 0
