"""However the model is split over processes, a run speaks as that of one process does.

Two processes are started once and get the environment of one backend after the other. A person asks
for a sample in mid-run too: a rank that did not take part in it would leave the others waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training.samples import Sample, read_samples
from tests.distributed.launching import environment_of, launch
from tests.distributed.resume_worker import run_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

BACKENDS = ("ddp", "fsdp", "zero3", "tp")
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # else one letter is said all the time
}
SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "config_overrides": json.dumps(MODEL),
    "tokenizer_name": "byte",
    "block_size": 32,
    "global_batch_size": 4,
    "max_steps": 5,
    "learning_rate": 1e-2,
    "eval_steps": 5,
    "save_steps": "null",
    "dropout": 0.0,
    "mixed_precision": "fp32",
    "num_threads": 1,
    "device": "cpu",
    "report_to": "none",
    "sample_steps": 2,
    "sample_validation_prompts": 1,
    "sample_max_new_tokens": 8,
    "sample_temperature": 0.5,
}
PROMPTS = ("def ", "a longer beginning of a text")


def case(folder: Path, text: Path, backend: str) -> dict[str, Any]:
    """A run with a person who asks for a sample at its first step."""
    (folder / backend).mkdir()
    (folder / backend / "SAMPLE").touch()
    words = ["--train_file", str(text), "--cache_dir", str(folder / "cache")]
    words += ["--output_dir", str(folder / backend), "--sample_prompt", *PROMPTS]
    words += [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    env = {} if backend == "single" else dict(environment_of(backend, 2))
    return {"name": backend, "env": env, "action": "run_wholly", "words": words}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> dict[str, Any]:
    """What each backend's run left in samples.jsonl and in its result, and the console of all."""
    folder = tmp_path_factory.mktemp("samples")
    run_case(case(folder, text_folder, "single"))
    backends = (*BACKENDS, "cp")
    cases, output = folder / "cases.json", folder / "records.json"
    cases.write_text(json.dumps([case(folder, text_folder, backend) for backend in backends]))
    worker = Path(__file__).with_name("resume_worker.py")
    ended = launch("ddp", worker, str(cases), str(output), num_processes=2)
    assert json.loads(output.read_text()) == {backend: {} for backend in backends}
    found: dict[str, Any] = {
        backend: read_samples(folder / backend / "samples.jsonl")
        for backend in ("single", *backends)
    }
    for backend in ("single", *backends):
        result = json.loads((folder / backend / "result.json").read_text("utf-8"))
        assert [Sample(**one) for one in result["samples"]] == found[backend][-6:]
    return found | {"console": ended.stdout}


def test_one_process_says_something(said: dict[str, Any]) -> None:
    samples = said["single"]
    kinds = [kind for _ in range(3) for kind in ("greedy", "sampled")]
    assert [(s.step, s.kind) for s in samples] == [(n, k) for n in (0, 1, 2, 4, 5) for k in kinds]
    assert len({s.text for s in samples}) > 15
    assert sorted({s.prompt for s in samples if s.prompt in PROMPTS}) == sorted(PROMPTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_says_the_same(said: dict[str, Any], backend: str) -> None:
    assert said[backend] == said["single"]


def test_where_rows_are_shared_the_model_speaks_at_the_end(said: dict[str, Any]) -> None:
    assert said["cp"] == said["single"][-6:]
    assert "SAMPLE: the ranks share the positions of a row (context parallelism)" in said["console"]
