"""What a checkpoint's folder holds: its manifest, whether the files are whole, and whose they are.

The manifest is written last and lists every other file with its size and checksum. A folder without
one, or with a file that is not as listed, is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llm_training.checksums import CHECKSUMS, file_checksum
from llm_training.model_state import CheckpointError, fail_together, on_main_process
from llm_training.state import TrainState

FORMAT_VERSION = 3
SIZES_ONLY_VERSION = 1  # its manifests have no checksums; those of version 2 have SHA-256
MANIFEST = "manifest.json"
TRAIN_STATE = "train_state.json"
STEP_NAME = re.compile(r"step-(\d{8,})")
HASH_THREADS = 4  # hashing and reading both let other threads run


class FileNote(NamedTuple):
    """What a manifest says of a file: its size, and kind and hex of its checksum, if it has one."""

    num_bytes: int
    checksum: tuple[str, str] | None

    @classmethod
    def read(cls, note: Any) -> FileNote:
        """From the manifest's own form.

        Raises:
            KeyError, TypeError, ValueError: it has another.
        """
        if isinstance(note, int):
            return cls(note, None)
        (kind,) = (kind for kind in CHECKSUMS if kind in note)
        return cls(int(note["bytes"]), (kind, str(note[kind])))


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def files(self) -> dict[str, FileNote]:
        """By their names relative to the folder; the manifest itself is not among them."""
        return {name: FileNote.read(note) for name, note in self.manifest["files"].items()}

    @property
    def num_bytes(self) -> int:
        """The size of all its files together."""
        return sum(note.num_bytes for note in self.files.values())

    def read_state(self) -> TrainState:
        """The run's own state at that step."""
        return TrainState.load(self.path / TRAIN_STATE)


# ------------------------------------------------------------------------------------ one folder


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, with every file of it read and found as it was written.

    Raises:
        CheckpointError: it is not whole, or of another format.
    """
    checkpoint = read_checkpoint(path)
    check_contents(checkpoint, list(checkpoint.files))
    return checkpoint


def open_together(accelerator: Accelerator, path: Path) -> Checkpoint:
    """`open_checkpoint` with the files shared out among the ranks; every rank must call this.

    Raises:
        CheckpointError: it is not whole, or of another format; the same on every rank.
    """
    (found,) = broadcast_object_list([on_main_process(accelerator, lambda: read_checkpoint(path))])
    checkpoint: Checkpoint = found
    problem = None
    try:
        check_contents(checkpoint, share_of(accelerator, checkpoint.files))
    except CheckpointError as error:
        problem = str(error)
    fail_together(problem)
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, with its manifest read and all files found in their sizes.

    Raises:
        CheckpointError: it is not whole, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no whole checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}.") from error
    _check_version(path, version)
    checkpoint = Checkpoint(path, manifest)
    try:
        files, _ = checkpoint.files, checkpoint.step
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}.") from error
    for name, note in files.items():
        _check_size(path / name, note.num_bytes)
    try:
        checkpoint.read_state()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / TRAIN_STATE} cannot be read: {error!r}.") from error
    return checkpoint


def check_contents(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Compares these files with their checksums, where the manifest has any.

    Raises:
        CheckpointError: a file was changed since it was written, or cannot be read.
    """
    files = checkpoint.files
    noted = {name: checksum for name in names if (checksum := files[name].checksum)}
    try:
        found = hash_files(checkpoint.path, {name: kind for name, (kind, _) in noted.items()})
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {error}.") from error
    for name, digest in found.items():
        kind, written = noted[name]
        if digest != written:
            raise CheckpointError(
                f"{checkpoint.path / name} is damaged: its content is not what was written"
                f" (another {kind})."
            )


def hash_files(folder: Path, kinds: dict[str, str]) -> dict[str, str]:
    """The checksum of each of these files of a folder, in hex.

    Args:
        kinds: by the name of the file.
    """
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        paths = [folder / name for name in kinds]
        return dict(zip(kinds, pool.map(file_checksum, paths, kinds.values()), strict=True))


