"""`--find_batch_size` under a launcher: each rank starts its child, and all try the same sizes."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, launch
from tests.small_runs import SETTINGS, TEXT

pytestmark = pytest.mark.distributed


def test_two_ranks_find_one_micro_batch(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = {
        "train_file": str(tmp_path / "text.txt"),
        "cache_dir": str(tmp_path / "token_cache"),
        "output_dir": str(tmp_path / "run"),
        "global_batch_size": 2,
        "find_batch_size": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS | settings))
    ended = launch("ddp", ROOT / "train_llm.py", str(tmp_path / "run.json"), timeout=200)
    assert "Finding  a micro-batch for 1 rows of each process in a step" in ended.stdout
    assert ended.stdout.count("Trial    1 rows | ") == 1
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 1\n" in ended.stdout
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["run.json", "text.txt", "token_cache"]
