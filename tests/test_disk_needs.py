"""Proves which bytes a run will leave, and that a disk without room for them is told of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from arguments import CheckpointArguments
from llm_training.disk_needs import DiskNeed, disk_problems, estimate_disk, free_disk


def estimate(total_steps: int | None = 100, **changes: Any) -> DiskNeed:
    arguments = CheckpointArguments(**({"save_steps": 10, "save_total_limit": 2} | changes))
    known: dict[str, Any] = {"backend": "single", "is_half": True}
    return estimate_disk(
        arguments, num_parameters=1000, optimizer_bytes=8000, total_steps=total_steps, **known
    )


@pytest.mark.parametrize(
    ("changes", "num_checkpoints", "models"),
    [
        ({}, 3, 1),  # two are kept, and a third is whole before the oldest goes
        ({"save_best": True}, 4, 2),
        ({"save_total_limit": None}, 10, 1),
        ({"save_total_limit": 20}, 10, 1),
        ({"save_steps": None}, 1, 1),
        ({"save_steps": 30, "save_total_limit": None}, 4, 1),  # at the end too
    ],
)
def test_what_is_kept(changes: dict[str, Any], num_checkpoints: int, models: int) -> None:
    need = estimate(**changes)
    assert (need.num_checkpoints, need.models) == (num_checkpoints, models * 4000)
    assert need.checkpoint == 12000
    assert need.output == num_checkpoints * 12000 + models * 4000


def test_deepspeed_saves_the_weights_that_compute_too() -> None:
    known: dict[str, Any] = {"num_parameters": 1000, "optimizer_bytes": 8000, "total_steps": 1}
    arguments = CheckpointArguments()
    for backend, is_half, size in [("zero2", True, 14), ("zero1", False, 16), ("zero3", True, 12)]:
        need = estimate_disk(arguments, backend=backend, is_half=is_half, **known)  # type: ignore[arg-type]
        assert need.checkpoint == size * 1000


def test_a_full_disk_is_told_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, cache = tmp_path / "not" / "yet", tmp_path
    assert list(disk_problems(estimate(), output, cache)) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000))
    (problem,) = disk_problems(estimate(), output, cache)
    assert "--save_total_limit" in problem and "--output_dir" in problem
    assert "30 kB are free" in problem
    assert free_disk(output) == 30_000
