"""Checkpoints that are whole or not there, and the way back from them.

- `checkpoints/step-00000200/`: weights, optimizer and random state in the form of the backend,
  `train_state.json`, and `manifest.json`, which tells that form
- `checkpoints/last`: a link to the newest
- `checkpoints/best`: a link to the one with the lowest validation loss

A checkpoint is written beside, flushed, closed by its manifest and renamed; only then is an old
one removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from arguments import KINDS
from llm_training.durable import flush, flush_tree, point_to, write_json
from llm_training.model_state import (
    CheckpointError,
    StateForm,
    check_random_state,
    is_converted,
    is_same_split,
    load_model_state,
    restore_random_state,
    save_model_state,
)
from llm_training.state import TrainState

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAIN_STATE = "train_state.json"
STEP_NAME = re.compile(r"step-(\d{8,})")
# What may differ where --allow_resume_change says so.
RESUME_CHANGES = KINDS["allow_resume_change"].choices


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def read_state(self) -> TrainState:
        """The run's own state at that step."""
        return TrainState.load(self.path / TRAIN_STATE)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, with its manifest read and its files found.

    Raises:
        CheckpointError: it is not whole, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no whole checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}; this version reads {FORMAT_VERSION}. Continue"
            " it with the version of train_llm.py that wrote it."
        )
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise CheckpointError(f"{file} is damaged: {size} bytes were written, it is {found}.")
    return Checkpoint(path, manifest)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, the newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name) and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def find_checkpoint(folder: Path, resume_from: str) -> tuple[Checkpoint | None, list[str]]:
    """Where to continue.

    Args:
        folder: the run's `checkpoints` folder.
        resume_from: "auto", "none" or the path of a checkpoint, `last` and `best` included.

    Returns:
        The checkpoint or None, and a line for each newer one that had to be passed over.

    Raises:
        CheckpointError: "none" in a folder that has checkpoints, a given path that is not whole,
            or nothing but damaged ones.
    """
    paths = list_checkpoints(folder)
    if resume_from == "none":
        if paths:
            raise CheckpointError(
                f"{folder} has checkpoints, the newest {paths[0].name}, and resume_from_checkpoint"
                " is none. Give another --output_dir or --run_name to start anew, or"
                " --resume_from_checkpoint auto to go on."
            )
        return None, []
    if resume_from != "auto":
        return open_checkpoint(Path(resume_from).resolve()), []
    passed_over: list[str] = []
    for path in paths:
        try:
            return open_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(f"Passed over: {error}")
    if passed_over:
        raise CheckpointError(
            f"No checkpoint in {folder} is whole. {' '.join(passed_over)} Move the folder away to"
            " start anew."
        )
    return None, []


