"""Under every backend, two processes measure what one does, group by group.

One process is started, and two, which get the environment of one backend after the other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equivalence import BACKENDS, MODELS, write_inputs
from tests.distributed.launching import environment_of, launch
from tests.metric_scripts import write_metric

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("evaluation_worker.py")
CASES = [
    *[(name, "gpt2", "false") for name in ("ddp", "fsdp", "zero3")],
    ("ddp", "gpt2", "true"),
    *[(name, "llama", "false") for name in ("tp", "cp")],
]
SINGLE = [("single", "gpt2", "false"), ("single", "gpt2", "true"), ("single", "llama", "false")]
# What does not depend on the order of positions: ranks that share rows hold them in another.
SCRIPT = """
pairs = list(zip(predictions, references))
return {
    "num_pairs": len(pairs),
    "agreement": sum(p == r for p, r in pairs) / len(pairs),
    "mean_square": sum((p - r) ** 2 for p, r in pairs) / len(pairs),
}
"""


def name_of(case: tuple[str, str, str]) -> str:
    return "-".join(case)


def run_cases(cases: list[tuple[str, str, str]], folder: Path) -> dict[str, Any]:
    """Launches once, and runs one case after the other."""
    (folder / "cases.json").write_text(json.dumps([described(c, folder) for c in cases]), "utf-8")
    output = folder / f"records-{cases[0][0]}.json"
    launch(cases[0][0], WORKER, str(folder / "cases.json"), str(output), timeout=280)
    found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    return found


def described(case: tuple[str, str, str], folder: Path) -> dict[str, Any]:
    backend, model, chunked = case
    settings = {
        "model_type": model,
        "config_overrides": json.dumps(MODELS[model]["config_overrides"]),
        "chunked_loss": chunked,
        "max_steps": 1,
        "warmup_steps": 0,
        "mixed_precision": "fp32",
        "eval_max_batches": 2,
        "per_device_eval_batch_size": 3,
        "output_dir": folder / name_of(case),
    }
    metrics = ["perplexity", "bits_per_byte", "token_accuracy", str(folder / "pairs.py")]
    words = [str(folder / "run.json"), *(f"--{name}={value}" for name, value in settings.items())]
    env = {} if backend == "single" else environment_of(BACKENDS[backend].config, 2)
    return {"name": name_of(case), "env": env, "words": [*words, "--eval_metrics", *metrics]}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run noted."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_inputs(folder)
    write_metric(folder / "pairs.py", SCRIPT.strip())
    return run_cases(SINGLE, folder) | run_cases(CASES, folder)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_processes_measure_what_one_does(
    case: tuple[str, str, str], records: dict[str, Any]
) -> None:
    found, expected = records[name_of(case)], records[name_of(("single", *case[1:]))]
    assert (found["active"], expected["active"]) == (BACKENDS[case[0]].active, "1 replicated")
    assert len(found["measured"]) == len(expected["measured"]) == 2
    for ours, theirs in zip(found["measured"], expected["measured"], strict=True):
        # A standard error is a small difference of large sums.
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(found["groups"], expected["groups"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert ours["same_on_all_ranks"]


def test_all_is_measured(records: dict[str, Any]) -> None:
    record = records[name_of(SINGLE[0])]
    own = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "token_accuracy")
    of_script = ("num_pairs", "agreement", "mean_square")
    for measured, groups in zip(record["measured"], record["groups"], strict=True):
        assert set(measured) == {f"eval/{name}" for name in (*own, *of_script)}
        assert measured["eval/num_pairs"] == sum(groups["tokens"])
        assert measured["eval/agreement"] == pytest.approx(measured["eval/token_accuracy"])
        assert 0 in groups["tokens"] and len(groups["tokens"]) > 8
        loss = math.fsum(groups["losses"]) / sum(groups["tokens"])
        assert measured["eval/loss"] == pytest.approx(loss)
