"""Whole runs of the script in the process of a test, on a text of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train_llm
from llm_training.argument_parsing import read_arguments

TEXT = "".join(f"Die {i}. Größe ist {i * i} m, 漢字.\n" for i in range(60))
SETTINGS: dict[str, Any] = {
    "model_type": "gpt2",
    "config_overrides": {"n_layer": 1, "n_embd": 16, "n_head": 2},
    "dropout": 0.1,
    "train_file": "text.txt",
    "tokenizer_name": "byte",
    "block_size": 32,
    "global_batch_size": 4,
    "max_steps": 4,
    "eval_steps": None,
    "save_steps": 1,
    "save_total_limit": None,
    "logging_steps": 1,
    "mixed_precision": "fp32",
    "num_threads": 1,
    "report_to": "none",
    "device": "cpu",
}


def open_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `folder` the working folder, with a text that is not plain ASCII."""
    monkeypatch.chdir(folder)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def train_small(place: Path, name: str = "run", code: int = 0, **changes: Any) -> Path:
    """Runs the script with some settings changed; returns the folder of the run."""
    Path("settings.json").write_text(
        json.dumps(SETTINGS | {"output_dir": name} | changes), encoding="utf-8"
    )
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert train_llm.main(read_arguments(["settings.json"], 1)) == code
    return place / name


def read_log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(folder: Path) -> list[dict[str, float]]:
    """What must be equal: every logged number that is not a time."""
    return [
        {name: value for name, value in line.items() if name != "time" and "perf/" not in name}
        for line in read_log(folder)
    ]


def weights(folder: Path) -> dict[str, list[Any]]:
    tensors = load_file(folder / "final" / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}
