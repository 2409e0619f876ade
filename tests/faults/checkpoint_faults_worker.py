"""Saves that are killed, or fail on one rank, under one backend after the other.

CASES OUTPUT, as for `resume_worker.py`. Beside its actions: `killed`, whose last three words say
which rank is killed at which call to which file, and `failing`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from arguments import resolve_batch_sizes
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.checkpointing import (
    CheckpointError,
    CheckpointFolder,
    SaveError,
    agree_on_checkpoint,
)
from llm_training.launch import build_accelerator
from llm_training.launch_settings import read_launch_settings
from llm_training.modeling import build_model, fit_config, load_config
from llm_training.optim import build_optimizer
from llm_training.ranks import leave
from llm_training.state import TrainState
from llm_training.updates import backward, finish_step
from tests.distributed import resume_worker
from tests.distributed.resume_worker import over_ranks, read

FITTING_BYTES = 1000  # less than any file of weights, optimizer or random state has


@dataclass
class Run:
    """What there is to save, and where it stands."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    checkpoints: CheckpointFolder
    state: TrainState

    def take_step(self) -> None:
        """One update; what it learns does not matter here."""
        tokens = torch.arange(16).view(1, 16)
        loss, _ = self.model(input_ids=tokens, labels=tokens)
        backward(self.accelerator, self.model, loss)
        finish_step(self.accelerator, self.model, self.optimizer, None, lambda norm: True)
        self.state.step += 1


def begin(words: list[str]) -> Run:
    """A run that stands where the newest whole checkpoint of its folder says."""
    arguments, launch = read(words), read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    config = load_config(arguments, None)
    fit_config(config, arguments, 256, 16)
    torch.manual_seed(0)
    network = CausalLMWithLoss(build_model(config, arguments, tp_size=launch.tp_size))
    model, optimizer = accelerator.prepare(network, build_optimizer(network, arguments, "cpu"))
    folder = Path(str(arguments.output_dir)) / "checkpoints"
    run = Run(
        accelerator,
        model,
        optimizer,
        CheckpointFolder(accelerator, folder, 1, {}),
        TrainState(seed=0),
    )
    checkpoint, _ = agree_on_checkpoint(accelerator, folder, "auto")
    if checkpoint is not None:
        run.checkpoints.set_aside_newer(checkpoint)
        run.checkpoints.load(checkpoint, model, optimizer)
        run.state = checkpoint.read_state()
    return run


def killed(words: list[str]) -> dict[str, Any]:
    """Saves twice; a rank is killed in the second one."""
    *words, rank, event, name = words
    run = begin(words)
    run.take_step()
    run.checkpoints.save(run.state)
    run.take_step()

    def kill(happened: str, arguments: tuple[Any, ...]) -> None:
        if happened == event and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == rank:
        sys.addaudithook(kill)
    run.checkpoints.save(run.state)
    return {}


def failing(words: list[str]) -> dict[str, Any]:
    """A save that fails on each rank in turn, one that succeeds, and what is said of its files."""
    run = begin(words)
    resumed_step, before = run.state.step, names_in(run)
    run.take_step()
    failures = [fail_on(run, rank) for rank in range(2)]
    path = run.checkpoints.save(run.state)
    return {
        "resumed_step": resumed_step,
        "before": before,
        "failures": failures,
        "whole": over_ranks(look(run)),
        "flipped": {
            str(file.relative_to(path)): flip_and_look(run, file)
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name != "manifest.json"
        },
    }


def fail_on(run: Run, rank: int) -> dict[str, Any]:
    """What every rank has to say where one cannot write, and what it then finds in the folder."""
    started, said = time.monotonic(), "saved"
    with short_files(os.environ["RANK"] == str(rank)):
        try:
            run.checkpoints.save(run.state)
        except SaveError as error:
            said = str(error)
    seconds = time.monotonic() - started
    return {"said": over_ranks(said), "seconds": seconds, "after": names_in(run)}


def names_in(run: Run) -> list[str]:
    """What there is in the folder of checkpoints; there may be no folder yet."""
    return sorted(path.name for path in run.checkpoints.folder.glob("*"))


@contextmanager
def short_files(are_short: bool) -> Iterator[None]:
    """Inside, this process cannot write more than a few bytes to a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FITTING_BYTES if are_short else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip_and_look(run: Run, file: Path) -> list[str]:
    """What every rank has to say where one bit of a file is another."""
    if os.environ["RANK"] == "0":
        flip(file)
    over_ranks("flipped")
    said = over_ranks(look(run))
    if os.environ["RANK"] == "0":
        flip(file)
    return said


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def look(run: Run) -> str:
    """Where this rank would go on, and what it passes over."""
    try:
        found, lines = agree_on_checkpoint(run.accelerator, run.checkpoints.folder, "auto")
    except CheckpointError as error:
        return f"refused: {error}"
    return " ".join([found.path.name if found else "nowhere", *lines])


resume_worker.ACTIONS.update(killed=killed, failing=failing)
if __name__ == "__main__":
    resume_worker.main()
    leave(0)
