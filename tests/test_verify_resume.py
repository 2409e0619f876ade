"""The proof of `--verify_resume` finds what a way back can lose; runs here are in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llm
from arguments import Arguments
from llm_training import verify_resume as room
from llm_training.checksums import file_checksum, file_note
from llm_training.ranks import RankError
from llm_training.verify_resume import KILLED, WHOLE, Trial, log_difference, trial_settings
from tests.small_runs import open_place, train_small

STEPS = {"max_steps": 6, "save_steps": 3, "seed": 5}


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A run of 6 steps, and the same once more, which died in the fifth."""
    place = open_place(tmp_path, monkeypatch)
    trial = Trial(place / "run.verify_resume", 3)
    train_small(place, str(trial.run(WHOLE).path), **STEPS)
    step_as_it_is = train_llm.compute_gradients

    def die(run: train_llm.Run, *args: Any) -> Any:
        if run.state.step == 4:
            raise RankError("killed")
        return step_as_it_is(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "compute_gradients", die)
        train_small(place, str(trial.run(KILLED).path), code=1, **STEPS)
    return trial


def go_on(trial: Trial) -> bool:
    """Lets the second run go on from its checkpoint; the verdict."""
    train_small(Path(), str(trial.run(KILLED).path), **STEPS)
    return room._tell_verdict(trial)


def lose_random_state(checkpoint: Path) -> None:
    other = checkpoint.parents[2] / WHOLE / "checkpoints" / "step-00000006"
    shutil.copy(other / "random_states_0.pkl", checkpoint)


def shift_position(checkpoint: Path) -> None:
    path = checkpoint / "train_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"samples": state["samples"] + 1}))


def change_a_moment(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.bin"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg_sq"] *= 1.5
    torch.save(state, path)


def note_anew(checkpoint: Path) -> None:
    """Makes the manifest fit the files again, as if they had been written so."""
    manifest = checkpoint / "manifest.json"
    noted = json.loads(manifest.read_text())
    for name in noted["files"]:
        file = checkpoint / name
        noted["files"][name] = file_note(file.stat().st_size, file_checksum(file))
    manifest.write_text(json.dumps(noted))


def test_a_run_that_goes_on_as_it_should_is_proven(
    trial: Trial, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go_on(trial)
    said = capsys.readouterr().out
    assert "Proven: 6 of 6 steps are equal, bit for bit, in train/loss, train/grad_norm" in said
    assert "tensors and all other values are equal" in said


@pytest.mark.parametrize(
    ("tamper", "first_step"),
    [(lose_random_state, 4), (shift_position, 4), (change_a_moment, 5)],
)
def test_what_is_lost_on_the_way_back_is_found(
    trial: Trial,
    tamper: Callable[[Path], None],
    first_step: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = trial.checkpoint(KILLED, 3)
    tamper(checkpoint)
    note_anew(checkpoint)
    assert not go_on(trial)
    said = capsys.readouterr().out
    assert "NOT proven" in said
    assert f"The first step that differs is {first_step}: train/loss is" in said
    assert "Checkpoint of step 6: " in said


def test_the_settings_are_those_of_the_user_but_short(tmp_path: Path) -> None:
    arguments = Arguments(
        verify_resume=5, eval_steps=100, warmup_steps=2000, max_steps=10**6, learning_rate=3e-3
    )
    settings = trial_settings(arguments, tmp_path / "run", 5)
    changed = {name: value for name, value in settings.items() if getattr(arguments, name) != value}
    assert changed.pop("output_dir") == str(tmp_path / "run")
    assert changed.pop("verify_resume") is None
    assert changed == {
        "eval_max_batches": 1, "eval_steps": 5, "logging_steps": 1, "max_steps": 10,
        "report_to": ["none"], "save_steps": 5, "warmup_steps": 5,
    }  # fmt: skip
    without = trial_settings(Arguments(verify_resume=5, eval_steps=None), tmp_path, 5)
    assert without["eval_steps"] is None


def test_the_first_difference_of_two_logs_is_named() -> None:
    one = [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    assert log_difference(one, list(one)) is None
    step, text = log_difference(one, [one[0], one[1] | {"loss": 1.5}, one[2]]) or (0, "")
    assert (step, text) == (
        2,
        "loss is 2.0 uninterrupted and 1.5 killed; the largest difference of it is 0.5, at step 2",
    )
    assert log_difference(one, one[:2]) == (3, "the logs have 3 lines uninterrupted and 2 killed")