def share_of(accelerator: Accelerator, names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Those of the files that this rank hashes."""
    return sorted(names)[accelerator.process_index :: accelerator.num_processes]


def _check_version(path: Path, version: int) -> None:
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of train_llm.py: it has checkpoint format"
            f" {version}, and this version reads {FORMAT_VERSION}. Continue it with the version"
            " that wrote it."
        )
    if version < SIZES_ONLY_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST} is damaged: there is no checkpoint format {version}."
        )


def _check_size(file: Path, num_bytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{file} is missing or cannot be read: {num_bytes} bytes were written ({error})."
        ) from error
    if found != num_bytes:
        raise CheckpointError(
            f"{file} is damaged: {num_bytes} bytes were written, it is {found} bytes."
        )


# ---------------------------------------------------------------------------------- many of them


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, the newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name) and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def whole_ones(folder: Path) -> Iterator[Checkpoint]:
    """Those of them that are whole as far as sizes tell, the newest first."""
    for path in list_checkpoints(folder):
        try:
            yield read_checkpoint(path)
        except CheckpointError:
            continue


def find_checkpoint(folder: Path, resume_from: str) -> tuple[Checkpoint | None, list[str]]:
    """Where to continue; for one process alone.

    Args:
        folder: the run's `checkpoints` folder.
        resume_from: "auto", "none" or the path of a checkpoint, `last` and `best` included.

    Returns:
        The checkpoint or None, and a line for each newer one that had to be passed over.

    Raises:
        CheckpointError: "none" in a folder that has checkpoints, a given path that is not whole,
            or nothing but damaged ones.
    """
    paths = _candidates(folder, resume_from)
    return _first_whole(folder, resume_from, paths, open_checkpoint)


def agree_on_checkpoint(
    accelerator: Accelerator, folder: Path, resume_from: str
) -> tuple[Checkpoint | None, list[str]]:
    """`find_checkpoint` for all ranks, each of which hashes a share; every rank must call this.

    Rank 0 lists the folder and reads the manifests: all get the same answer, also where a network
    file system shows them different things for a while.
    """
    listed = on_main_process(accelerator, lambda: _candidates(folder, resume_from))
    (paths,) = broadcast_object_list([listed])

    def open_one(path: Path) -> Checkpoint:
        return open_together(accelerator, path)

    return _first_whole(folder, resume_from, paths, open_one)


def _candidates(folder: Path, resume_from: str) -> list[Path]:
    paths = list_checkpoints(folder)
    if resume_from == "none":
        if paths:
            raise CheckpointError(
                f"{folder} has checkpoints, the newest {paths[0].name}, and resume_from_checkpoint"
                " is none. Give another --output_dir or --run_name to start anew, or"
                " --resume_from_checkpoint auto to go on."
            )
        return []
    return paths if resume_from == "auto" else [Path(resume_from).resolve()]


def _first_whole(
    folder: Path, resume_from: str, paths: list[Path], open_one: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[str]]:
    if resume_from not in ("auto", "none"):
        return open_one(paths[0]), []  # one given by name is never replaced
    passed_over: list[str] = []
    for path in paths:
        try:
            return open_one(path), passed_over
        except CheckpointError as error:
            passed_over.append(f"Passed over: {error}")
    if passed_over:
        raise CheckpointError(
            f"No checkpoint in {folder} is whole. {' '.join(passed_over)} Move the folder away to"
            " start anew."
        )
    return None, []


# ------------------------------------------------------------------------------------- ownership


def check_owner(folder: Path) -> None:
    """Makes sure that nobody else can have written what will be unpickled, and so can run code.

    Raises:
        CheckpointError: the folder or something in it is another user's, or may be changed by all.
    """
    if not hasattr(os, "geteuid"):
        return
    trusted = {0, os.geteuid()}
    for path in _with_all_inside(folder):
        status = path.stat()
        if status.st_uid not in trusted:
            problem, remedy = (
                f"belongs to another user (id {status.st_uid})",
                "chown -R to yourself",
            )
        elif status.st_mode & stat.S_IWOTH:
            problem, remedy = "can be changed by every user", "chmod -R o-w"
        else:
            continue
        raise CheckpointError(
            f"{path} {problem}, and reading this checkpoint can run code that it holds. If you"
            f" trust it, {remedy} {folder}; else continue from a checkpoint that you wrote"
            " (--resume_from_checkpoint)."
        )


def close_to_others(folder: Path) -> None:
    """Takes the right to change anything in a folder from all but owner and group.

    With a umask of 0 our own checkpoints would otherwise fail `check_owner`. Some file systems know
    no rights: there a checkpoint is whole without.
    """
    for path in _with_all_inside(folder):
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH:
            with suppress(OSError):
                path.chmod(stat.S_IMODE(mode) & ~stat.S_IWOTH)


def _with_all_inside(folder: Path) -> Iterator[Path]:
    yield folder
    yield from sorted(folder.rglob("*"))
