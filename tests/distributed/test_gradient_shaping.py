"""Under every backend, smoothed labels and noise on the embeddings do what they do elsewhere.

Two processes are started once and get the environment of one backend after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equivalence import BACKENDS, MODELS, largest_difference, write_inputs
from tests.distributed.launching import environment_of, launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # two launches in one test, on a busy machine
]

WORKER = Path(__file__).with_name("equivalence_worker.py")
SMOOTHED = {"label_smoothing_factor": 0.1}
NOISY = {"neftune_noise_alpha": 5.0}
# Backend, model, and whether the loss is computed in chunks. GPT-2's head is its embedding table,
# Llama's is a matrix of its own.
SMOOTHED_CASES = [
    ("ddp", "gpt2", False),
    ("fsdp", "gpt2", False),
    ("fsdp", "llama", True),
    ("zero2", "gpt2", True),
    ("zero3", "llama", False),
    ("tp", "llama", False),
    ("cp", "llama", True),
]
NOISY_CASES = [("fsdp", "gpt2"), ("zero2", "gpt2"), ("zero3", "gpt2")]
RESUMED = ["ddp", "zero3", "tp"]
CURVES = ("loss", "grad_norm", "eval_loss")
BOUND = 1e-5

Records = dict[str, dict[str, Any]]


def words_of(folder: Path, output: str, model: str, **settings: Any) -> list[str]:
    merged = {
        "model_type": model,
        "config_overrides": json.dumps(MODELS[model]["config_overrides"]),
        "adam_epsilon": 1e-2,  # beside a smaller one, rounding of tiny gradients grows
        "mixed_precision": "fp32",
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "output_dir": folder / output,
    } | settings
    return [str(folder / "run.json"), *(f"--{name}={value}" for name, value in merged.items())]


def runs_of_two() -> list[tuple[str, str, str, dict[str, Any]]]:
    """The name, backend, model and settings of each run on two processes."""
    runs: list[tuple[str, str, str, dict[str, Any]]] = []
    for backend, model, is_chunked in SMOOTHED_CASES:
        name = f"smoothed-{backend}-{model}-{is_chunked}"
        runs.append((name, backend, model, SMOOTHED | {"chunked_loss": is_chunked}))
    kinds = {"ddp": "gpt2", "tp": "llama", "cp": "llama"} | dict(NOISY_CASES)
    for backend, model in kinds.items():
        runs.append((f"noisy-{backend}", backend, model, NOISY))
    runs.append(("masked-ddp", "ddp", "llama", NOISY | {"document_mask": True}))
    runs.append(("masked-fsdp", "fsdp", "llama", NOISY | {"document_mask": True}))
    for backend in RESUMED:
        start = f"noisy-{backend}/checkpoints/step-00000002"
        runs.append((f"resumed-{backend}", backend, kinds[backend], NOISY | {"start": start}))
    return runs


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What each run noted, of one launch of two processes and one of a single one."""
    folder = tmp_path_factory.mktemp("gradient_shaping")
    write_inputs(folder)
    found: Records = {}
    cases = []
    for name, backend, model, settings in runs_of_two():
        how = dict(settings)
        if "start" in how:
            how["resume_from_checkpoint"] = folder / how.pop("start")
        launched = BACKENDS[backend]
        cases.append(
            {
                "name": name,
                "env": environment_of(launched.config, 2, launched.launcher_args),
                "words": words_of(folder, name, model, **how),
            }
        )
    alone = [
        {"name": name, "env": {}, "words": words_of(folder, name, model, **how)}
        for name, model, how in (
            *((f"plain-{model}", model, {}) for model in MODELS),
            *((f"smoothed-{model}", model, SMOOTHED) for model in MODELS),
            ("noisy-llama", "llama", NOISY),
        )
    ]
    for config, listed in (("single", alone), ("ddp", cases)):
        (folder / "cases.json").write_text(json.dumps(listed), "utf-8")
        output = folder / "records.json"
        launch(config, WORKER, str(folder / "cases.json"), str(output), timeout=500)
        found |= json.loads(output.read_text("utf-8"))
    assert [name for name, record in found.items() if "refused" in record] == []
    return found


def require_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for curve in CURVES:
        assert len(found[curve]) == len(expected[curve]) >= 2
        assert largest_difference(found[curve], expected[curve]) < BOUND, curve


@pytest.mark.parametrize(("backend", "model", "is_chunked"), SMOOTHED_CASES)
def test_smoothed_labels_train_the_curve_of_one_process(
    backend: str, model: str, is_chunked: bool, records: Records
) -> None:
    found, plain = records[f"smoothed-{backend}-{model}-{is_chunked}"], records[f"plain-{model}"]
    assert found["active"] == BACKENDS[backend].active
    require_equal(found, records[f"smoothed-{model}"])
    # The first loss is that of plain labels, the first gradient is not.
    assert largest_difference(found["loss"][:1], plain["loss"][:1]) < BOUND
    assert largest_difference(found["grad_norm"][:1], plain["grad_norm"][:1]) > 1e-2


@pytest.mark.parametrize(("backend", "model"), NOISY_CASES)
def test_ranks_draw_the_same_noise_under_every_backend(
    backend: str, model: str, records: Records
) -> None:
    found = records[f"noisy-{backend}"]
    assert found["active"] == BACKENDS[backend].active
    require_equal(found, records["noisy-ddp"])
    assert largest_difference(found["loss"], records[f"plain-{model}"]["loss"]) > 1e-3


def test_documents_of_a_row_have_the_same_noise_in_pieces_of_a_model(records: Records) -> None:
    require_equal(records["masked-fsdp"], records["masked-ddp"])


def test_ranks_that_hold_one_model_draw_the_noise_of_one_process(records: Records) -> None:
    require_equal(records["noisy-tp"], records["noisy-llama"])


def test_ranks_that_share_a_row_train_with_noise(records: Records) -> None:
    noisy, plain = records["noisy-cp"], records["plain-llama"]
    # Evaluated before the first step: the same model without noise.
    assert largest_difference(noisy["eval_loss"][:1], plain["eval_loss"][:1]) < BOUND
    assert 1e-5 < largest_difference(noisy["loss"], plain["loss"]) < 0.1


@pytest.mark.parametrize("backend", RESUMED)
def test_a_run_with_noise_goes_on_as_it_would_have(backend: str, records: Records) -> None:
    whole, resumed = records[f"noisy-{backend}"], records[f"resumed-{backend}"]
    for curve in ("loss", "grad_norm"):
        assert len(resumed[curve]) == 2 and resumed[curve] == whole[curve][2:]
