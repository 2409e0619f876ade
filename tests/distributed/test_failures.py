"""A rank that dies or hangs ends the run within a bounded time, and the next start resumes."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, launch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("failing_worker.py")
# torchrun gives a process this long to end by itself before it kills it.
LAUNCHERS_PATIENCE = 30


def settings_in(folder: Path, text_folder: Path) -> list[str]:
    """A run of 8 steps with a checkpoint every third, as words for the script."""
    values = {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 1, "n_embd": 16, "n_head": 2},
        "train_file": str(text_folder),
        "tokenizer_name": "byte",
        "block_size": 32,
        "global_batch_size": 8,
        "max_steps": 8,
        "eval_steps": None,
        "save_steps": 3,
        "logging_steps": 1,
        "dropout": 0.0,
        "mixed_precision": "fp32",
        "report_to": ["none"],
        "device": "cpu",
        "cache_dir": str(folder / "token_cache"),
    }
    (folder / "run.json").write_text(json.dumps(values))
    return [str(folder / "run.json"), "--output_dir", str(folder / "run")]


@pytest.fixture
def settings(text_folder: Path, tmp_path: Path) -> list[str]:
    return settings_in(tmp_path, text_folder)


@pytest.fixture(scope="module", autouse=True)
def hung(
    text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[tuple[subprocess.CompletedProcess, float]]]:
    """A launch with a rank that hangs; it mostly waits, so it does so beside the other tests."""
    words = settings_in(tmp_path_factory.mktemp("hung"), text_folder)

    def hang() -> tuple[subprocess.CompletedProcess, float]:
        ended = fail("fsdp", "hang", 2, 1, *words, "--ddp_timeout", "20")
        return ended, seconds_since_fault(ended)

    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(hang)


def fail(config: str, fault: str, step: int, rank: int, *args: str) -> subprocess.CompletedProcess:
    return launch(config, WORKER, fault, str(step), str(rank), *args, check=False, timeout=150)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def seconds_since_fault(ended: subprocess.CompletedProcess) -> float:
    return time.time() - float(re.findall(r"fault at ([\d.]+)", ended.stdout)[0])


def test_after_a_kill_the_next_start_ends_the_run(settings: list[str], tmp_path: Path) -> None:
    killed = fail("ddp", "kill", 5, 1, *settings)
    assert killed.returncode != 0
    assert seconds_since_fault(killed) < LAUNCHERS_PATIENCE + 15
    message = "rank 0: another process ended in the middle of the run"
    assert message in killed.stderr and "exitcode  : -9" in killed.stderr
    assert "Traceback" not in killed.stderr[: killed.stderr.index(message)]

    resumed = launch("ddp", ROOT / "train_llm.py", *settings)
    assert "step-00000003" in resumed.stdout
    alone = [*settings[:1], "--output_dir", str(tmp_path / "alone")]
    launch("single", ROOT / "train_llm.py", *alone)
    expected = losses(tmp_path / "alone")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert sorted(expected) == list(range(1, 9))


def test_the_error_of_one_rank_comes_first_and_ends_all(settings: list[str]) -> None:
    failed = fail("ddp", "raise", 2, 0, *settings)
    assert failed.returncode != 0
    assert seconds_since_fault(failed) < LAUNCHERS_PATIENCE + 15
    words = [line for line in failed.stderr.splitlines() if line.startswith("train_llm.py: ")]
    assert words[0] == "train_llm.py: row 7 cannot be read."


def test_data_may_take_longer_than_an_exchange(settings: list[str], tmp_path: Path) -> None:
    limits = ["--ddp_timeout", "10", "--max_steps", "1"]
    ended = fail("ddp", "slow_data", 15, 0, *settings, *limits)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Tokens: written") == 1
    assert list(losses(tmp_path / "run")) == [1]


def test_data_that_fails_ends_all_with_one_report(settings: list[str]) -> None:
    failed = fail("ddp", "no_data", 0, 0, *settings)
    assert failed.returncode != 0
    words = [line for line in failed.stderr.splitlines() if line.startswith("train_llm.py: ")]
    assert words[0] == "train_llm.py: no such corpus."
    assert all("first process of this machine failed" in word for word in words[1:])


def test_a_machine_that_does_not_see_the_output_folder_ends_all(
    settings: list[str], tmp_path: Path
) -> None:
    failed = fail("ddp", "other_folder", 0, 1, *settings)
    assert failed.returncode != 0
    words = [line for line in failed.stderr.splitlines() if line.startswith("train_llm.py: ")]
    assert len(words) == 1  # what both meet is told once
    assert "not the same folder on every machine: 1 of 2 processes" in words[0]
    assert not list((tmp_path / "run").glob(".shared_*"))


def test_a_rank_that_hangs_is_named_and_ends_the_run(
    hung: Future[tuple[subprocess.CompletedProcess, float]],
) -> None:
    ended, seconds = hung.result()
    assert ended.returncode != 0
    assert "rank 0: no answer from the others within --ddp_timeout. Silent: rank 1." in ended.stderr
    assert seconds < 20 + 10 + LAUNCHERS_PATIENCE + 15
