"""Writes weights, optimizer state and random state into a folder, in the form of the backend.

The files are those of Accelerate's `save_state`. That one is not called: where one rank cannot
write, others would be left waiting for it in an exchange.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils.other import clean_state_dict_for_safetensors
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from llm_training.model_state.form import (
    StateForm,
    parameters_by_name,
    save_on_main_process,
    save_together,
    without_frozen,
)
from llm_training.model_state.live import LiveModel
from llm_training.model_state.random_state import random_state_file
from llm_training.model_state.readers import (
    DEEPSPEED_FOLDER,
    FULL_WEIGHTS,
    OPTIMIZER,
    PLAIN_WEIGHTS,
    SHARDED_OPTIMIZER,
    SHARDED_WEIGHTS,
)
from llm_training.model_state.sharded import save_sharded_optimizer, save_sharded_weights

STATE_BYTES = 3 * 4  # of a parameter: its weight and AdamW's two moments, in float32
ESTIMATE_MARGIN = 1.05  # for names, headers and random states

# Takes whole files by name, on rank 0: tensors by name, or what `torch.save` writes.
Put = Callable[[dict[str, Any]], object]


def save_model_state(accelerator: Accelerator, folder: Path, put: Put) -> dict[str, Any]:
    """Saves what Accelerate has prepared; every rank must call this.

    Args:
        folder: where every rank writes its own parts, and libraries what they make.
        put: takes the files that hold whole weights or the whole optimizer; done with them when
            it returns. The layouts "plain" and "full" have such files.

    Returns:
        What the manifest must note for `load_model_state`.

    Raises:
        SaveError: a rank could not write; on every rank.
    """
    form = StateForm.of_run(accelerator)
    if form.layout in ("plain", "full"):
        (_save_plain if form.layout == "plain" else _save_full)(accelerator, put)
    else:
        (_save_sharded if form.layout == "sharded" else _save_zero)(accelerator, folder)
    scaler = accelerator.scaler if accelerator.is_main_process else None  # the same on all
    rank = accelerator.process_index
    save_together(
        accelerator,
        f"write {random_state_file(accelerator)}",
        lambda: save_accelerator_state(str(folder), [], [], [], [], rank, 0, scaler),
    )
    if form.layout == "plain" and accelerator._optimizers:
        names = tuple(_live(accelerator).optimizer_parameters)
        form = replace(form, optimizer_parameters=names)
    return form.for_manifest()


def estimate_bytes(accelerator: Accelerator) -> int:
    """About how many bytes `save_model_state` writes over all ranks, each tensor counted once."""
    stage = StateForm.of_run(accelerator).zero_stage
    total = 0
    for parameter in parameters_by_name(accelerator._models[0]).values():
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty one
        # Stages 1 and 2 also keep the weights that compute.
        total += count * (STATE_BYTES + (parameter.element_size() if stage in (1, 2) else 0))
    return int(total * ESTIMATE_MARGIN)


def _live(accelerator: Accelerator) -> LiveModel:
    """What Accelerate has prepared: the same that its own `save_state` writes."""
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    return LiveModel(model, optimizer.optimizer)


def _save_plain(accelerator: Accelerator, put: Put) -> None:
    """One process or DDP: rank 0 has all."""
    (model,) = accelerator._models
    weights = without_frozen(accelerator.get_state_dict(model, unwrap=False), model)
    contents: dict[str, Any] = {PLAIN_WEIGHTS: clean_state_dict_for_safetensors(weights)}
    for optimizer in accelerator._optimizers:
        contents[OPTIMIZER] = optimizer.state_dict()
    _put(accelerator, put, contents)


def _save_full(accelerator: Accelerator, put: Put) -> None:
    """FSDP2 put together: only on rank 0, but every rank takes part in it."""
    live = _live(accelerator)
    assert live.optimizer is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = without_frozen(get_model_state_dict(live.model, options=options), live.model)
    _put(accelerator, put, {FULL_WEIGHTS: weights})
    del weights  # the optimizer needs the room
    state = get_optimizer_state_dict(live.model, live.optimizer, options=options)
    _put(accelerator, put, {OPTIMIZER: state})


def _save_sharded(accelerator: Accelerator, folder: Path) -> None:
    """FSDP2 and tensor parallelism: every rank writes its part."""
    live = _live(accelerator)
    save_together(
        accelerator,
        f"write {SHARDED_WEIGHTS}",
        lambda: save_sharded_weights(live, folder / SHARDED_WEIGHTS),
    )
    save_together(
        accelerator,
        f"write {SHARDED_OPTIMIZER}",
        lambda: save_sharded_optimizer(live, folder / SHARDED_OPTIMIZER),
    )


def _save_zero(accelerator: Accelerator, folder: Path) -> None:
    """DeepSpeed: every rank writes its part, between barriers inside the engine."""
    (engine,) = accelerator._models
    with _failures_kept(engine) as failures, _without_frozen(engine):
        engine.save_checkpoint(
            str(folder), DEEPSPEED_FOLDER, save_latest=False, exclude_frozen_parameters=True
        )

    path, failure = failures[0] if failures else (DEEPSPEED_FOLDER, None)

    def finish() -> None:
        if failure is not None:
            raise failure
        if accelerator.is_main_process:  # DeepSpeed's own tools look for it
            (folder / "latest").write_text(DEEPSPEED_FOLDER, encoding="utf-8")

    save_together(accelerator, f"write {path}", finish)


@contextmanager
def _failures_kept(engine: Any) -> Iterator[list[tuple[str, Exception]]]:
    """Inside, what an engine cannot write is noted, and it goes on to where the others wait.

    Yields:
        A list that grows by paths and why they could not be written.
    """
    failures: list[tuple[str, Exception]] = []

    def patient(write: Any) -> Any:
        def write_or_note(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # full disks show in many ways
                path = kwargs["path"] if "path" in kwargs else args[-1]
                failures.append((os.path.basename(path), error))

        return write_or_note

    writer = engine.checkpoint_engine
    writer.save = patient(writer.save)
    engine._copy_recovery_script = patient(engine._copy_recovery_script)
    try:
        yield failures
    finally:
        del writer.save, engine._copy_recovery_script  # the methods of their classes again


@contextmanager
def _without_frozen(engine: Any) -> Iterator[None]:
    """Inside, an engine tells no weights that are not trained."""
    tell = engine.module_state_dict
    engine.module_state_dict = lambda **options: without_frozen(tell(**options), engine.module)
    try:
        yield
    finally:
        del engine.module_state_dict  # the method of its class again


def _put(accelerator: Accelerator, put: Put, contents: dict[str, Any]) -> None:
    """Every rank must call this."""
    save_on_main_process(accelerator, f"write {', '.join(contents)}", lambda: put(contents))
