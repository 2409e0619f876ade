"""Writes one checkpoint, whole or not at all, with an error that is the same on every rank.

It grows beside its place as `step-N.tmp`; its manifest closes it, and a rename puts it there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from llm_training.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST,
    TRAIN_STATE,
    close_to_others,
    hash_files,
    share_of,
    whole_ones,
)
from llm_training.durable import flush, flush_tree, write_json
from llm_training.model_state import (
    SaveError,
    StateForm,
    estimate_bytes,
    save_model_state,
    save_on_main_process,
    save_together,
)
from llm_training.state import TrainState

SAVE_ADVICE = (
    "Earlier checkpoints are as they were. Free some space, or give a smaller --save_total_limit"
    " or another --output_dir."
)

MEMORY = Path("/dev/shm")
COPY_BYTES = 2**22

FileNotes = dict[str, dict[str, Any]]


def _facts_of(
    accelerator: Accelerator, state: TrainState, form: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """A manifest, but for the files."""
    return {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "samples": state.samples,
        "sample_hash": state.sample_hash,
        "num_processes": accelerator.num_processes,
        "model_state": form,
        **facts,
    }


class Room(NamedTuple):
    """Bytes that a checkpoint needs, and bytes that its disk has."""

    needed: int
    free: int


def write_checkpoint(
    accelerator: Accelerator, path: Path, state: TrainState, facts: dict[str, Any]
) -> None:
    """Writes weights, optimizer, random state and `state`; every rank must call this.

    Args:
        path: the folder that it becomes.
        facts: what its manifest says beside.

    Raises:
        SaveError: the disk is too small, or a rank could not write; on every rank.
    """
    unfinished = path.with_name(path.name + ".tmp")
    make = save_on_main_process(
        accelerator, f"make {unfinished}", lambda: _make_room(accelerator, path, unfinished)
    )
    (room,) = broadcast_object_list([make])
    try:
        form = save_model_state(accelerator, unfinished)
        manifest = _facts_of(accelerator, state, form, facts)
        manifest["files"] = _secure_files(accelerator, unfinished, state)
        save_on_main_process(
            accelerator, f"finish {path.name}", lambda: _commit(unfinished, path, manifest)
        )
    except SaveError as error:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveError(
            f"{path} was not saved: {error} It needs about {room.needed:,} bytes, and"
            f" {room.free:,} were free before it. {SAVE_ADVICE}"
        ) from error


@dataclass
class StagedCheckpoint:
    """A checkpoint in memory, on rank 0, which another thread can write.

    Attributes:
        path: the folder that it becomes.
        files: what it consists of, by name; open, and gone with this process.
    """

    path: Path
    manifest: dict[str, Any]
    files: dict[str, BinaryIO]
    room: Room

    def write(self) -> None:
        """Brings it to the disk, whole or not at all.

        Raises:
            SaveError: it could not be written.
        """
        unfinished = self.path.with_name(self.path.name + ".tmp")
        try:
            notes = {name: _copy(file, unfinished / name) for name, file in self.files.items()}
            flush_tree(unfinished)
            _commit(unfinished, self.path, self.manifest | {"files": notes})
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise SaveError(
                f"{self.path} was not saved: {error}. It needs about {self.room.needed:,} bytes,"
                f" and {self.room.free:,} were free before it. {SAVE_ADVICE}"
            ) from error
        finally:
            for file in self.files.values():
                file.close()


def stage_checkpoint(
    accelerator: Accelerator, path: Path, state: TrainState, facts: dict[str, Any]
) -> StagedCheckpoint | None:
    """As `write_checkpoint`, but only into memory; every rank must call this, on one machine.

    Returns:
        On rank 0 what is left to write, None elsewhere.

    Raises:
        SaveError: disk or memory is too small for it, or a rank could not write; on every rank.
    """
    made = save_on_main_process(
        accelerator, f"make a folder in {MEMORY}", lambda: _make_staging(accelerator, path)
    )
    ((staging, room),) = broadcast_object_list([made])
    try:
        form = save_model_state(accelerator, staging)
        manifest = _facts_of(accelerator, state, form, facts)

        def take() -> StagedCheckpoint:
            state.save(staging / TRAIN_STATE)
            names = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
            files = {name: (staging / name).open("rb") for name in names}
            return StagedCheckpoint(path, manifest, files, room)

        return save_on_main_process(accelerator, f"stage {path.name}", take)
    finally:
        if accelerator.is_main_process:
            # The open files keep the content, and no longer than this process lives.
            shutil.rmtree(staging, ignore_errors=True)


def _make_staging(accelerator: Accelerator, path: Path) -> tuple[Path, Room]:
    room = _make_room(accelerator, path, path.with_name(path.name + ".tmp"))
    free = shutil.disk_usage(MEMORY).free
    if free < room.needed:
        raise SaveError(
            f"{path} was not begun: --async_save needs about {room.needed:,} bytes in {MEMORY}, and"
            f" {free:,} are free there. Make it larger, or leave --async_save out."
        )
    return Path(tempfile.mkdtemp(prefix="train_llm-", dir=MEMORY)), room


def _copy(source: BinaryIO, target: Path) -> dict[str, Any]:
    """Copies a file; returns what the manifest says of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, num_bytes = hashlib.sha256(), 0
    with target.open("wb") as file:
        while chunk := source.read(COPY_BYTES):
            digest.update(chunk)
            num_bytes += file.write(chunk)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _make_room(accelerator: Accelerator, path: Path, unfinished: Path) -> Room:
    """Makes the folder to write to, where the disk has room for what comes."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    if path.exists():
        raise SaveError(f"{path} is in the way: it is no checkpoint. Move it away.")
    room = Room(_needed_bytes(accelerator, folder), shutil.disk_usage(folder).free)
    if room.free < room.needed:
        raise SaveError(
            f"{path} was not begun: it needs about {room.needed:,} bytes, and {room.free:,} are"
            f" free in {folder}. {SAVE_ADVICE}"
        )
    unfinished.mkdir()
    return room


def _remove_leftovers(folder: Path) -> None:
    """Removes what a kill left in the middle of a save, a removal, a conversion or a link."""
    for leftover in [*folder.glob("step-*.tmp"), folder / "last.tmp", folder / "best.tmp"]:
        if leftover.is_symlink():
            leftover.unlink()
        elif leftover.is_dir():
            shutil.rmtree(leftover)


def _needed_bytes(accelerator: Accelerator, folder: Path) -> int:
    """As many as the last one in the same form took; estimated where there is none."""
    layout = StateForm.of_run(accelerator).layout
    for last in whole_ones(folder):
        if StateForm.of_manifest(last.manifest).layout == layout:
            return last.num_bytes
    return estimate_bytes(accelerator)


def _secure_files(accelerator: Accelerator, folder: Path, state: TrainState) -> FileNotes:
    """Brings all files to the disk and reads them again; what the manifest says of each."""

    def list_files() -> list[str]:
        state.save(folder / TRAIN_STATE)
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def flush_and_read() -> FileNotes:
        if accelerator.is_local_main_process:  # a machine flushes only what it wrote itself
            flush_tree(folder)
        sums = hash_files(folder, share_of(accelerator, names))
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in sums.items()
        }

    listed = save_on_main_process(accelerator, f"write {TRAIN_STATE}", list_files)
    (names,) = broadcast_object_list([listed])
    parts = gather_object([save_together(accelerator, "keep what it wrote", flush_and_read)])
    return dict(sorted(item for part in parts for item in part.items()))


def _commit(unfinished: Path, path: Path, manifest: dict[str, Any]) -> None:
    write_json(unfinished / MANIFEST, manifest)
    close_to_others(unfinished)
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)
