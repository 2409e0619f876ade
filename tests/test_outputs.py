"""The output folder is ours before anything is written, and nothing in it is lost."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arguments import Arguments
from llm_training.outputs import OutputError, OutputFolder

ROOT = Path(__file__).parents[1]


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "a" / "b")
    output.claim(start_anew=False)
    assert list(output.path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "final", "best", "train_log.jsonl"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(OutputError, match=f"holds {name}, but no arguments.json"):
        OutputFolder(tmp_path).claim(start_anew=False)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["theirs"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(tmp_path / "file").claim(start_anew=False)
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(tmp_path / "file" / "below").claim(start_anew=False)


def test_a_run_is_continued_but_not_started_anew(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.write_opening(Arguments(), {}, {})
    output.log.touch()
    output.claim(start_anew=False)
    with pytest.raises(OutputError, match="already holds a run"):
        output.claim(start_anew=True)


def test_changed_arguments_are_named_with_both_values(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    assert output.changed_arguments(Arguments()) == {}
    output.write_opening(Arguments(learning_rate=0.1, num_threads=1), {}, {})
    told_elsewhere = {"allow_resume_change": ["seed"], "reset_optimizer": True}
    changed = output.changed_arguments(
        Arguments(learning_rate=0.2, num_threads=2, **told_elsewhere)
    )
    assert changed == {"learning_rate": (0.1, 0.2)}


def test_a_result_is_read_back_and_a_torn_one_is_none(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    assert output.read_result() is None
    output.write_result({"step": 3})
    assert output.read_result() == {"step": 3}
    output.result.write_text('{"step"')
    assert output.read_result() is None


HOLDER = """
import sys, time
from llm_training.outputs import OutputFolder
with OutputFolder(sys.argv[1]).lock():
    if sys.argv[2:] == ["fork"]:
        import os
        child = os.fork()
        if child == 0:
            time.sleep(60)
        print(child, flush=True)
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def locked_by_another(path: Path, *words: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """A process that holds the lock of a folder, and what it said before."""
    command = [sys.executable, "-c", HOLDER, str(path), *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            said = list(iter(holder.stdout.readline, "locked\n"))
            yield holder, said
        finally:
            holder.kill()


def refusal_by(output: OutputFolder) -> str:
    with pytest.raises(OutputError) as caught, output.lock():
        pass
    return str(caught.value)


def can_lock(output: OutputFolder) -> bool:
    try:
        with output.lock():
            return True
    except OutputError:
        return False


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "run")
    with locked_by_another(output.path) as (holder, _):
        message = refusal_by(output)
        assert "is in use by another run" in message
        assert f"process {holder.pid} on {socket.gethostname()}, since 20" in message
        holder.kill()
        holder.wait()
        assert output.locked_by.exists()  # left behind, and locks nothing
        with output.lock():
            assert f"process {os.getpid()} on" in output.locked_by.read_text()
            assert f"process {os.getpid()} on" in refusal_by(OutputFolder(output.path))
    assert list(output.path.iterdir()) == []


def test_a_child_that_outlives_the_run_holds_no_lock(tmp_path: Path) -> None:
    with locked_by_another(tmp_path, "fork") as (holder, said):
        child = int(said[0])
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is still there
        try:
            give_up = time.monotonic() + 10  # it lets go as soon as it first runs
            while not (is_free := can_lock(OutputFolder(tmp_path))) and time.monotonic() < give_up:
                time.sleep(0.05)
            assert is_free
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, flock, removed = OutputFolder(tmp_path), fcntl.flock, []

    def end_of_the_other_run(file, operation) -> None:
        flock(file, operation)
        if not removed:
            removed.append(output.locked_by.unlink())

    monkeypatch.setattr(fcntl, "flock", end_of_the_other_run)
    with output.lock():
        monkeypatch.undo()
        assert "in use" in refusal_by(OutputFolder(tmp_path))
    assert removed


def test_a_folder_that_cannot_be_locked_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    said: list[str] = []
    refuse(errno.ENOLCK)
    with OutputFolder(tmp_path).lock(said.append):
        assert len(said) == 1 and f"{tmp_path} cannot be locked (No locks available)" in said[0]
    refuse(errno.EIO)
    assert "cannot be written: Input/output error" in refusal_by(OutputFolder(tmp_path))


def test_what_cannot_be_made_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    assert "cannot be written" in refusal_by(OutputFolder(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "theirs"
