"""The random state of every rank: as it was where that can be, else drawn anew for the step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate.utils.other import load

from llm_training.model_state.form import StateForm, fail_together, first_line

# Spreads the steps over the seeds, so that no rank of one step draws as another rank of another.
STEP_STRIDE = 0x9E3779B1
NUM_SEEDS = 2**32  # NumPy takes no larger ones


def random_state_file(accelerator: Accelerator) -> str:
    """The file that Accelerate writes for this rank."""
    return f"random_states_{accelerator.process_index}.pkl"


def is_same_split(there: StateForm, here: StateForm) -> bool:
    """Whether each rank stands for the same share of the work as the one that wrote its file."""
    return (
        there.num_processes == here.num_processes
        and there.tensor_parallel_size == here.tensor_parallel_size
        and there.device in (here.device, None)
    )


def check_random_state(
    accelerator: Accelerator, folder: Path, there: StateForm, here: StateForm
) -> None:
    """Makes sure that what should be restored is there; every rank must call this.

    Accelerate itself passes over a missing or unreadable file without a word.

    Raises:
        CheckpointError: the random state of a rank is missing or damaged, on every rank.
    """
    problem = None
    if is_same_split(there, here):
        path = folder / random_state_file(accelerator)
        try:
            load(path)
        except FileNotFoundError:
            problem = f"{folder} has no {path.name}, the random state of rank"
            problem += f" {accelerator.process_index}. Continue from another checkpoint."
        except Exception as error:  # damaged files fail in many ways
            problem = f"{path} cannot be read: {first_line(error)} Continue from another"
            problem += " checkpoint."
    fail_together(problem)


def restore_random_state(
    accelerator: Accelerator,
    folder: Path,
    there: StateForm,
    here: StateForm,
    *,
    seed: int,
    step: int,
) -> None:
    """Puts the random state of this rank back, or seeds it for this step of the run.

    On another split of the work the files fit no rank. The seed is then mixed with the step:
    without it, a run that moves would draw the masks of its first steps again.
    """
    if not is_same_split(there, here):
        # Ranks that hold one model between them drop the same.
        rank = accelerator.process_index // here.tensor_parallel_size
        set_seed((seed + step * STEP_STRIDE + rank) % NUM_SEEDS)
        return
    states: dict[str, Any] = load(folder / random_state_file(accelerator))
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    device = accelerator.device.type
    of_device = states.get(f"torch_{device}_manual_seed")
    if of_device is not None:
        # Of this process's device: there may be fewer of them here than there were.
        index = accelerator.device.index or 0
        getattr(torch, device).set_rng_state(of_device[min(index, len(of_device) - 1)], index)
