"""Whatever interrupts a save, there is a whole checkpoint afterwards, and the next save works.

Saves are killed at every single call that touches the checkpoints, and refused at every file that
they write. All is done in forks of this process: one start of a Python with torch would take longer
than a hundred of them.
"""

import errno
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from llm_training.checkpointing import CheckpointFolder, SaveError, find_checkpoint, open_checkpoint
from llm_training.model_state import estimate_bytes
from llm_training.state import TrainState

# Every way in which Python code opens, makes, renames or removes something.
FILE_CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.listdir"}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Checkpoints of steps 1 and 2, of which one and the best are kept."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(30, 30)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    folder = CheckpointFolder(accelerator, tmp_path / "checkpoints", 1, {})
    save(folder, 1)
    save(folder, 2, is_best=True)
    return folder


def save(folder: CheckpointFolder, step: int, **kwargs: bool) -> None:
    folder.save(TrainState(seed=1, step=step), **kwargs)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(p.name for p in folder.folder.iterdir())


def found_step(folder: CheckpointFolder) -> int:
    """The step that a new start goes on from, every file of it verified, none passed over."""
    checkpoint, passed_over = find_checkpoint(folder.folder, "auto")
    assert checkpoint is not None and passed_over == []
    assert open_checkpoint(folder.folder / "last").step in (2, checkpoint.step)
    return checkpoint.step


def in_a_fork(work: Callable[[], None]) -> int:
    """How a copy of this process ended that did `work`: 0, or minus the number of its signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:  # nothing of the test may go on in there
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(call: int, folder: Path) -> None:
    """Kills this process at its call of that number to something in the folder."""
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in FILE_CALLS and str(arguments[0]).startswith(str(folder)):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_kill_at_any_call_leaves_the_old_one_or_the_new_one(
    folder: CheckpointFolder, tmp_path: Path, is_async: bool
) -> None:
    before, found, call = folder.folder, [], 0
    while True:
        call += 1
        folder.folder = tmp_path / f"killed-{call}"
        shutil.copytree(before, folder.folder, symlinks=True)

        def killed_save() -> None:
            kill_at(call, folder.folder)  # noqa: B023
            folder.is_async = is_async
            save(folder, 3, is_best=True)
            folder.wait()

        ended = in_a_fork(killed_save)
        found.append(found_step(folder))
        folder.set_aside_newer(open_checkpoint(folder.folder / f"step-0000000{found[-1]}"))
        assert open_checkpoint(folder.folder / "best").step == found[-1]
        save(folder, 4)
        assert found_step(folder) == 4
        assert (folder.folder / "last").resolve().name == "step-00000004"
        kept = ["best", "last", f"step-0000000{found[-1]}", "step-00000004"]
        assert names(folder) == kept  # and nothing of what was killed
        shutil.rmtree(folder.folder)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert found == sorted(found)  # the old one up to the rename, then the new one
    assert found.count(2) > 15 and found.count(3) > 5


def test_a_kill_in_the_middle_of_writing_a_file_leaves_the_old_one(
    folder: CheckpointFolder,
) -> None:
    def killed_save() -> None:
        save_tensors = torch.save

        def killed(content: Any, file: Any) -> None:
            save_tensors(content, file)
            os.truncate(folder.folder / "step-00000003.tmp" / "optimizer.bin", 100)
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = killed
        save(folder, 3)

    assert in_a_fork(killed_save) == -signal.SIGKILL
    assert (folder.folder / "step-00000003.tmp" / "optimizer.bin").stat().st_size == 100
    assert found_step(folder) == 2
    save(folder, 3)
    assert names(folder) == ["best", "last", "step-00000002", "step-00000003"]


# ------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_file_that_does_not_fit_is_told_and_the_old_one_stays(
    folder: CheckpointFolder, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"model.safetensors": 2_000, "optimizer.bin": 6_000, "random_states_0.pkl": 12_000}

    def limited_save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[file], sizes[file]))
        try:
            save(folder, 3)
        except SaveError as error:
            os.write(2, str(error).encode())
            os._exit(7)

    assert in_a_fork(limited_save) == 7
    said = capfd.readouterr().err
    assert f"step-00000003 was not saved: rank 0 could not write {file}: " in said
    assert "File too large" in said or "as on a full disk" in said
    assert re.search(
        r"needs about [\d,]+ bytes, and [\d,]+ were free before it\. .*Free some", said
    )
    assert names(folder) == ["best", "last", "step-00000002"]
    assert found_step(folder) == 2
    save(folder, 3)
    assert found_step(folder) == 3


@pytest.fixture
def full_disk(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Makes every call of a function that touches a path of this name fail."""

    def fail_at(function: str, name: str) -> None:
        owner: Any = os if hasattr(os, function) else Path
        as_it_is = getattr(owner, function)

        def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
            if name in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return as_it_is(path, *args, **kwargs)

        monkeypatch.setattr(owner, function, fail)

    yield fail_at


