"""A rank that is killed in a save, or cannot write, costs no checkpoint and leaves none waiting.

Under every backend on two processes: a save is killed in the middle, the next start goes on from
what is whole, fails to save on one rank and then on the other, and saves in the end.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_training.checkpointing import find_checkpoint
from tests.distributed.launching import LaunchFailed, environment_of, launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("checkpoint_faults_worker.py")
# The rank that is killed, at which call to which file, and the step that is whole afterwards.
KILLS = {
    "ddp": ("0", "os.rename", "step-00000002.tmp", 1),  # all is written, but not in its place
    "fsdp": ("1", "open", "optimizer_0/__1_0.distcp", 1),
    "zero2": ("0", "os.rename", "step-00000001", 2),  # the new one is there, the old one too
}
# What each rank cannot write.
FAILURES = {
    "ddp": ("model.safetensors", "random_states_1.pkl"),
    "fsdp": ("pytorch_model_fsdp_0", "pytorch_model_fsdp_0"),
    "full": ("pytorch_model_fsdp.bin", "random_states_1.pkl"),
    "zero2": ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "zero3": tuple(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)),
    "tp": ("pytorch_model_fsdp_0", "pytorch_model_fsdp_0"),
}


def case(name: str, folder: Path, text: Path, action: str, *words: str) -> dict[str, Any]:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    values = {
        "model_type": "llama",
        "config_overrides": json.dumps(shape | heads),
        "train_file": text,
        "cache_dir": folder / "cache",
        "tokenizer_name": "byte",
        "block_size": 32,
        "global_batch_size": 4,
        "max_steps": 5,
        "eval_steps": "null",
        "save_total_limit": 1,
        "report_to": "none",
        "device": "cpu",
        "num_threads": 1,
        "mixed_precision": "fp32",
        "seed": 1,
        "output_dir": folder / name,
    }
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    full = ("--fsdp_state_dict_type", "FULL_STATE_DICT") if name == "full" else ()
    env = environment_of("fsdp" if name == "full" else name, 2, full)
    return {"name": name, "env": dict(env), "action": action, "words": [*flags, *words]}


def run_cases(folder: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    output = folder / "records.json"
    launch("ddp", WORKER, str(folder / "cases.json"), str(output), num_processes=2, timeout=300)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found_steps(lab: Path, text_folder: Path) -> dict[str, int]:
    """By backend, the step that is whole after the kill."""
    found = {}
    for name, (rank, event, file, _) in KILLS.items():
        with pytest.raises(LaunchFailed, match="exitcode  : -9"):
            run_cases(lab, [case(name, lab, text_folder, "killed", rank, event, file)])
        checkpoint, passed_over = find_checkpoint(lab / name / "checkpoints", "auto")
        assert checkpoint is not None and passed_over == []
        found[name] = checkpoint.step
    return found


@pytest.fixture(scope="module")
def records(lab: Path, text_folder: Path, found_steps: dict[str, int]) -> dict[str, dict[str, Any]]:
    return run_cases(lab, [case(name, lab, text_folder, "failing") for name in FAILURES])


@pytest.mark.parametrize("name", KILLS)
def test_after_a_kill_in_a_save_the_run_goes_on_from_what_is_whole(
    name: str, found_steps: dict[str, int], records: dict[str, dict[str, Any]]
) -> None:
    assert found_steps[name] == KILLS[name][-1]
    assert records[name]["resumed_step"] == found_steps[name]
    assert f"step-0000000{found_steps[name]}" in records[name]["before"]


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_cannot_write_all_say_so_at_once(
    name: str, records: dict[str, dict[str, Any]]
) -> None:
    step = records[name]["resumed_step"]
    whole = [entry for entry in records[name]["before"] if not entry.endswith(".tmp")]
    for rank, failure in enumerate(records[name]["failures"]):
        first, second = failure["said"]
        assert first == second
        problem = rf"rank {rank} could not write {re.escape(FAILURES[name][rank])}: "
        assert re.search(rf"step-0000000{step + 1} was not saved: {problem}", first)
        assert re.search(
            r"needs about [\d,]+ bytes, and [\d,]+ were free before it\. .*Free some", first
        )
        assert failure["seconds"] < 30
        assert failure["after"] == whole


@pytest.mark.parametrize("name", FAILURES)
def test_every_rank_finds_the_same_and_every_file_counts(
    name: str, records: dict[str, dict[str, Any]]
) -> None:
    record, step = records[name], records[name]["resumed_step"] + 1
    assert record["whole"] == [f"step-0000000{step}"] * 2
    assert len(record["flipped"]) > 4
    for file, (first, second) in record["flipped"].items():
        assert first == second
        assert re.search(
            rf"step-0000000{step}/{re.escape(file)} (is damaged|cannot be read)", first
        )
