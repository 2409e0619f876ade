"""Runs that are killed again and again come to the same end as one that never was, to the bit."""

import re
import subprocess
import sys

import pytest

from tests.distributed.launching import ROOT, clean_environment
from tests.faults.chaos import BACKENDS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

NUM_KILLS = 30
LOST_RANDOM_STATE = """
import sys
from llm_training import checkpointing
from tests.faults import chaos
checkpointing.restore_random_state = lambda *args, **kwargs: None
sys.exit(chaos.main())
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_kills_at_any_moment_change_nothing() -> None:
    ended = run("-m", "tests.faults.chaos", "--kills", str(NUM_KILLS), "--seed", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(BACKENDS)
    kills = [tuple(map(int, re.findall(r"(\d+) kills, (\d+) of them", line)[0])) for line in lines]
    assert sum(total for total, _ in kills) >= NUM_KILLS
    assert all(within_a_save > 0 for _, within_a_save in kills)


def test_a_lost_random_state_is_found() -> None:
    """The negative control: what the comparison is worth."""
    ended = run("-c", LOST_RANDOM_STATE, "--kills", "4", "--seed", "3", "--backends", "single")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "train/loss" in ended.stdout
