"""Under every backend, a run whose loss is computed in chunks has the curve of one without.

Two processes are started once and get the environment of one backend after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equivalence import BACKENDS, MODELS, largest_difference, write_inputs
from tests.distributed.launching import environment_of, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("chunked_loss_worker.py")
NUM_STEPS = 4
NUM_LOSSES = NUM_STEPS * 2 + 2 * 2  # a window is two micro-batches; two evaluations of two batches
# GPT-2's head is its embedding table, Llama's is a matrix of its own.
CASES = [
    *[(name, "gpt2", "fp32") for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")],
    *[(name, "llama", "fp32") for name in ("fsdp", "zero3", "cp")],
    *[(name, "gpt2", "bf16") for name in ("ddp", "fsdp", "zero2", "zero3")],
]
BOUNDS = {"fp32": 1e-5, "bf16": 5e-3}
CURVES = ("loss", "grad_norm", "eval_loss")


def words_of(model: str, precision: str, chunked: str, folder: Path, output: str) -> list[str]:
    settings = {
        "model_type": model,
        "config_overrides": json.dumps(MODELS[model]["config_overrides"]),
        "adam_epsilon": MODELS[model]["adam_epsilon"],
        "gradient_accumulation_steps": 2,
        "mixed_precision": precision,
        "max_steps": NUM_STEPS,
        "chunked_loss": chunked,
        "output_dir": folder / output,
    }
    return [str(folder / "run.json"), *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run noted, all of one launch."""
    folder = tmp_path_factory.mktemp("chunked_loss")
    write_inputs(folder)
    cases = [
        {
            "name": f"{backend} {model} {precision} {chunked}",
            "env": environment_of(BACKENDS[backend].config, 2, BACKENDS[backend].launcher_args),
            "words": words_of(
                model, precision, chunked, folder, f"{backend}-{model}-{precision}-{chunked}"
            ),
        }
        for backend, model, precision in [*CASES, ("tp", "llama", "fp32")]
        for chunked in ("false", "true")
    ]
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    output = folder / "records.json"
    launch("ddp", WORKER, str(folder / "cases.json"), str(output), timeout=280)
    found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    return found


@pytest.mark.parametrize(("backend", "model", "precision"), CASES)
def test_the_curve_is_that_of_whole_logits(
    backend: str, model: str, precision: str, records: dict[str, Any]
) -> None:
    plain, chunked = (records[f"{backend} {model} {precision} {c}"] for c in ("false", "true"))
    assert plain["active"] == chunked["active"] == BACKENDS[backend].active
    assert plain["chunked"] == 0 and chunked["chunked"] >= NUM_LOSSES
    for curve in CURVES:
        assert len(plain[curve]) == len(chunked[curve]) >= 2
        assert largest_difference(chunked[curve], plain[curve]) < BOUNDS[precision], curve


def test_a_head_that_ranks_share_is_refused(records: dict[str, Any]) -> None:
    assert "refused" not in records["tp llama fp32 false"]
    said = records["tp llama fp32 true"]["refused"]
    assert said.startswith("ModelError: --chunked_loss true: 2 ranks share the head")
