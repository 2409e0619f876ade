"""Folders that are whole or not there, built by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llm_training.data.errors import DataError
from llm_training.durable import flush, flush_tree


@contextmanager
def exclusive(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the file `lock` against other processes; calls `on_wait` if another holds it now.

    The system frees it when its process ends, however that ends. The file itself stays: to remove
    it while another process waits on it would let a third one in.
    """
    with _create(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a child that was forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def _create(file: Path) -> IO[str]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("w")
    except OSError as error:
        raise DataError(
            f"The cache folder {file.parent} cannot be written: {error.strerror}."
            " Choose a folder that you may write with cache_dir."
        ) from None


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final`, replacing it, if the block ends without exception.

    Everything is on the disk before the name appears. Call it under `exclusive`: what a killed
    process left half built is removed.

    Raises:
        DataError: the disk is full.
    """
    temporary = final.with_name(f".{final.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        flush_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"The disk became full while {final} was written ({_free_mb(final.parent):,.0f} MB"
                " are free). Free some space, or choose another disk with cache_dir."
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError where the disk of `folder` has clearly too little room."""
    free_mb = _free_mb(folder)
    if needed_bytes / 1e6 > free_mb:
        raise DataError(
            f"The token store needs about {needed_bytes / 1e6:,.0f} MB in {folder}, and"
            f" {free_mb:,.0f} MB are free. Free some space, or choose another disk with cache_dir."
        )


def _free_mb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e6