class CheckpointFolder:
    """The checkpoints of one run: saving, loading, retention.

    Args:
        folder: `output_dir/checkpoints`.
        total_limit: newest checkpoints to keep beside the best; None keeps all.
        identity: what a checkpoint must share with the run that loads it: model, data, seed, ...
        about: what else it says of the run: arguments, hardware, versions, ...
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        total_limit: int | None,
        identity: dict[str, Any],
        about: dict[str, Any] | None = None,
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.total_limit = total_limit
        self.identity = identity
        self.about = about or {}

    def save(self, state: TrainState, *, is_best: bool = False) -> Path:
        """Saves everything the run needs to go on from here; every rank must call this."""
        path = self.folder / f"step-{state.step:08d}"
        if not path.exists():
            self._write(path, state)
        if self.accelerator.is_main_process:
            point_to(self.folder / "last", path)
            if is_best:
                point_to(self.folder / "best", path)
            self._remove_old()
        self.accelerator.wait_for_everyone()
        return path

    def load(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: AcceleratedOptimizer | None,
        *,
        reset_optimizer: bool = False,
    ) -> list[str]:
        """Puts weights, optimizer and random state back, whatever backend wrote them.

        Every rank must call this, and nothing may draw random numbers after it. The same backend
        on the same number of processes goes on bit for bit. Others go on from the same weights and
        optimizer state; where the processes do not stand for the same shares of the work, each is
        seeded anew. Rates, decay and the like stay those of this run.

        Args:
            model: the prepared `CausalLMWithLoss`.
            optimizer: prepared with it; None: only weights are read, as an evaluation needs them.
            reset_optimizer: keep the new optimizer; the checkpoint's is not read.

        Returns:
            Lines for a person on what is not as it was; none where all is.

        Raises:
            CheckpointError: something is missing, damaged, or cannot be carried over; on every
                rank.
        """
        there = StateForm.of_manifest(checkpoint.manifest)
        here = StateForm.of_run(self.accelerator)
        if optimizer is not None:
            check_random_state(self.accelerator, checkpoint.path, there, here)
        load_model_state(
            self.accelerator,
            checkpoint.path,
            there,
            here,
            model,
            None if reset_optimizer else optimizer,
            scratch=self.folder,
        )
        self.accelerator.step = 0  # a checkpoint lies between two windows
        if optimizer is not None:
            seed = checkpoint.read_state().seed
            restore_random_state(
                self.accelerator, checkpoint.path, there, here, seed=seed, step=checkpoint.step
            )
        return _load_lines(there, here, optimizer is not None, reset_optimizer)

    def check(
        self,
        checkpoint: Checkpoint,
        total_steps: int | None = None,
        allowed: Sequence[str] = (),
    ) -> list[str]:
        """Makes sure that `checkpoint` is one of this run.

        Args:
            total_steps: of the run that wants to go on from it.
            allowed: what of `identity` may differ.

        Returns:
            A line for a person for each difference that is allowed.

        Raises:
            CheckpointError: it is of another model, other data, another seed, ..., with every
                difference; or it lies beyond the `total_steps` asked for.
        """
        written = checkpoint.manifest["identity"]
        differences = {
            name: f"{name}: {written.get(name)} there, {value} here"
            for name, value in self.identity.items()
            if written.get(name) != value
        }
        if refused := [text for name, text in differences.items() if name not in allowed]:
            can_be_allowed = differences.keys() <= {*RESUME_CHANGES}
            names = " ".join(differences)
            permit = f", or --allow_resume_change {names}" if can_be_allowed else ""
            raise CheckpointError(
                f"{checkpoint.path} belongs to another run ({'; '.join(refused)}). Give another"
                " --output_dir or --run_name to start anew, or the settings of that run to go on"
                f"{permit}."
            )
        if total_steps is not None and checkpoint.step > total_steps:
            raise CheckpointError(
                f"{checkpoint.path} is at step {checkpoint.step}, beyond the {total_steps} steps"
                " asked for. Give a larger --max_steps to go on, or another --run_name or"
                " --output_dir to start anew."
            )
        return [
            f"Allowed  {text}: the curve is another one from here" for text in differences.values()
        ]

    def set_aside_newer(self, checkpoint: Checkpoint) -> None:
        """Renames what lies beyond `checkpoint`: damaged, or a future this run will not have."""
        if self.accelerator.is_main_process:
            for path in list_checkpoints(self.folder):
                if int(path.name.removeprefix("step-")) > checkpoint.step:
                    aside = path.with_name(f"{path.name}.superseded")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
        self.accelerator.wait_for_everyone()

    def _write(self, path: Path, state: TrainState) -> None:
        unfinished = path.with_name(path.name + ".tmp")
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob("step-*.tmp"):
                shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        form = save_model_state(self.accelerator, unfinished)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state.save(unfinished / TRAIN_STATE)
            self._write_manifest(unfinished, state, form)
            flush_tree(unfinished)
            os.replace(unfinished, path)
            flush(self.folder)

    def _write_manifest(self, folder: Path, state: TrainState, form: dict[str, Any]) -> None:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "samples": state.samples,
            "identity": self.identity,
            "num_processes": self.accelerator.num_processes,
            "model_state": form,
            "run": self.about,
            "files": {str(p.relative_to(folder)): p.stat().st_size for p in files},
        }
        write_json(folder / MANIFEST, manifest)

    def _remove_old(self) -> None:
        """Removes the oldest beyond the limit, never what `last` or `best` point to."""
        if self.total_limit is None:
            return
        pointed_to = {(self.folder / name).resolve() for name in ("last", "best")}
        for path in list_checkpoints(self.folder)[self.total_limit :]:
            if path.resolve() not in pointed_to and (path / MANIFEST).is_file():
                # Without its manifest, what a crash leaves behind is not taken for whole.
                (path / MANIFEST).unlink()
                shutil.rmtree(path)


def _load_lines(
    there: StateForm, here: StateForm, is_training: bool, reset_optimizer: bool
) -> list[str]:
    """What a person should know of a load that was not the plain way back."""
    lines = []
    converted, moved = is_converted(there, here), not is_same_split(there, here)
    if converted or (moved and is_training):
        what = "weights and optimizer" if is_training and not reset_optimizer else "weights"
        masks = "; dropout masks differ from there on" if moved and is_training else ""
        how = "converted" if converted else "as they were"
        lines.append(f"Continued from {there} on {here}: {what} {how}{masks}")
    if reset_optimizer:
        lines.append("The optimizer starts anew (--reset_optimizer); its state was not read")
    return lines
