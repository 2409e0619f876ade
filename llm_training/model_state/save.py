"""Writes weights, optimizer state and random state into a folder, as the backend does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state

from llm_training.model_state.form import StateForm
from llm_training.model_state.live import LiveModel
from llm_training.model_state.sharded import save_sharded


def save_model_state(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Saves what Accelerate has prepared; every rank must call this.

    Returns:
        What the manifest must note for `load_model_state`.
    """
    form = StateForm.of_run(accelerator)
    if form.backend == "tensor_parallel":
        # Accelerate's save_state cannot: it takes every tensor for a whole one.
        save_sharded(_live(accelerator), folder)
        save_accelerator_state(
            str(folder), [], [], [], [], accelerator.process_index, 0, accelerator.scaler
        )
    else:
        accelerator.save_state(str(folder))
    if form.layout == "plain" and accelerator._optimizers:
        names = tuple(_live(accelerator).optimizer_parameters)
        form = replace(form, optimizer_parameters=names)
    return form.for_manifest()


def _live(accelerator: Accelerator) -> LiveModel:
    """What Accelerate has prepared: the same that its own `save_state` writes."""
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    return LiveModel(model, optimizer.optimizer)
