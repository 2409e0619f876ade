"""An output folder as a run leaves it, with a log of curves that a formula gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BEGAN = 1_764_500_000.0  # Unix seconds
TOKENS_PER_STEP = 1000
SECONDS_PER_STEP = 2.0
STDERR = 0.01

PROVENANCE = {
    "data_fingerprint": "631678f99870d2ccc275c2f449aaef6ea3694c2bce68f242603eab2a2b3a9f15",
    "validation_set_tokens": {"math": 7},
    "num_parameters": 3483904,
    "num_processes": 2,
    "device_name": "cpu",
    "precision": "bf16",
    "torch_version": "2.13.0",
    "git_revision": "78c5cf578572a8736a1bf494c92a10190f8f9aeb+changes",
}
LEDGER = {
    "documents": {
        "": {
            "splits": {
                "train": {"files": 3, "documents": 1723, "bytes": 30877455, "tokens": 9188599},
                "validation": {"files": 1, "documents": 35, "bytes": 634630, "tokens": 189216},
            },
            "left_out": {"empty files": {"count": 28, "bytes": 0, "names": ["a/secret_name.py"]}},
        }
    },
    "leakage": {
        "documents": 35,
        "tokens": 189216,
        "same_documents": 2,
        "overlapping_documents": 33,
        "overlapping_tokens": 20235,
    },
}


def loss_at(step: int, floor: float) -> float:
    return floor + 5.0 * math.exp(-step / 30)


def log_lines(num_steps: int = 100, floor: float = 3.0) -> list[dict[str, Any]]:
    """A line every tenth step, and at every fiftieth an evaluation on a line of its own."""
    lines: list[dict[str, Any]] = []
    for step in range(0, num_steps + 1, 10):
        time = BEGAN + SECONDS_PER_STEP * step
        if step:
            lines.append(
                {
                    "step": step,
                    "time": time,
                    "train/loss": loss_at(step, floor),
                    "train/grad_norm": 1.0 + 1 / step,
                    "train/learning_rate": 1e-3 * (1 - step / (2 * num_steps)),
                    "train/tokens": float(TOKENS_PER_STEP * step),
                    "perf/tokens_per_second": TOKENS_PER_STEP / SECONDS_PER_STEP,
                }
            )
        if step % 50 == 0:
            loss = loss_at(step, floor) + 0.1
            own = {"eval/loss": loss, "eval/loss_stderr": STDERR, "eval/perplexity": math.exp(loss)}
            of_math = {"eval/math/loss": loss - 1, "eval/math/loss_stderr": 2 * STDERR}
            lines.append({"step": step, "time": time, **own, **of_math})
    return lines


def write_log(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train_log.jsonl").write_text(text, encoding="utf-8")


def write_run(
    folder: Path,
    *,
    num_steps: int = 100,
    floor: float = 3.0,
    arguments: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """Writes what a run of that many steps leaves, without models; returns the folder."""
    write_log(folder, log_lines(num_steps, floor))
    named = {"run_name": folder.name, "output_dir": str(folder), "model_type": "gpt2"}
    files = {
        "arguments": named | {"max_steps": num_steps} | (arguments or {}),
        "provenance": PROVENANCE | (provenance or {}),
        "ledger": LEDGER,
        "result": {"step": num_steps, "stopped_early": False} if result is None else result,
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