@pytest.mark.parametrize(
    ("function", "name", "task"),
    [
        ("mkdir", "step-00000003.tmp", "make .*step-00000003.tmp"),
        ("write_text", "train_state.tmp", "write train_state.json"),
        ("write_text", "manifest.tmp", "finish step-00000003"),
        ("replace", "step-00000003.tmp/manifest", "finish step-00000003"),
        ("replace", "step-00000003.tmp", "write train_state.json"),
    ],
)
def test_a_full_disk_at_any_step_is_one_error(
    folder: CheckpointFolder,
    full_disk: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    name: str,
    task: str,
) -> None:
    full_disk(function, name)
    with pytest.raises(
        SaveError, match=rf"rank 0 could not {task}: .*No space left on device.*{name}"
    ):
        save(folder, 3)
    monkeypatch.undo()
    assert names(folder) == ["best", "last", "step-00000002"]
    assert found_step(folder) == 2
    save(folder, 3)
    assert found_step(folder) == 3


def test_all_is_on_the_disk_before_it_is_in_its_place(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()  # what a loss of power then leaves whole, by inode
    not_flushed: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def look(source: Path, target: Path) -> None:
        if target.name == "step-00000003":
            inside = [source, *source.rglob("*")]
            not_flushed.extend(path for path in inside if path.stat().st_ino not in flushed)
            flushed.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", look)
    save(folder, 3)
    assert not_flushed == []
    assert folder.folder.stat().st_ino in flushed  # and then its name


def test_a_disk_that_fails_to_keep_what_was_written_is_told(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError, match="Input/output error"):
        save(folder, 3)
    monkeypatch.undo()
    assert names(folder) == ["best", "last", "step-00000002"]


def test_links_that_cannot_be_set_leave_the_new_one_whole(
    folder: CheckpointFolder, full_disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk("symlink_to", "last.tmp")
    with pytest.raises(SaveError, match=r"rank 0 could not link to step-00000003: .*No space"):
        save(folder, 3)
    monkeypatch.undo()
    assert names(folder) == ["best", "last", "step-00000002", "step-00000003"]
    assert found_step(folder) == 3
    save(folder, 4)
    assert names(folder) == ["best", "last", "step-00000002", "step-00000004"]


# -------------------------------------------------------------------------------- too little room


def has_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


def test_a_save_that_does_not_fit_is_not_begun(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = open_checkpoint(folder.folder / "last").num_bytes
    has_free(monkeypatch, needed - 1)
    expected = (
        f"step-00000003 was not begun: it needs about {needed:,} bytes, and {needed - 1:,} are free"
        f" in {folder.folder}. .*--save_total_limit or another --output_dir"
    )
    with pytest.raises(SaveError, match=expected):
        save(folder, 3)
    assert names(folder) == ["best", "last", "step-00000002"]
    has_free(monkeypatch, needed)
    save(folder, 3)
    assert found_step(folder) == 3


def test_what_the_first_one_takes_is_estimated(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.folder = tmp_path / "new"
    estimate = estimate_bytes(folder.accelerator)
    assert estimate == int(930 * 12 * 1.05)
    has_free(monkeypatch, estimate - 1)
    with pytest.raises(SaveError, match=f"needs about {estimate:,} bytes"):
        save(folder, 3)
    assert names(folder) == []


def test_the_estimate_is_near_what_is_written(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(500, 500)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 500)).sum().backward()
    optimizer.step()
    folder = CheckpointFolder(accelerator, tmp_path, None, {})
    estimate = estimate_bytes(accelerator)
    save(folder, 1)
    assert 0.9 < open_checkpoint(tmp_path / "last").num_bytes / estimate < 1


def test_a_damaged_one_does_not_tell_what_the_next_needs(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.folder / "step-00000002" / "manifest.json").write_text("{}")
    has_free(monkeypatch, estimate_bytes(folder.accelerator))
    save(folder, 3)
    assert found_step(folder) == 3
