"""The proposed micro-batch fits and is the fastest that does; trials leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments, resolve_batch_sizes
from llm_training import batch_finder
from llm_training.argument_parsing import read_arguments
from llm_training.batch_finder import (
    USED_SHARE,
    Trial,
    find_batch_size,
    guilty_rank,
    memory_limit,
    memory_of,
    propose,
    search,
    trial_settings,
)
from tests.distributed.launching import ROOT, clean_environment
from tests.small_runs import SETTINGS, open_place, train_small

Speed = Callable[[int], float]

SPEEDS: dict[str, Speed] = {
    "the more the faster": lambda size: 1000.0 * size / (size + 8),
    "all the same": lambda size: 1000.0,
    "best in the middle": lambda size: 1000.0 * size / (size + 8) / (1 + (size / 24) ** 2),
    "the fewer the faster": lambda size: 1000.0 / size,
}
ROWS = (1, 2, 3, 7, 12, 16, 30, 60, 64, 97, 360, 512)


def try_all(rows: int, limit: float, speed: Speed) -> tuple[Trial | None, list[Trial]]:
    """A stand-in for real trials: a row takes one unit of memory, and the model half of one."""

    def try_size(size: int) -> Trial:
        ratio = (size + 0.5) / limit
        return Trial(size, ratio, ratio, speed(size) if ratio <= 1 else 0.0)

    trials = search(rows, try_size)
    return propose(trials), trials


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_proposal_is_the_fastest_that_fits(rows: int, speed: str) -> None:
    for limit in (0.5, 1.7, 2.9, 3.4, 5.0, 9.6, 14.0, 21.0, 33.0, 50.0, 77.0, 130.0, 600.0):
        best, trials = try_all(rows, limit, SPEEDS[speed])
        sizes = [trial.size for trial in trials]
        assert len(set(sizes)) == len(sizes) <= 16
        assert all(rows % size == 0 for size in sizes)
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n + 0.5 <= USED_SHARE * limit]
        if not fitting:
            assert best is None
            continue
        assert best is not None
        assert best.size in fitting
        fastest = max(map(SPEEDS[speed], fitting))
        if speed == "best in the middle":  # it looks at every second size or so there
            assert best.tokens_per_second >= 0.75 * fastest
        else:
            assert best.tokens_per_second >= 0.98 * fastest


def test_memory_is_not_wasted_on_nothing() -> None:
    best, _ = try_all(512, 200.0, lambda size: min(1000.0, 260.0 * size))
    assert best is not None
    assert best.size == 4


def test_few_trials_are_enough() -> None:
    _, trials = try_all(512, 70.0, SPEEDS["the more the faster"])
    assert [trial.size for trial in trials] == [8, 16, 32, 64]  # the last leaves no margin
    _, trials = try_all(512, 3.0, SPEEDS["the more the faster"])
    assert [trial.size for trial in trials] == [8, 4, 2, 1]  # the last: perhaps it is faster still


def test_a_trial_is_the_users_run_but_short(tmp_path: Path) -> None:
    arguments = Arguments(
        global_batch_size=64,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        warmup_steps=2000,
        max_train_hours=3.0,
        find_batch_size=True,
        sample_prompt=["a"],
        sample_validation_prompts=2,
        sample_steps=5,
    )
    settings = trial_settings(arguments, tmp_path / "run", 16)
    changed = {name: value for name, value in settings.items() if getattr(arguments, name) != value}
    assert changed == {
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "max_train_hours": None,
        "warmup_steps": 2, "logging_steps": 1, "report_to": ["none"], "sample_prompt": [],
        "sample_validation_prompts": 0, "sample_steps": None,
        "find_batch_size": False, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2, "save_steps": 2, "save_total_limit": 1, "eval_steps": 2,
        "eval_max_batches": 1, "leakage_report": False, "replica_check_steps": None,
    }  # fmt: skip
    short = Arguments(**settings)
    assert resolve_batch_sizes(short, 2).global_batch == 64


@pytest.mark.parametrize(
    ("codes", "words", "guilty"),
    [
        ({0: 1}, {0: "rank 0: the device has no memory left. CUDA out"}, None),
        ({0: -9}, {0: "step 1/3"}, None),
        ({0: 1}, {0: "the data makes not one row"}, 0),
        ({0: 1, 1: -9}, {0: "rank 0: another process ended in the", 1: ""}, None),
        ({0: -9, 1: 1}, {0: "waited for the other", 1: "KeyError: 3"}, 1),
        ({0: 1, 1: 1}, {0: "rank 0: another process ended in the", 1: "KeyError: 3"}, 1),
        ({0: 1, 1: 1}, {0: "another process ended in", 1: "another process ended in"}, 0),
        ({0: 1, 1: 1}, {0: "another process ended in", 1: "can't allocate memory"}, None),
    ],
)  # fmt: skip
def test_want_of_memory_is_told_from_other_faults(
    codes: dict[int, int], words: dict[int, str], guilty: int | None
) -> None:
    assert guilty_rank(codes, words) == guilty


def test_memory_is_read_at_its_peak() -> None:
    code = "x = bytearray(300_000_000); del x; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        peak = memory_of(batch_finder.psutil.Process(child.pid))
        child.communicate(b"\n")
    assert 300_000_000 < peak < 400_000_000


def test_a_container_has_less_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_finder, "CONTROL_GROUP", tmp_path)
    without = memory_limit()
    (tmp_path / "memory.max").write_text("1600000000\n")
    (tmp_path / "memory.current").write_text("500000000\n")
    assert memory_limit() == 1_100_000_000 - 2**29 < without
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_limit() == (1_100_000_000 - 2**29) // 2


# ------------------------------------------------------------------------------------ real trials

SMALL: dict[str, Any] = SETTINGS | {
    "global_batch_size": 2,
    "eval_steps": 2,
    "find_batch_size": True,
}


def test_a_real_search_ends_with_a_proposal_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_place(tmp_path, monkeypatch)
    (place / "run.json").write_text(json.dumps(SMALL | {"output_dir": "run"}))
    command = [sys.executable, str(ROOT / "train_llm.py"), "run.json"]
    ended = subprocess.run(
        command, env=clean_environment(), timeout=120, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert [line.split()[0] for line in said[:3]] == ["Finding", "Trial", "Trial"]
    assert all("tokens/s | 0." in line and "GiB = " in line for line in said[1:3])
    assert said[-2].startswith("--per_device_train_batch_size ")
    assert sorted(path.name for path in place.iterdir()) == ["run.json", "text.txt", "token_cache"]
    proposed = json.loads(f"{{{said[-1]}}}")
    assert proposed["per_device_train_batch_size"] * proposed["gradient_accumulation_steps"] == 2
    train_small(place, "run", **proposed, global_batch_size=2, max_steps=1)


def test_what_grows_too_large_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    (place / "run.json").write_text(json.dumps(SMALL | {"output_dir": str(place / "run")}))
    monkeypatch.setattr(batch_finder, "memory_limit", lambda: 50_000_000)
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    assert find_batch_size(read_arguments(["run.json"], 1)) == 1
    said = capsys.readouterr()
    assert "Trial    2 rows | do not fit" in said.out
    assert "Trial    1 rows | do not fit" in said.out
    assert "not one row fits" in said.err
    assert not list(place.glob("*.find_batch_size"))
