"""Checkpoints that are whole or not there, and the way back from them.

- `checkpoints/step-00000200/`: weights, optimizer and random state in the form of the backend,
  `train_state.json`, and `manifest.json`, which tells that form
- `checkpoints/last`: a link to the newest
- `checkpoints/best`: a link to the one with the lowest validation loss

A checkpoint is written beside, flushed, closed by its manifest and renamed; only then is an old
one removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import nn

from arguments import KINDS
from llm_training.checkpoint_files import (
    MANIFEST,
    Checkpoint,
    agree_on_checkpoint,
    check_owner,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    whole_ones,
)
from llm_training.checkpoint_writing import (
    StagedCheckpoint,
    stage_checkpoint,
    write_checkpoint,
)
from llm_training.durable import flush, point_to
from llm_training.model_state import (
    CheckpointError,
    SaveError,
    StagingMemory,
    StateForm,
    check_random_state,
    is_converted,
    is_same_split,
    load_model_state,
    on_main_process,
    restore_random_state,
    save_on_main_process,
)
from llm_training.state import TrainState

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "SaveError",
    "agree_on_checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "open_checkpoint",
]

# What may differ where --allow_resume_change says so.
RESUME_CHANGES = KINDS["allow_resume_change"].choices
# Libraries read these without torch's `weights_only`.
UNPICKLED = ("sharded", "deepspeed")


def check_identity(
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    total_steps: int | None = None,
    allowed: Sequence[str] = (),
) -> list[str]:
    """As `CheckpointFolder.check`, by the `identity` of the run that wants to go on."""
    written = checkpoint.manifest["identity"]
    differences = {
        name: f"{name}: {written.get(name)} there, {value} here"
        for name, value in identity.items()
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
    return [f"Allowed  {text}: the curve is another one from here" for text in differences.values()]


class CheckpointFolder:
    """The checkpoints of one run: saving, loading, retention.

    Args:
        folder: `output_dir/checkpoints`.
        total_limit: newest checkpoints to keep beside the best; None keeps all.
        identity: what a checkpoint must share with the run that loads it: model, data, seed, ...
        about: what else it says of the run: arguments, hardware, versions, ...
        is_async: whether `save` returns once the checkpoint is in memory; see `wait`.

    Attributes:
        resumed_from: the checkpoint that `load` read, which is never removed; None before it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        total_limit: int | None,
        identity: dict[str, Any],
        about: dict[str, Any] | None = None,
        *,
        is_async: bool = False,
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.total_limit = total_limit
        self.identity = identity
        self.about = about or {}
        self.is_async = is_async
        self.resumed_from: Path | None = None
        self._writer = ThreadPoolExecutor(1, "saving")
        self._in_flight: Future[None] | None = None
        self._memory = StagingMemory()

    def save(self, state: TrainState, *, is_best: bool = False) -> Path:
        """Saves everything the run needs to go on from here; every rank must call this.

        With `is_async` another thread of rank 0 goes on writing. Training may change the weights
        meanwhile; the next call waits for the one before.

        Raises:
            SaveError: the disk is too small for it, or a rank could not write; on every rank.
                Checkpoints saved before are whole, and saving can be tried again.
        """
        self.wait()
        path = self.folder / f"step-{state.step:08d}"
        (is_there,) = broadcast_object_list([(path / MANIFEST).is_file()])
        facts = {"identity": self.identity, "is_best": is_best, "run": self.about}
        if not is_there and self.is_async:
            staged = stage_checkpoint(self.accelerator, path, state, facts, self._memory)
            self._in_flight = self._writer.submit(self._write_staged, staged, is_best)
            return path
        if not is_there:
            write_checkpoint(self.accelerator, path, state, facts)
        self._on_main_process(f"link to {path.name}", lambda: self._point(path, is_best))
        self._on_main_process("remove an old checkpoint", self._remove_old)
        return path

    def wait(self) -> None:
        """Waits until what `save` began is whole on the disk; every rank must call this.

        Raises:
            SaveError: it could not be written; on every rank.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:  # on all ranks or on none
            self._on_main_process("write a checkpoint", in_flight.result)

    def _write_staged(self, staged: StagedCheckpoint | None, is_best: bool) -> None:
        if staged is not None:  # on rank 0
            staged.write()
            self._point(staged.path, is_best)
            self._remove_old()

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
        if there.layout in UNPICKLED:
            on_main_process(self.accelerator, lambda: check_owner(checkpoint.path))
        self.resumed_from = checkpoint.path.resolve()
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
        return check_identity(checkpoint, self.identity, total_steps, allowed)

    def set_aside_newer(self, checkpoint: Checkpoint) -> None:
        """Renames what lies beyond `checkpoint`: damaged, or a future this run will not have.

        The links then point to what is left, also where a kill came before they were set.

        Raises:
            SaveError: it cannot be renamed; on every rank.
        """

        def rename() -> None:
            for path in list_checkpoints(self.folder):
                if int(path.name.removeprefix("step-")) > checkpoint.step:
                    aside = path.with_name(f"{path.name}.superseded")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
            left = list(whole_ones(self.folder))
            for found in left[:1]:
                point_to(self.folder / "last", found.path)
            for found in [found for found in left if found.manifest.get("is_best")][:1]:
                point_to(self.folder / "best", found.path)

        self._on_main_process("set newer checkpoints aside", rename)

    def _point(self, path: Path, is_best: bool) -> None:
        for name in ["last", "best"] if is_best else ["last"]:
            point_to(self.folder / name, path)
        flush(self.folder)

    def _remove_old(self) -> None:
        """Removes the oldest beyond the limit, but nothing that is pointed to or not ours."""
        if self.total_limit is None:
            return
        kept = {(self.folder / name).resolve() for name in ("last", "best")}
        if self.resumed_from is not None:
            kept.add(self.resumed_from)
        ours = [p for p in list_checkpoints(self.folder) if (p / MANIFEST).is_file()]
        for path in ours[self.total_limit :]:
            if path.resolve() not in kept:
                # In one step out of sight; what a crash then leaves, the next save clears away.
                removed = path.with_name(path.name + ".tmp")
                shutil.rmtree(removed, ignore_errors=True)
                os.replace(path, removed)
                shutil.rmtree(removed)

    def _on_main_process(self, task: str, work: Callable[[], None]) -> None:
        save_on_main_process(self.accelerator, task, work)


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
