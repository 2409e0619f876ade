"""A file of a known name acts once, and whatever is odd about it does not stop the run."""

import os
import time
from pathlib import Path

import pytest

from llm_training.control_files import COMMANDS, ControlFiles
from llm_training.stopping import ORDERS, STOPS


def nothing_to_say(line: str) -> None:
    raise AssertionError(line)


def test_every_command_is_taken_once(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path, min_seconds=0, say=nothing_to_say)
    assert files.take() == frozenset()
    for name in COMMANDS:
        (tmp_path / name).touch()
        assert files.take() == {name}
        assert files.take() == frozenset()
    for name in COMMANDS:
        (tmp_path / name).write_text("a person may write into it")
    assert files.take() == set(COMMANDS)
    assert list(tmp_path.iterdir()) == []


def test_all_commands_can_be_voted_for() -> None:
    assert set(COMMANDS) <= {*STOPS, *ORDERS}


def test_other_names_and_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("README", "save", "STOPS", "EVALUATE"):
        (tmp_path / name).touch()
    (tmp_path / "STOP").mkdir()
    assert ControlFiles(tmp_path, min_seconds=0, say=nothing_to_say).take() == frozenset()
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_is_gone_holds_no_command(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path / "gone", min_seconds=0, say=nothing_to_say)
    assert files.take() == frozenset()


def test_between_two_looks_time_must_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    files = ControlFiles(tmp_path, min_seconds=2.0)
    (tmp_path / "SAVE").touch()
    assert files.take() == {"SAVE"}  # the first look is at once
    (tmp_path / "EVAL").touch()
    clock = 101.9
    assert files.take() == frozenset()
    clock = 102.0
    assert files.take() == {"EVAL"}


def test_a_file_taken_back_in_between_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "isfile", lambda path: path.endswith("STOP"))
    assert ControlFiles(tmp_path, say=nothing_to_say).take() == frozenset()


def test_a_file_that_stays_acts_once_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    said: list[str] = []
    files = ControlFiles(tmp_path, min_seconds=0, say=said.append)
    (tmp_path / "SAVE").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        assert [files.take() for _ in range(3)] == [{"SAVE"}, frozenset(), frozenset()]
    assert len(said) == 1
    assert f"{tmp_path / 'SAVE'} cannot be removed: Operation not permitted" in said[0]
    assert files.take() == frozenset()  # still the same file, though it could be removed now

    (tmp_path / "SAVE").unlink()  # as the message asks
    assert files.take() == frozenset()
    (tmp_path / "SAVE").touch()
    assert files.take() == {"SAVE"}
    assert len(said) == 1


def test_a_look_costs_no_step_anything(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path, min_seconds=0)
    fastest = min(timed(files) for _ in range(20))
    assert fastest < 50e-6


def timed(files: ControlFiles) -> float:
    """Seconds that one look takes, as a mean over a hundred."""
    begin = time.perf_counter()
    for _ in range(100):
        files.take()
    return (time.perf_counter() - begin) / 100
