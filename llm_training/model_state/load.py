"""Reads weights and optimizer state back: as the backend does it, or by way of whole tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, distributed, nn

from llm_training.model_state.form import (
    CheckpointError,
    StateForm,
    buffers_by_name,
    fail_together,
    first_line,
    on_main_process,
    tied_names,
)
from llm_training.model_state.live import LiveModel, LiveZero
from llm_training.model_state.readers import (
    DEEPSPEED_FOLDER,
    OPTIMIZER,
    OTHER_ADVICE,
    READ_ERRORS,
    RESET_ADVICE,
    SHARDED_OPTIMIZER,
    SHARDED_WEIGHTS,
    OptimizerState,
    Weights,
    check_moments,
    is_quantized,
    load_pickled_tensors,
    moments_of,
    read_optimizer,
    read_weights,
    require,
)
from llm_training.model_state.sharded import load_sharded_optimizer, load_sharded_weights

Live = LiveModel | LiveZero


def load_model_state(
    accelerator: Accelerator,
    folder: Path,
    there: StateForm,
    here: StateForm,
    model: nn.Module,
    optimizer: Any,
    *,
    scratch: Path,
) -> None:
    """Puts weights and optimizer state back; every rank must call this.

    Sharded checkpoints are read by every rank for itself, on any number of processes, and those of
    DeepSpeed where stage, precision, number of processes and the parameters that share a rate are
    the same. All others are read by rank 0 as whole tensors and sent to the others, which is exact
    too but takes longer.

    Args:
        there: the form in which the checkpoint in `folder` lies.
        here: the form of this run.
        model: as Accelerate prepared it.
        optimizer: as Accelerate prepared it; None: its state is not even read.
        scratch: a folder of this run for what a conversion must write; removed afterwards.

    Raises:
        CheckpointError: something is missing, damaged, or cannot be carried over, on every rank.
    """
    is_zero = here.backend == "deepspeed"
    if is_zero and optimizer is not None and not is_converted(there, here):
        _load_zero(accelerator, folder, model)
        return
    inner = None if optimizer is None else optimizer.optimizer
    live: Live = LiveZero(model) if is_zero else LiveModel(model, inner)
    if isinstance(live, LiveModel) and there.layout == here.layout == "sharded":
        _load_sharded(accelerator, folder, live)
    else:
        _set_weights(accelerator, folder, there, live)
        if isinstance(live, LiveModel) and live.is_quantized:
            _load_quantized(folder, there, live)
        elif optimizer is not None:
            _set_optimizer(accelerator, folder, there, here, live, scratch)
    if optimizer is not None:
        _load_scaler(accelerator, folder)


def is_converted(there: StateForm, here: StateForm) -> bool:
    """Whether a checkpoint must take another form before this run can read it."""
    if here.backend == there.backend == "deepspeed":
        names = ("zero_stage", "num_processes", "precision", "rate_groups")
        return any(getattr(here, name) != getattr(there, name) for name in names)
    return (here.backend, here.layout) != (there.backend, there.layout)


# ------------------------------------------------------------------------------- as they are


def _load_sharded(accelerator: Accelerator, folder: Path, live: LiveModel) -> None:
    path = folder / SHARDED_WEIGHTS
    _load_part(accelerator, path, live, load_sharded_weights, OTHER_ADVICE)
    if live.optimizer is not None:
        path = folder / SHARDED_OPTIMIZER
        _load_part(accelerator, path, live, load_sharded_optimizer, RESET_ADVICE)


def _load_part(
    accelerator: Accelerator,
    path: Path,
    live: LiveModel,
    load: Callable[[LiveModel, Path], None],
    advice: str,
) -> None:
    on_main_process(accelerator, lambda: require(path, advice))
    try:
        load(live, path)
    except READ_ERRORS as error:  # on every rank, also where only one of them could not read
        raise CheckpointError(f"{path} cannot be read: {first_line(error)} {advice}") from error


def _load_zero(accelerator: Accelerator, folder: Path, engine: Any) -> None:
    rank, problem = accelerator.process_index, None
    for path in sorted((folder / DEEPSPEED_FOLDER).glob("*.pt")):
        if f"zero_pp_rank_{rank}_" in path.name or path.name.startswith("mp_rank_"):
            try:  # before the engine does, in which a rank that fails would leave others waiting
                torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            except READ_ERRORS as error:
                problem = f"{path} cannot be read: {first_line(error)} {OTHER_ADVICE}"
    fail_together(problem)
    try:
        with _settings_kept(engine.optimizer):
            has_all = all(parameter.requires_grad for parameter in engine.module.parameters())
            loaded, _ = engine.load_checkpoint(
                str(folder), DEEPSPEED_FOLDER, load_module_strict=has_all
            )
    except READ_ERRORS as error:
        raise CheckpointError(
            f"DeepSpeed cannot read {folder}: {first_line(error)} {RESET_ADVICE}"
        ) from error
    if loaded is None:
        raise CheckpointError(
            f"DeepSpeed found no checkpoint in {folder / DEEPSPEED_FOLDER}. {OTHER_ADVICE}"
        )


def _load_quantized(folder: Path, there: StateForm, live: LiveModel) -> None:
    """Moments in 8 bits go back as they lie in their file; every rank reads it for itself."""
    path, problem = folder / OPTIMIZER, None
    names = there.optimizer_parameters or ()
    try:
        if there.layout != "plain":
            raise ValueError(
                "moments in 8 bits (--optim adamw_8bit) do not come from other layouts"
            )
        found = load_pickled_tensors(path)["state"]
        if strange := [i for i, values in found.items() if not is_quantized(values)]:
            name = names[strange[0]]
            raise ValueError(f"it is of another optimizer (--optim): {name} has no 8-bit state")
        live.set_optimizer_state({names[number]: values for number, values in found.items()})
    except READ_ERRORS as error:
        reason = first_line(error)
        problem = f"The optimizer state in {path} cannot be read: {reason} {RESET_ADVICE}"
    fail_together(problem)


@contextmanager
def _settings_kept(zero: Any) -> Iterator[None]:
    """Keeps rates, decay and the limit of the gradient norm: DeepSpeed would load them as well."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in zero.param_groups]
    clip_grad = zero.clip_grad
    yield
    for group, settings in zip(zero.param_groups, own, strict=True):
        group.update(settings)
    zero.clip_grad = clip_grad


