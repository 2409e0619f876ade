"""Proves that a folder is whole or not there, and that one process at a time builds it."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
from pathlib import Path

import pytest

from llm_training.data.errors import DataError
from llm_training.data.folders import check_free_space, exclusive, new_folder


def test_the_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "store"
    with new_folder(final) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "a"
    assert list(tmp_path.iterdir()) == [final]


def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    final = tmp_path / "store"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(RuntimeError), new_folder(final) as temporary:
        (temporary / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in final.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [final]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".store.building"
    left.mkdir()
    (left / "half").write_text("half")
    with new_folder(tmp_path / "store") as temporary:
        (temporary / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["whole"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disk became full"), new_folder(tmp_path / "store"):
        raise OSError(errno.ENOSPC, "No space left on device")
    free = shutil.disk_usage(tmp_path).free
    check_free_space(tmp_path, free // 2)
    with pytest.raises(DataError, match=r"needs about [\d,]+ MB in .*, and [\d,]+ MB are free"):
        check_free_space(tmp_path, free * 2)


def append_under_lock(folder: Path, name: str) -> None:
    with exclusive(folder / ".lock", on_wait=lambda: None):
        diary = folder / "diary"
        before = diary.read_text() if diary.exists() else ""
        diary.write_text(before + f"{name} in\n")
        diary.write_text(diary.read_text() + f"{name} out\n")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    waited = []
    with exclusive(tmp_path / ".lock", on_wait=lambda: waited.append(True)):
        processes = [
            context.Process(target=append_under_lock, args=(tmp_path, name)) for name in "ab"
        ]
        for process in processes:
            process.start()
        # Long enough for them to write, if the lock let them.
        processes[0].join(0.3)
        assert not (tmp_path / "diary").exists()
    for process in processes:
        process.join()
    lines = (tmp_path / "diary").read_text().split()
    assert lines[0] == lines[2] != lines[4] == lines[6]
    assert waited == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"cannot be written.*cache_dir"),
        exclusive(tmp_path / "file" / "cache" / ".lock", on_wait=lambda: None),
    ):
        pass
