"""Two checkpoints count as equal only where every bit is, and what differs is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from llm_training.checkpoint_comparison import compare_checkpoints


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A checkpoint that has a file of every kind; `changes` replace what is in it."""
    values = {
        "weight": torch.tensor([1.0, 0.0, float("nan")]),
        "moment": torch.ones(2, 2),
        "shard": torch.arange(4.0),
        "rate": 0.1,
        "flat": torch.ones(3, dtype=torch.bfloat16),
        "scale": 2.0,
        "drawn": np.arange(3, dtype=np.uint32),
        "sample_hash": "ab",
        "written": 1,
    } | changes
    (folder / "zero").mkdir(parents=True)
    save_file({"wte": values["weight"]}, folder / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": values["moment"]}}}, folder / "optimizer.bin")
    scaler = SimpleNamespace(cur_scale=values["scale"])
    torch.save({"parts": [values["flat"]], "scaler": scaler}, folder / "zero" / "rank_0.pt")
    torch.save({"numpy": ("MT19937", values["drawn"])}, folder / "random_states_0.pkl")
    shards = {"model.w": values["shard"], "groups": {"lr": values["rate"]}}
    with pytest.warns(UserWarning):
        dcp.save(shards, checkpoint_id=folder / "optimizer_0", no_dist=True)
    (folder / "train_state.json").write_text(json.dumps({"sample_hash": values["sample_hash"]}))
    (folder / "manifest.json").write_text(json.dumps({"written": values["written"]}))
    return folder


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "original")


def test_equal_checkpoints_have_no_differences(original: Path, tmp_path: Path) -> None:
    # The manifest also tells when and where; a NaN equals itself.
    twin = write_checkpoint(tmp_path / "twin", written=2)
    assert compare_checkpoints(original, twin) == (5, [])


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"weight": torch.tensor([1.0, 0.5, float("nan")])},
            "model.safetensors: wte: 1 of 3 numbers differ, the largest absolute difference is 0.5",
        ),
        (
            {"weight": torch.tensor([1.0, -0.0, float("nan")])},
            "model.safetensors: wte: 1 of 3 numbers differ, the largest absolute difference is 0",
        ),
        (
            {"moment": torch.tensor([[1.0, 1.0], [1.0, 1.25]])},
            "optimizer.bin: state.0.exp_avg: 1 of 4 numbers differ, the largest absolute"
            " difference is 0.25",
        ),
        (
            {"moment": torch.ones(4)},
            "optimizer.bin: state.0.exp_avg: torch.float32 (2, 2) and torch.float32 (4,)",
        ),
        (
            {"shard": torch.tensor([0.0, 1.0, 2.0, 3.5])},
            "optimizer_0: model.w: 1 of 4 numbers differ, the largest absolute difference is 0.5",
        ),
        ({"rate": 0.2}, "optimizer_0: groups.lr: 0.1 and 0.2"),
        (
            {"flat": torch.tensor([1, 1, 3], dtype=torch.bfloat16)},
            "zero/rank_0.pt: parts.0: 1 of 3 numbers differ, the largest absolute difference is 2",
        ),
        ({"scale": 4.0}, "zero/rank_0.pt: scaler.cur_scale: 2.0 and 4.0"),
        (
            {"drawn": np.array([0, 1, 7], dtype=np.uint32)},
            "random_states_0.pkl: numpy.1: 1 of 3 numbers differ, the largest absolute difference"
            " is 5",
        ),
        ({"sample_hash": "cd"}, "train_state.json: sample_hash: 'ab' and 'cd'"),
    ],
)
def test_a_difference_is_named(
    original: Path, tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    compared = compare_checkpoints(original, write_checkpoint(tmp_path / "changed", **changes))
    assert compared.num_tensors == 5
    (found,) = compared.differences
    assert found == difference


def test_what_only_one_of_them_has_is_named(original: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    (other / "optimizer.bin").unlink()
    (other / "random_states_1.pkl").write_bytes(pickle.dumps(0))
    save_file({"wpe": torch.ones(1)}, other / "model.safetensors")
    assert compare_checkpoints(original, other).differences == [
        "model.safetensors: wpe: only in one of the two",
        "model.safetensors: wte: only in one of the two",
        f"optimizer.bin: missing in {other}",
        f"random_states_1.pkl: missing in {original}",
    ]