def _load_scaler(accelerator: Accelerator, folder: Path) -> None:
    """The loss scale of fp16, where both sides have one."""
    path = folder / "scaler.pt"
    if accelerator.scaler is not None and path.exists():
        accelerator.scaler.load_state_dict(torch.load(path, weights_only=True))


# ----------------------------------------------------------------------- by way of whole tensors


def _set_weights(accelerator: Accelerator, folder: Path, there: StateForm, live: Live) -> None:
    buffers = buffers_by_name(live.model)
    weights = on_main_process(
        accelerator, lambda: _fitting_weights(read_weights(folder, there), live, buffers, folder)
    )
    live.begin()
    for name in live.parameters:
        whole = None if weights is None else weights.pop(name)
        live.set_weight(name, _send(accelerator, whole, live.shape(name)))
    for name, buffer in buffers.items():
        whole = None if weights is None else weights.pop(name)
        buffer.copy_(_send(accelerator, whole, buffer.shape, buffer.dtype))
    live.finish()


def _fitting_weights(
    found: Weights, live: Live, buffers: dict[str, Tensor], folder: Path
) -> Weights:
    """Of what was found what this model has, each under the name that it has here.

    Raises:
        CheckpointError: something is missing or has another shape.
    """
    advice = "Continue from a checkpoint of this model."
    names = tied_names(live.model)
    shapes = {name: live.shape(name) for name in live.parameters}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    fitting: Weights = {}
    for name, shape in shapes.items():
        source = next((other for other in names.get(name, [name]) if other in found), None)
        if source is None:
            raise CheckpointError(f"{folder} has no weight {name}, which the model has. {advice}")
        if found[source].shape != shape:
            raise CheckpointError(
                f"{folder} holds {name} with shape {tuple(found[source].shape)}, the model has"
                f" {tuple(shape)}. {advice}"
            )
        fitting[name] = found[source]
    return fitting


def _set_optimizer(
    accelerator: Accelerator,
    folder: Path,
    there: StateForm,
    here: StateForm,
    live: Live,
    scratch: Path,
) -> None:
    order = None  # of the parameters, for old files without names; these backends have another
    if isinstance(live, LiveModel) and here.backend != "tensor_parallel" and live.has_one_rate:
        order = live.optimizer_parameters

    def read() -> OptimizerState:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="step-", suffix=".tmp") as beside:
            found = read_optimizer(folder, there, order, Path(beside))
        return _fitting_optimizer(found, live, folder)

    state = on_main_process(accelerator, read)
    (found,) = broadcast_object_list([_outline(state or {})])
    kinds: dict[str, tuple[str, ...]] = found["moments"]
    live.begin_optimizer(found["steps"])
    for name in kinds:
        for kind in kinds[name]:
            whole = None if state is None else state[name].pop(kind)
            live.set_moment(name, kind, _send(accelerator, whole, live.shape(name)))
    live.finish_optimizer()


def _outline(state: OptimizerState) -> dict[str, Any]:
    """What a rank must know of the state before its tensors come."""
    counted = {name: values["step"] for name, values in state.items() if "step" in values}
    return {
        "moments": {name: moments_of(values) for name, values in state.items()},
        "steps": {name: float(step) for name, step in counted.items()},
    }


def _fitting_optimizer(found: OptimizerState, live: Live, folder: Path) -> OptimizerState:
    """What was found, in the shapes of this model.

    Raises:
        CheckpointError: it belongs to other parameters, or cannot be carried over.
    """
    try:
        check_moments(_outline(found)["moments"], live.moments())
    except ValueError as error:
        raise CheckpointError(
            f"The optimizer state in {folder} cannot be taken over: {error}. {RESET_ADVICE}"
        ) from None
    fitting: OptimizerState = {}
    for name, values in found.items():
        shape = live.shape(name) if name in live.parameters else None
        kinds = moments_of(values)
        if shape is None or any(values[kind].numel() != shape.numel() for kind in kinds):
            raise CheckpointError(
                f"The optimizer state in {folder} does not fit the model at {name}. {RESET_ADVICE}"
            )
        # ZeRO-3 leaves them flat.
        fitting[name] = values | {kind: values[kind].reshape(shape) for kind in kinds}
    counts = sorted({*_outline(fitting)["steps"].values()})
    if isinstance(live, LiveZero) and len(counts) > 1:
        raise CheckpointError(
            f"The parameters in {folder} were updated from {counts[0]:g} to {counts[-1]:g} times,"
            f" and DeepSpeed keeps one count for all: it cannot take them over. {RESET_ADVICE}"
        )
    return fitting


def _send(
    accelerator: Accelerator,
    whole: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A copy of a tensor that rank 0 has, on the device of every rank."""
    sent = torch.empty(shape, dtype=dtype, device=accelerator.device)
    if whole is not None:
        sent.copy_(whole)  # what was read may lie in a file still
    if accelerator.num_processes > 1:
        distributed.broadcast(sent, src=0)
    return sent
