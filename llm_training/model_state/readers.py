"""Reads weights and optimizer state of any layout as whole CPU tensors by parameter name.

One process reads; none of this needs a process group. DeepSpeed's files and the metadata of
sharded ones are pickles, which can run code: who calls this has looked whose they are.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llm_training.model_state.form import CheckpointError, StateForm, first_line, plain_name

# File names of Accelerate's `save_state`.
PLAIN_WEIGHTS = "model.safetensors"
FULL_WEIGHTS = "pytorch_model_fsdp.bin"
OPTIMIZER = "optimizer.bin"
SHARDED_WEIGHTS = "pytorch_model_fsdp_0"
SHARDED_OPTIMIZER = "optimizer_0"
DEEPSPEED_FOLDER = "pytorch_model"

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside its `step`
MUON_MOMENTS = ("momentum_buffer",)  # of Muon, which counts no steps
RESET_ADVICE = "Give --reset_optimizer to go on with its weights and a new optimizer."
OTHER_ADVICE = (
    "Continue from another checkpoint (--resume_from_checkpoint), or under the backend that wrote"
    " this one."
)

Weights = dict[str, Tensor]
OptimizerState = dict[str, dict[str, Tensor]]

# Damaged files fail in many ways; torch.distributed.checkpoint's is no `Exception`.
READ_ERRORS = (Exception, CheckpointException)


def read_weights(folder: Path, form: StateForm) -> Weights:
    """The weights of a checkpoint by name, whole and on the CPU; tied ones at least once.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    name = {
        "plain": PLAIN_WEIGHTS,
        "full": FULL_WEIGHTS,
        "sharded": SHARDED_WEIGHTS,
        "deepspeed": DEEPSPEED_FOLDER,
    }[form.layout]
    path = folder / name
    require(path, OTHER_ADVICE)
    try:
        if form.layout == "plain":
            found = load_file(path)
        elif form.layout == "full":
            found = load_pickled_tensors(path)
        elif form.layout == "sharded":
            found = _read_sharded(path, "model.")
        else:
            found = _read_zero_weights(folder)
    except READ_ERRORS as error:
        raise CheckpointError(
            f"{path} cannot be read: {first_line(error)} {OTHER_ADVICE}"
        ) from error
    return {plain_name(key): tensor for key, tensor in found.items()}


def read_optimizer(
    folder: Path, form: StateForm, parameters: Sequence[str] | None, scratch: Path
) -> OptimizerState:
    """The state by parameter name, whole and on the CPU, of what `moments_of` knows.

    Parameters that were never updated are missing.

    Args:
        parameters: names in the order of the live optimizer, for plain files that do not say
            how they number them; None: it orders them in another way.
        scratch: an empty folder, on a disk with room for seven copies of the weights in float32.

    Raises:
        CheckpointError: it is missing or damaged, or of an optimizer that is not known here.
    """
    folder_name = {"sharded": SHARDED_OPTIMIZER, "deepspeed": DEEPSPEED_FOLDER}
    path = folder / folder_name.get(form.layout, OPTIMIZER)
    require(path, RESET_ADVICE)
    try:
        if form.layout == "plain":
            found = _by_name(load_pickled_tensors(path), form.optimizer_parameters or parameters)
        elif form.layout == "full":
            found = load_pickled_tensors(path)["state"]
        elif form.layout == "sharded":
            found = _unflatten(_read_sharded(path, "optimizer.state."))
        else:
            found = _read_zero_optimizer(path, scratch)
        state = {plain_name(name): _known_state(values) for name, values in found.items()}
    except READ_ERRORS as error:
        raise CheckpointError(
            f"The optimizer state in {path} cannot be read: {first_line(error)} {RESET_ADVICE}"
        ) from error
    return state


def require(path: Path, advice: str) -> None:
    """Makes sure that a file or folder of a checkpoint is there.

    Raises:
        CheckpointError: it is not; `advice` tells what to do.
    """
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}. {advice}")


def load_pickled_tensors(path: Path) -> Any:
    """What torch saved, if it is tensors and plain values; they may lie in the file still."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _by_name(
    optimizer: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, dict[str, Tensor]]:
    """A plain optimizer file's state by name; it counts the parameters of all groups together."""
    if names is None:
        raise ValueError("it does not say which state belongs to which parameter")
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    if count != len(names):
        raise ValueError(f"it has {count} parameters, the model {len(names)}")
    return {names[number]: values for number, values in optimizer["state"].items()}


def moments_of(names: Collection[str]) -> tuple[str, ...]:
    """Which moments the state of a parameter holds: AdamW's, but for Muon's where it has those."""
    return MUON_MOMENTS if set(MUON_MOMENTS) <= set(names) else MOMENTS


def is_quantized(values: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is of bitsandbytes, which has names of its own for it."""
    return not {"momentum_buffer", *MOMENTS} & {*values} and "step" in values


def check_moments(
    found: Mapping[str, tuple[str, ...]], expected: Mapping[str, tuple[str, ...]]
) -> None:
    """Makes sure that what was `found` is of the optimizer of this run, each by parameter name.

    Raises:
        ValueError: it is of another.
    """
    for name, kinds in found.items():
        if kinds != expected.get(name, kinds):
            theirs, ours = " and ".join(kinds), " and ".join(expected[name])
            raise ValueError(
                f"it is of another optimizer (--optim): {name} has {theirs} there, {ours} here"
            )


def _known_state(values: Mapping[str, Any]) -> dict[str, Tensor]:
    if moments_of(values) == MUON_MOMENTS:
        return {key: values[key] for key in MUON_MOMENTS}
    missing = [key for key in ("step", *MOMENTS) if key not in values]
    if missing:
        raise ValueError(f"it is not of AdamW or Muon (--optim): {', '.join(missing)} missing")
    step = torch.as_tensor(values["step"], dtype=torch.float32).reshape(())
    return {"step": step} | {key: values[key] for key in MOMENTS}


def _read_sharded(folder: Path, prefix: str) -> Weights:
    """Every tensor under `prefix` that torch.distributed.checkpoint wrote, put together."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _unflatten(tensors: Weights) -> dict[str, dict[str, Tensor]]:
    """`{"weight.exp_avg": ...}` as `{"weight": {"exp_avg": ...}}`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def _read_zero_weights(folder: Path) -> Weights:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=DEEPSPEED_FOLDER, exclude_frozen_parameters=True
        )


def _read_zero_optimizer(folder: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """DeepSpeed's own converter writes a folder for each parameter, which is read back."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(scratch / "universal"),
        num_extract_workers=1,  # more would fork this process, with all its threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    universal = scratch / "universal" / "zero"
    common_step = _zero3_step(universal)
    found = {}
    for path in sorted(universal.rglob(f"{MOMENTS[0]}.pt")):
        values = {key: _load_universal(path.with_name(f"{key}.pt")) for key in MOMENTS}
        step = path.with_name("step.pt")
        values["step"] = _load_universal(step) if step.exists() else common_step
        found[str(path.parent.relative_to(universal))] = values
    return found


def _zero3_step(universal: Path) -> Any:
    """ZeRO-3's converter leaves the step count in the optimizer state of rank 0."""
    common = torch.load(universal / "optimizer_state.pt", weights_only=False, mmap=True)
    groups = common.get("optimizer_state_dict", {}).get("state", {})
    return next((group["step"] for group in groups.values()), None)


def _load_universal(path: Path) -> Any:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded["param"] if isinstance(loaded, dict) else loaded
