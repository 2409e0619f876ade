"""Under every backend, a padded vocabulary changes neither curve nor model, and checkpoints go on.

Two processes are started once and get the environment of one backend after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.equivalence import BACKENDS, MODELS, largest_difference, write_inputs
from tests.distributed.launching import environment_of, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("vocab_padding_worker.py")
NUM_TOKENS = 257  # of the byte tokenizer
MULTIPLE = 64
# GPT-2's head is its embedding table, Llama's is a matrix of its own.
CASES = [
    ("ddp", "gpt2"),
    ("fsdp", "gpt2"),
    ("fsdp", "llama"),
    ("zero3", "gpt2"),
    ("zero3", "llama"),
]
# Whose checkpoint each continues.
CONTINUED = {"ddp": "zero3", "fsdp": "fsdp", "zero3": "fsdp"}
SHARDED = ("fsdp", "zero3")
CURVES = ("loss", "grad_norm", "eval_loss")
BOUND = 2e-6


def words_of(folder: Path, output: str, model: str, **settings: Any) -> list[str]:
    shared: dict[str, Any] = {
        "model_type": model,
        "config_overrides": json.dumps(MODELS[model]["config_overrides"]),
    }
    if "model_name_or_path" in settings:
        shared = {}
    shared |= {
        "adam_epsilon": 1e-2,  # beside a smaller one, rounding of tiny gradients grows
        "gradient_accumulation_steps": 2,
        "mixed_precision": "fp32",
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 9,
        "chunked_loss": model == "gpt2",
        "output_dir": folder / output,
    }
    merged = shared | settings
    return [str(folder / "run.json"), *(f"--{name}={value}" for name, value in merged.items())]


def cases_of(folder: Path) -> list[dict[str, Any]]:
    """First the runs that others continue or load."""
    runs: list[tuple[str, str, str, dict[str, Any]]] = []
    for backend, model in CASES:
        for multiple in (1, MULTIPLE):
            settings = {"pad_vocab_to_multiple_of": multiple}
            runs.append((f"{backend}-{model}-{multiple}", backend, model, settings))
    for backend, model in CASES:
        source = folder / f"{CONTINUED[backend]}-{model}-{MULTIPLE}/checkpoints/step-00000002"
        settings = {"pad_vocab_to_multiple_of": MULTIPLE, "resume_from_checkpoint": source}
        runs.append((f"{backend}-{model}-resumed", backend, model, settings))
    for backend in SHARDED:
        for multiple in (1, MULTIPLE):
            settings = {"pad_vocab_to_multiple_of": multiple}
            # ZeRO-3 cuts weights while it loads them.
            loaded = settings | {"model_name_or_path": folder / "fsdp-gpt2-1/final"}
            runs.append((f"{backend}-loaded-{multiple}", backend, "gpt2", loaded))
            in_16_bits = settings | {"mixed_precision": "bf16"}
            runs.append((f"{backend}-bf16-{multiple}", backend, "llama", in_16_bits))
    runs.append(("tp", "tp", "llama", {"pad_vocab_to_multiple_of": MULTIPLE}))
    return [
        {
            "name": name,
            "env": environment_of(BACKENDS[backend].config, 2, BACKENDS[backend].launcher_args),
            "words": words_of(folder, name, model, **settings),
        }
        for name, backend, model, settings in runs
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all runs left, of one launch, and `records.json` of what each noted."""
    folder = tmp_path_factory.mktemp("vocab_padding")
    write_inputs(folder)
    (folder / "cases.json").write_text(json.dumps(cases_of(folder)), "utf-8")
    output = folder / "records.json"
    launch("ddp", WORKER, str(folder / "cases.json"), str(output), timeout=280)
    return folder


def record(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "records.json").read_text("utf-8"))[name]
    assert "refused" not in found, found
    return found


@pytest.mark.parametrize(("backend", "model"), [*CASES, *((name, "loaded") for name in SHARDED)])
def test_curve_and_model_are_those_without_padding(backend: str, model: str, folder: Path) -> None:
    names = [f"{backend}-{model}-{multiple}" for multiple in (1, MULTIPLE)]
    plain, padded = (record(folder, name) for name in names)
    assert padded["active"] == plain["active"] == BACKENDS[backend].active
    for curve in CURVES:
        assert len(padded[curve]) == len(plain[curve]) >= 2
        assert largest_difference(padded[curve], plain[curve]) < BOUND, curve
    expected, found = (load_file(folder / name / "final/model.safetensors") for name in names)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
    texts = [(folder / name / "final/config.json").read_text("utf-8") for name in names]
    assert texts[0] == texts[1] and json.loads(texts[1])["vocab_size"] == NUM_TOKENS


@pytest.mark.parametrize("backend", SHARDED)
def test_the_curve_holds_in_16_bits_too(backend: str, folder: Path) -> None:
    plain, padded = (record(folder, f"{backend}-bf16-{multiple}") for multiple in (1, MULTIPLE))
    for curve in CURVES:
        assert largest_difference(padded[curve], plain[curve]) < 5e-3, curve


@pytest.mark.parametrize(("backend", "model"), CASES)
def test_a_padded_checkpoint_goes_on(backend: str, model: str, folder: Path) -> None:
    expected = record(folder, f"{CONTINUED[backend]}-{model}-{MULTIPLE}")
    found = record(folder, f"{backend}-{model}-resumed")
    for curve in ("loss", "grad_norm"):
        assert len(found[curve]) == 2
        assert largest_difference(found[curve], expected[curve][2:]) < 1e-5, curve


def test_a_head_that_ranks_share_is_refused(folder: Path) -> None:
    said = json.loads((folder / "records.json").read_text("utf-8"))["tp"]["refused"]
    assert said.startswith("ModelError: --pad_vocab_to_multiple_of 64: 2 ranks share the head")
