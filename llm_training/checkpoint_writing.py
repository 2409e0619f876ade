"""Writes one checkpoint, whole or not at all, with an error that is the same on every rank.

It grows beside its place as `step-N.tmp`; its manifest closes it, and a rename puts it there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
from llm_training.checksums import CHECKSUM, file_note, new_checksum
from llm_training.durable import flush, flush_tree, write_json
from llm_training.model_state import (
    FileNotes,
    SaveError,
    StagingMemory,
    StateForm,
    estimate_bytes,
    save_model_state,
    save_on_main_process,
    save_together,
    write_tensor_files,
)
from llm_training.state import TrainState

SAVE_ADVICE = (
    "Earlier checkpoints are as they were. Free some space, or give a smaller --save_total_limit"
    " or another --output_dir."
)

MEMORY = Path("/dev/shm")
COPY_BYTES = 2**22
SMALL_FILES_BYTES = 2**20  # random state and position of a rank that stages its tensors elsewhere


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
    notes: FileNotes = {}
    try:
        form = save_model_state(
            accelerator,
            unfinished,
            lambda contents: notes.update(write_tensor_files(unfinished, contents)),
        )
        manifest = _facts_of(accelerator, state, form, facts)
        manifest["files"] = _secure_files(accelerator, unfinished, state, notes)
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
        tensors: what `write_tensor_files` makes files of, by name.
        files: all others, by name; open, and gone with this process.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Any]
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
            if self.tensors:
                notes |= write_tensor_files(unfinished, self.tensors)
            flush_tree(unfinished)
            notes = dict(sorted(notes.items()))
            _commit(unfinished, self.path, self.manifest | {"files": notes})
        except (OSError, SaveError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise SaveError(
                f"{self.path} was not saved: {str(error).rstrip('.')}. It needs about"
                f" {self.room.needed:,} bytes, and {self.room.free:,} were free before it."
                f" {SAVE_ADVICE}"
            ) from error
        finally:
            self.tensors = {}
            for file in self.files.values():
                file.close()


def stage_checkpoint(
    accelerator: Accelerator,
    path: Path,
    state: TrainState,
    facts: dict[str, Any],
    memory: StagingMemory,
) -> StagedCheckpoint | None:
    """As `write_checkpoint`, but only into memory; every rank must call this, on one machine.

    Args:
        memory: takes whole weights and the whole optimizer; what it took before must be written.
            Libraries that write files themselves write them to `MEMORY`.

    Returns:
        On rank 0 what is left to write, None elsewhere.

    Raises:
        SaveError: disk or memory is too small for it, or a rank could not write; on every rank.
    """
    made = save_on_main_process(
        accelerator, f"make a folder in {MEMORY}", lambda: _make_staging(accelerator, path)
    )
    ((staging, room),) = broadcast_object_list([made])
    tensors: dict[str, Any] = {}

    def keep(contents: dict[str, Any]) -> None:
        tensors.update({name: memory.copy(name, tree) for name, tree in contents.items()})

    try:
        form = save_model_state(accelerator, staging, keep)
        manifest = _facts_of(accelerator, state, form, facts)

        def take() -> StagedCheckpoint:
            state.save(staging / TRAIN_STATE)
            names = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
            files = {name: (staging / name).open("rb") for name in names}
            return StagedCheckpoint(path, manifest, tensors, files, room)

        return save_on_main_process(accelerator, f"stage {path.name}", take)
    finally:
        if accelerator.is_main_process:
            # The open files keep the content, and no longer than this process lives.
            shutil.rmtree(staging, ignore_errors=True)


def _make_staging(accelerator: Accelerator, path: Path) -> tuple[Path, Room]:
    room = _make_room(accelerator, path, path.with_name(path.name + ".tmp"))
    free = shutil.disk_usage(MEMORY).free
    by_files = StateForm.of_run(accelerator).layout in ("sharded", "deepspeed")
    needed = room.needed if by_files else SMALL_FILES_BYTES
    if free < needed:
        raise SaveError(
            f"{path} was not begun: --async_save needs about {needed:,} bytes in {MEMORY}, and"
            f" {free:,} are free there. Make it larger, or leave --async_save out."
        )
    return Path(tempfile.mkdtemp(prefix="train_llm-", dir=MEMORY)), room


def _copy(source: BinaryIO, target: Path) -> dict[str, Any]:
    """Copies a file; returns what the manifest says of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    checksum, num_bytes = new_checksum(), 0
    with target.open("wb") as file:
        while chunk := source.read(COPY_BYTES):
            checksum.update(chunk)
            num_bytes += file.write(chunk)
    return file_note(num_bytes, checksum.hexdigest())


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


def _secure_files(
    accelerator: Accelerator, folder: Path, state: TrainState, noted: FileNotes
) -> FileNotes:
    """Brings all files to the disk; what the manifest says of each.

    Args:
        noted: rank 0's, of files that were hashed while they were written. Libraries hash none of
            theirs: those are read again, while they are flushed.
    """

    def list_files() -> list[str]:
        state.save(folder / TRAIN_STATE)
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return [name for name in names if name not in noted]

    def flush_and_read() -> FileNotes:
        with ThreadPoolExecutor(1, "flushing") as pool:
            is_first_here = accelerator.is_local_main_process  # it flushes for its machine
            flushing = pool.submit(flush_tree, folder) if is_first_here else None
            mine = share_of(accelerator, names)
            sums = hash_files(folder, dict.fromkeys(mine, CHECKSUM))
        if flushing is not None:
            flushing.result()
        return {
            name: file_note((folder / name).stat().st_size, digest) for name, digest in sums.items()
        }

    listed = save_on_main_process(accelerator, f"write {TRAIN_STATE}", list_files)
    (names,) = broadcast_object_list([listed])
    parts = gather_object([save_together(accelerator, "keep what it wrote", flush_and_read)])
    return dict(sorted(item for part in [noted, *parts] for item in part.items()))


def _commit(unfinished: Path, path: Path, manifest: dict[str, Any]) -> None:
    write_json(unfinished / MANIFEST, manifest)
    close_to_others(unfinished)
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)
