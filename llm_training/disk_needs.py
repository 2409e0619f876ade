"""What a run leaves on disks, and whether they have room for it.

docs/planning.md says how each number comes about.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arguments import CheckpointArguments
from llm_training.checkpoint_files import whole_ones
from llm_training.footprint import Backend, format_bytes


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of what a run writes, when they are most.

    Attributes:
        checkpoint: of one.
        num_checkpoints: kept at once, with the best and the one that is being written.
        models: of final/, and of best/ where it is kept.
        tokens: of a token store that is still to be made.
        unlimited: whether every checkpoint is kept.
    """

    checkpoint: int
    num_checkpoints: int
    models: int
    tokens: int = 0
    unlimited: bool = False

    @property
    def output(self) -> int:
        """Bytes below `output_dir`."""
        return self.checkpoint * self.num_checkpoints + self.models

    def line(self, free: int) -> str:
        """For a person, beside what is free."""
        tokens = f" + tokens {format_bytes(self.tokens)}" if self.tokens else ""
        return (
            f"Disk     {format_bytes(self.output + self.tokens)} of {format_bytes(free)} free:"
            f" {self.num_checkpoints} x {format_bytes(self.checkpoint)} checkpoint + models"
            f" {format_bytes(self.models)}{tokens}"
        )


def estimate_disk(
    arguments: CheckpointArguments,
    *,
    num_parameters: int,
    optimizer_bytes: float,
    backend: Backend,
    is_half: bool,
    total_steps: int | None,
    model_parameters: int | None = None,
    tokens: int = 0,
) -> DiskNeed:
    """What the run will write.

    Args:
        num_parameters: those that are trained, padding included.
        optimizer_bytes: of all parameters together.
        is_half: whether the forward pass computes in 16 bits; ZeRO-1 and 2 save that copy too.
        total_steps: of the run; None where only the time limits them.
        model_parameters: of final/ and best/, where those are not what is trained.
        tokens: bytes of a token store that is still to be made.
    """
    copy = (2 if is_half else 4) if backend in ("zero1", "zero2") else 0
    checkpoint = round((4 + copy) * num_parameters + optimizer_bytes)
    every, limit = arguments.save_steps, arguments.save_total_limit
    if every is None:
        num_saves = 1
    elif total_steps is None:
        num_saves = limit or 1
    else:
        num_saves = -(-total_steps // every)
    num_kept = num_saves if limit is None else min(num_saves, limit)
    num_kept += arguments.save_best and limit is not None and num_saves > num_kept
    is_replaced = num_saves > num_kept  # a new one is whole before an old one goes
    return DiskNeed(
        checkpoint=checkpoint,
        num_checkpoints=num_kept + is_replaced,
        models=(1 + arguments.save_best) * 4 * (model_parameters or num_parameters),
        tokens=tokens,
        unlimited=limit is None,
    )


def free_disk(output: Path) -> int:
    """Bytes free for `output`, those of the checkpoints that it holds already included."""
    held = sum(checkpoint.num_bytes for checkpoint in whole_ones(output / "checkpoints"))
    return shutil.disk_usage(existing_parent(output)).free + held


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def disk_problems(need: DiskNeed, output: Path, cache: Path) -> Iterator[str]:
    """Which disk is too small, with what to change."""
    places = existing_parent(output), existing_parent(cache)
    is_shared = places[0].stat().st_dev == places[1].stat().st_dev
    needed, free = need.output + need.tokens * is_shared, free_disk(output)
    if needed > free:
        first = (
            "Give a --save_total_limit" if need.unlimited else "Give a smaller --save_total_limit"
        )
        yield (
            f"Disk: the run needs about {format_bytes(needed)} in --output_dir {output}, and"
            f" {format_bytes(free)} are free ({need.line(free).partition(': ')[2]}). {first},"
            " another --output_dir, or free some space."
        )
    cache_free = shutil.disk_usage(places[1]).free
    if not is_shared and need.tokens > cache_free:
        yield (
            f"Disk: the tokens need about {format_bytes(need.tokens)} in --cache_dir {cache}, and"
            f" {format_bytes(cache_free)} are free. Give another --cache_dir."
        )
