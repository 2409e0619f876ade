"""`--verify_resume` under a launcher: real kills of real ranks, and a verdict on the way back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, clean_environment, launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

TRAIN = ROOT / "train_llm.py"


@pytest.fixture
def settings(tmp_path: Path, text_folder: Path) -> str:
    values = {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 2, "n_embd": 48, "n_head": 2},
        "train_file": str(text_folder),
        "tokenizer_name": "byte",
        "block_size": 64,
        "global_batch_size": 16,
        "max_steps": 1000,
        "dropout": 0.1,
        "mixed_precision": "fp32",
        "device": "cpu",
        "num_threads": 1,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "token_cache"),
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    return str(tmp_path / "run.json")


def test_two_ranks_of_fsdp_are_killed_and_prove_it(settings: str, tmp_path: Path) -> None:
    ended = launch("fsdp", TRAIN, settings, "--verify_resume", "8", timeout=240)
    assert "Phase 3 of 4: continued, killed behind step 9, which is lost" in ended.stdout
    assert "Proven: 16 of 16 steps are equal, bit for bit, in eval/loss" in ended.stdout
    # Neither the user's own run nor anything of the proof is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "token_cache"]


def test_a_run_that_cannot_train_is_told_with_its_own_words(settings: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), settings, "--verify_resume", "8"]
    command += ["--block_size", "2000000"]
    env, options = clean_environment(), {"capture_output": True, "text": True}
    ended = subprocess.run(command, cwd=ROOT, env=env, timeout=120, check=False, **options)
    assert ended.returncode == 1
    assert "phase 1 failed; rank 0 ended with exit code 1" in ended.stderr
    assert "less than one row of 2000000" in ended.stderr
