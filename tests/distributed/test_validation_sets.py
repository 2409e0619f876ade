"""Two ranks judge every validation set, and stop by one of them, as one process does."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, launch
from tests.small_runs import SETTINGS, TEXT, read_log, train_small

pytestmark = pytest.mark.distributed

METRICS = ("eval/loss", "eval/sums/loss", "eval/sums/loss_stderr", "eval/names/bits_per_byte")


def test_two_ranks_stop_where_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "text": TEXT,
        "sums": "".join(f"{i} + {i} = {2 * i}\n" for i in range(80)),
        "names": "".join(f"Name {i} of many, and none is known.\n" for i in range(30)),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    sets = {name: {"validation_file": str(tmp_path / f"{name}.txt")} for name in ("sums", "names")}
    settings = {
        "train_file": str(tmp_path / "text.txt"),
        "cache_dir": str(tmp_path / "token_cache"),
        "validation_sets": sets,
        "metric_for_best_model": "eval/sums/loss",
        "early_stopping_patience": 2,
        "early_stopping_min_delta": 2.0,
        "early_stopping_min_delta_unit": "standard_errors",
        "dropout": 0.0,
        "max_steps": 20,
        "eval_steps": 2,
        "save_steps": None,
        "learning_rate": 0.1,  # so high that the loss soon rises again
        "lr_scheduler_type": "constant",
    }
    one = train_small(tmp_path, "one", **settings)
    output = {"output_dir": str(tmp_path / "two")}
    (tmp_path / "two.json").write_text(json.dumps(SETTINGS | settings | output))
    launch("ddp", ROOT / "train_llm.py", str(tmp_path / "two.json"), timeout=200)

    logs = [
        [line for line in read_log(run) if "eval/loss" in line] for run in (one, tmp_path / "two")
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert 2 < logs[0][-1]["step"] < 20
    for alone, together in zip(*logs, strict=True):
        for name in METRICS:
            assert together[name] == pytest.approx(alone[name], rel=1e-4)
    # From the untrained weights on, before rounding has had steps to grow in.
    for name in METRICS:
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=1e-6)
    results = [json.loads((run / "result.json").read_text()) for run in (one, tmp_path / "two")]
    assert results[0]["best"]["step"] == results[1]["best"]["step"]
    assert all(result["stopped_early"] for result in results)
