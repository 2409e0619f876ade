"""Proves that adapters train the curve of one process under every backend but tensor parallelism.

Only they are in the checkpoints, from which a run goes on bit for bit under its backend and as well
under another; the base keeps its bits; and every backend writes the same adapter, which is opened
again and compared before it counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training.checkpoint_comparison import compare_checkpoints
from llm_training.hardware_checks import is_installed
from llm_training.lora import adapter_tensors
from llm_training.model_state import StateForm
from llm_training.model_state.readers import read_weights
from tests.distributed import lora_worker
from tests.distributed.launching import environment_of, launch
from tests.distributed.resume_worker import run_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(lora_worker.__file__)  # imported, so that `run_case` knows its action
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    },
    # Of odd sizes, tied, and with its matrices stored the other way round.
    "gpt2": {"n_layer": 2, "n_embd": 33, "n_head": 3, "n_positions": 32},
}
# `full` is fsdp with the other kind of state dict. Of llama the head is trained whole.
BACKENDS = {
    "ddp": "gpt2",
    "fsdp": "llama",
    "full": "gpt2",
    "cp": "llama",
    "zero1": "gpt2",
    "zero2": "gpt2",
    "zero3": "llama",
}
# With frozen matrices in bfloat16.
HALVED = ["ddp", "fsdp", "full", "zero2", "zero3"]
ACROSS = [
    ("single-gpt2", "zero2"),
    ("zero2", "full"),
    ("full", "ddp"),
    ("zero3", "fsdp"),
    ("fsdp", "zero3"),
]
WEIGHT_FILES = (".safetensors", ".bin", ".pt")
TOLERANCE_BF16 = 1e-2
STOP, END = "step-00000002", "step-00000004"


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

    def add(self, name: str, backend: str, model: str, action: str, **changes: Any) -> None:
        settings = {
            "model_name_or_path": self.folder / f"base-{model}",
            "lora_rank": 3,
            "lora_modules_to_save": "lm_head" if model == "llama" else "null",
            "use_dora": model == "gpt2",
            "train_file": self.text,
            "cache_dir": self.folder / "cache",
            "output_dir": self.folder / name,
            "dropout": 0.0,
            "tokenizer_name": "byte",
            "block_size": 32,
            "global_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
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
    lab = Lab(tmp_path_factory.mktemp("lora"), text_folder)
    for model in MODELS:
        lab.add(f"single-{model}", "single", model, "finish")
        half = {"frozen_dtype": "bfloat16", "mixed_precision": "bf16", "use_dora": False}
        lab.add(f"single-half-{model}", "single", model, "train", **half)
    if is_installed("bitsandbytes"):
        lab.add("single-nf4", "single", "gpt2", "train", frozen_dtype="nf4", use_dora=False)
    lab.run_here()
    for backend, model in BACKENDS.items():
        lab.add(backend, backend, model, "finish", gradient_accumulation_steps=2)
        if backend != "cp":
            again = {"resume_from_checkpoint": lab.checkpoint(backend)}
            lab.add(
                f"{backend}-again",
                backend,
                model,
                "train",
                gradient_accumulation_steps=2,
                **again,
            )
    for source, target in ACROSS:
        start = lab.checkpoint(source)
        lab.add(
            f"{source}-{target}", target, BACKENDS[target], "train", resume_from_checkpoint=start
        )
    add_frozen_dtypes(lab)
    lab.launch()
    return lab


def add_frozen_dtypes(lab: Lab) -> None:
    """Runs with frozen matrices in bfloat16 beside such in float32, and in 4 bits."""
    settings: dict[str, Any] = {"mixed_precision": "bf16", "use_dora": False}
    for name, dtype in (("whole", "float32"), ("half", "bfloat16")):
        for backend in HALVED:
            model = BACKENDS[backend]
            lab.add(f"{backend}-{name}", backend, model, "train", frozen_dtype=dtype, **settings)
    start = lab.checkpoint("fsdp-half")
    again: dict[str, Any] = {"frozen_dtype": "bfloat16", "resume_from_checkpoint": start}
    lab.add("fsdp-half-again", "fsdp", "llama", "finish", **settings, **again)
    if is_installed("bitsandbytes"):
        lab.add("ddp-nf4", "ddp", "gpt2", "train", frozen_dtype="nf4", use_dora=False)


def assert_same_curve(
    record: dict[str, Any],
    reference: dict[str, Any],
    first: int = 1,
    *,
    tolerance: float = 2e-5,
) -> None:
    assert "refused" not in record, record
    for metric in ("loss", "grad_norm"):
        assert [int(step) for step in record[metric]] == list(range(first, 5))
        for step, value in record[metric].items():
            assert value == pytest.approx(reference[metric][step], rel=tolerance), (metric, step)


@pytest.mark.parametrize(("backend", "model"), BACKENDS.items())
def test_every_backend_trains_the_curve_of_one_process(backend: str, model: str, lab: Lab) -> None:
    reference = lab.records[f"single-{model}"]
    assert_same_curve(lab.records[backend], reference)
    losses = list(reference["loss"].values())
    assert losses[-1] < 0.99 * losses[0]  # the updates are large enough for others to show


@pytest.mark.parametrize("name", ["single-gpt2", "single-llama", *BACKENDS])
def test_the_base_keeps_its_bits(name: str, lab: Lab) -> None:
    record, is_llama = lab.records[name], BACKENDS.get(name, name).endswith("llama")
    assert record["changed"] == (["lm_head.weight"] if is_llama else [])
    assert record["num_moved"] == (14 if is_llama else 8)


@pytest.mark.parametrize(("backend", "model"), BACKENDS.items())
def test_every_backend_writes_the_same_adapter(backend: str, model: str, lab: Lab) -> None:
    found, expected = (
        load_file(lab.folder / name / "final" / "adapter_model.safetensors")
        for name in (backend, f"single-{model}")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "cp"])
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


@pytest.mark.parametrize(("source", "target"), ACROSS)
def test_a_run_goes_on_under_another_backend(source: str, target: str, lab: Lab) -> None:
    reference = lab.records[f"single-{BACKENDS[target]}"]
    assert_same_curve(lab.records[f"{source}-{target}"], reference, first=3)


@pytest.mark.parametrize(("backend", "model"), BACKENDS.items())
def test_checkpoints_hold_what_is_trained_alone(backend: str, model: str, lab: Lab) -> None:
    folder = lab.checkpoint(backend, END)
    form = StateForm.of_manifest(json.loads((folder / "manifest.json").read_text("utf-8")))
    found = adapter_tensors(
        {name.removeprefix("model."): t for name, t in read_weights(folder, form).items()}
    )
    # The head of GPT-2 is tied, and not trained: a library may name it a second time.
    expected = load_file(lab.folder / backend / "final" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if form.layout != "sharded":  # whose many small pieces have a header each
        num_bytes = sum(tensor.nbytes for tensor in expected.values())
        files = [path for path in folder.rglob("*") if path.suffix in WEIGHT_FILES]
        base = (lab.folder / f"base-{model}" / "model.safetensors").stat().st_size
        assert 3 * num_bytes <= sum(path.stat().st_size for path in files) < 4 * num_bytes + base


@pytest.mark.parametrize("backend", HALVED)
def test_frozen_matrices_in_bfloat16_change_no_bit_of_a_curve(backend: str, lab: Lab) -> None:
    half, whole = lab.records[f"{backend}-half"], lab.records[f"{backend}-whole"]
    assert "refused" not in half, half
    assert half == whole
    found = compare_checkpoints(
        lab.checkpoint(f"{backend}-half", END), lab.checkpoint(f"{backend}-whole", END)
    )
    assert found.num_tensors > 20
    assert found.differences == []


@pytest.mark.parametrize("backend", HALVED)
def test_with_them_the_curve_is_that_of_one_process(backend: str, lab: Lab) -> None:
    """Within what bf16 leaves of it: sharding backends round norms and embeddings too."""
    reference = lab.records[f"single-half-{BACKENDS[backend]}"]
    assert_same_curve(lab.records[f"{backend}-half"], reference, tolerance=TOLERANCE_BF16)


def test_with_them_a_run_in_pieces_goes_on_bit_for_bit(lab: Lab) -> None:
    whole, again = lab.records["fsdp-half"], lab.records["fsdp-half-again"]
    assert "refused" not in again, again
    assert again["loss"] == {step: whole["loss"][step] for step in ("3", "4")}
    assert (again["num_half"], again["num_moved"]) == (14, 14)
    assert lab.records["fsdp"]["num_half"] == 0


@pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")
def test_beside_4_bits_the_curve_is_that_of_one_process(lab: Lab) -> None:
    assert_same_curve(lab.records["ddp-nf4"], lab.records["single-nf4"])
