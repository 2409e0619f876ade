"""Proves that frozen parameters and rates of their own train the curve of one process everywhere.

Backends put parameters into pieces and groups of their own, which frozen ones are no part of: what
is frozen keeps its bits, what is trained moves at its own rate, and a run goes on bit for bit under
its backend, as well under another, and as well when other parameters share a rate than before.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training.checkpoint_comparison import compare_checkpoints
from llm_training.model_state import StateForm
from llm_training.model_state.readers import read_weights
from tests.distributed import lora_worker
from tests.distributed.launching import environment_of, launch
from tests.distributed.resume_worker import run_case
from tests.distributed.test_lora import MODELS as SMALL_MODELS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(lora_worker.__file__)  # imported, so that `run_case` knows its action
# Two ranks share llama's heads (tensor parallelism).
MODELS = SMALL_MODELS | {"llama": SMALL_MODELS["llama"] | {"num_key_value_heads": 2}}
# Of GPT-2 the tied head as well, and one layer is frozen but for its biases.
FROZEN = {
    "gpt2": ["*.wte.*", "*.h.0.*", "!*.bias"],
    "llama": ["*.embed_tokens.*", "*.layers.0.mlp.*", "*.layers.1.*norm*"],
}
FACTORS: dict[str, dict[str, float]] = {
    "gpt2": {"*.attn.*": 0.25, "*.bias": 3},
    "llama": {"*.self_attn.*": 0.25, "lm_head.*": 3},
}
# Further groups of a rate that is the same but for less than the last bit.
REGROUPED = {
    "gpt2": {"*.h.1.mlp.*.weight": 1 + 1e-9, "*.ln_?.bias": 3 + 1e-9},
    "llama": {"*.layers.?.mlp.*": 1 + 1e-9, "*.q_proj.*": 0.25 + 1e-9},
}
# `full` is fsdp with the other kind of state dict.
BACKENDS = {
    "ddp": "gpt2",
    "fsdp": "llama",
    "full": "gpt2",
    "tp": "llama",
    "zero1": "gpt2",
    "zero2": "gpt2",
    "zero3": "llama",
}
ACROSS = [
    ("single-gpt2", "zero2"),
    ("zero2", "full"),
    ("full", "ddp"),
    ("ddp", "zero1"),
    ("zero3", "fsdp"),
    ("fsdp", "tp"),
    ("tp", "zero3"),
]
STOP, END = "step-00000002", "step-00000004"
# Muon multiplies in bf16, which makes more of the last bit of a gradient.
LOSS_BOUND, NORM_BOUND, MUON_NORM_BOUND = 1e-5, 1e-5, 3e-4


class Lab:
    """Collects cases, runs them, and keeps what they came to."""

    def __init__(self, folder: Path, text: Path):
        self.folder, self.text = folder, text
        self.cases: list[dict[str, Any]] = []
        self.records: dict[str, dict[str, Any]] = {}
        for kind, sizes in MODELS.items():
            torch.manual_seed(1)
            config = AutoConfig.for_model(kind, vocab_size=257, **sizes)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"base-{kind}")

    def add(
        self, name: str, backend: str, model: str, action: str, *frozen: str, **changes: Any
    ) -> None:
        settings = {
            "model_name_or_path": self.folder / f"base-{model}",
            "learning_rate_factors": json.dumps(FACTORS[model]),
            "train_file": self.text,
            "cache_dir": self.folder / "cache",
            "output_dir": self.folder / name,
            "dropout": 0.0,
            "tokenizer_name": "byte",
            "block_size": 32,
            "global_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "eval_steps": "null",
            "save_steps": 2,
            "save_total_limit": "null",
            "logging_steps": 1,
            "report_to": "none",
            "device": "cpu",
            "mixed_precision": "fp32",
            "num_threads": 1,
            **changes,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        words += ["--freeze_parameters", *(frozen or FROZEN[model])]
        env = {}
        if backend != "single":
            full = ("--fsdp_state_dict_type", "FULL_STATE_DICT") if backend == "full" else ()
            env = dict(environment_of("fsdp" if backend == "full" else backend, 2, full))
        self.cases.append({"name": name, "env": env, "action": action, "words": words})

    def run_here(self) -> None:
        cases, self.cases = self.cases, []
        self.records |= {case["name"]: run_case(case) for case in cases}

    def launch(self) -> None:
        """Runs the collected cases on two processes."""
        cases, output = self.folder / "cases.json", self.folder / "records.json"
        cases.write_text(json.dumps(self.cases))
        self.cases = []
        launch("ddp", WORKER, str(cases), str(output), timeout=400)
        self.records |= json.loads(output.read_text())

    def checkpoint(self, name: str, step: str = STOP) -> Path:
        return self.folder / name / "checkpoints" / step


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Lab:
    """Everything below is looked up in here."""
    lab = Lab(tmp_path_factory.mktemp("frozen"), text_folder)
    for model in MODELS:
        lab.add(f"single-{model}", "single", model, "finish")
    lab.add("single-muon", "single", "llama", "finish", optim="muon")
    lab.add("single-plain", "single", "gpt2", "finish", learning_rate_factors="{}")
    lab.run_here()
    lab.add("fsdp-muon", "fsdp", "llama", "finish", optim="muon")
    for backend, model in BACKENDS.items():
        lab.add(backend, backend, model, "finish")
        start = {"resume_from_checkpoint": lab.checkpoint(backend)}
        lab.add(f"{backend}-again", backend, model, "train", **start)
        start["learning_rate_factors"] = json.dumps(FACTORS[model] | REGROUPED[model])
        lab.add(f"{backend}-regrouped", backend, model, "train", **start)
    for source, target in ACROSS:
        start = {"resume_from_checkpoint": lab.checkpoint(source)}
        lab.add(f"{source}-{target}", target, BACKENDS[target], "train", **start)
    lab.launch()
    return lab


def assert_same_curve(
    record: dict[str, Any],
    reference: dict[str, Any],
    first: int = 1,
    norm_bound: float = NORM_BOUND,
) -> None:
    assert "refused" not in record, record
    for metric, bound in (("loss", LOSS_BOUND), ("grad_norm", norm_bound)):
        assert [int(step) for step in record[metric]] == list(range(first, 5))
        for step, value in record[metric].items():
            assert value == pytest.approx(reference[metric][step], rel=bound), (metric, step)


@pytest.mark.parametrize(("backend", "model"), BACKENDS.items())
def test_every_backend_trains_the_curve_of_one_process(backend: str, model: str, lab: Lab) -> None:
    reference = lab.records[f"single-{model}"]
    assert_same_curve(lab.records[backend], reference)
    losses = list(reference["loss"].values())
    assert losses[-1] < 0.99 * losses[0]  # the updates are large enough for others to show


def test_muon_trains_that_curve_with_matrices_in_parts(lab: Lab) -> None:
    reference = lab.records["single-muon"]
    assert_same_curve(lab.records["fsdp-muon"], reference, norm_bound=MUON_NORM_BOUND)


def test_the_bounds_show_rates_that_are_lost(lab: Lab) -> None:
    with pytest.raises(AssertionError):
        assert_same_curve(lab.records["single-plain"], lab.records["single-gpt2"])


@pytest.mark.parametrize("name", ["single-gpt2", "single-llama", *BACKENDS])
def test_exactly_what_is_frozen_keeps_its_bits(name: str, lab: Lab) -> None:
    model = BACKENDS.get(name, name.removeprefix("single-"))
    before = load_file(lab.folder / f"base-{model}" / "model.safetensors")
    frozen = {key for key in before if is_frozen(key, model)}
    assert 3 <= len(frozen) < len(before)
    assert {*before} - {*lab.records[name]["changed"]} == frozen
    final = load_file(lab.folder / name / "final" / "model.safetensors")
    assert final.keys() == before.keys()
    assert {key for key in before if torch.equal(before[key], final[key])} == frozen


def is_frozen(name: str, model: str) -> bool:
    fitting = [p for p in FROZEN[model] if fnmatchcase(name, p.removeprefix("!"))]
    return bool(fitting) and not fitting[-1].startswith("!")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_bit_for_bit(backend: str, lab: Lab) -> None:
    whole, again = lab.records[backend], lab.records[f"{backend}-again"]
    assert "refused" not in again, again
    for metric in ("loss", "grad_norm"):
        assert again[metric] == {step: whole[metric][step] for step in ("3", "4")}
    found = compare_checkpoints(
        lab.checkpoint(backend, END), lab.checkpoint(f"{backend}-again", END)
    )
    assert found.num_tensors > 20
    assert found.differences == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_find_their_parameters_when_others_share_a_rate(backend: str, lab: Lab) -> None:
    reference = lab.records[f"single-{BACKENDS[backend]}"]
    assert_same_curve(lab.records[f"{backend}-regrouped"], reference, first=3)


@pytest.mark.parametrize(("source", "target"), ACROSS)
def test_a_run_goes_on_under_another_backend(source: str, target: str, lab: Lab) -> None:
    reference = lab.records[f"single-{BACKENDS[target]}"]
    assert_same_curve(lab.records[f"{source}-{target}"], reference, first=3)


@pytest.mark.parametrize(("backend", "model"), BACKENDS.items())
def test_checkpoints_hold_what_is_trained_alone(backend: str, model: str, lab: Lab) -> None:
    folder = lab.checkpoint(backend, END)
    form = StateForm.of_manifest(json.loads((folder / "manifest.json").read_text("utf-8")))
    found = {name.removeprefix("model."): t for name, t in read_weights(folder, form).items()}
    final = load_file(lab.folder / backend / "final" / "model.safetensors")
    assert found.keys() == {name for name in final if not is_frozen(name, model)}
    assert all(torch.equal(found[name], final[name]) for name in found)
