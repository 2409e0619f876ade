"""Ranks whose clocks differ lay out one and the same run: that of rank 0's clock."""

import itertools
import json
from pathlib import Path

import pytest

from tests.distributed.launching import launch
from tests.small_runs import SETTINGS, TEXT

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("deadline_worker.py")


def test_two_ranks_end_together_though_their_clocks_do_not(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = {
        "train_file": str(tmp_path / "text.txt"),
        "cache_dir": str(tmp_path / "token_cache"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": None,
        "max_train_hours": 60 / 3600,
        "save_steps": 30,
        "lr_scheduler_type": "linear",
        "min_lr_ratio": 0.0,
    }
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS | settings))
    launch("ddp", WORKER, str(tmp_path / "run.json"), str(tmp_path / "rates"), timeout=200)
    first, second = (json.loads((tmp_path / f"rates-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert 58 <= len(first) <= 60
    assert all(a >= b for a, b in itertools.pairwise(first))
    assert first[-1] < first[0] / 10
