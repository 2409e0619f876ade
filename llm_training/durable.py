"""Files and folders that are whole at every moment, whenever the process or the machine stops."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Waits until a folder and all it holds are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that holds the old content or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(beside)
    os.replace(beside, path)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts the folder `new` in the place of its sibling `folder`; the old one goes last."""
    flush_tree(new)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def point_to(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to its sibling `target`, in one instant."""
    beside = link.with_name(link.name + ".tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target.name, target_is_directory=True)
    os.replace(beside, link)
