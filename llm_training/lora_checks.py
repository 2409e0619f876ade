"""What is wrong with the arguments of adapters (LoRA), and of the weights that stay beside them.

Known before anything slow is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator

from arguments import Arguments, LoraArguments
from llm_training.hardware_checks import is_installed
from llm_training.launch_settings import LaunchSettings

ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"


def lora_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """What is at odds between adapters, the model, the optimizer and the launch."""
    yield from _base_problems(arguments)
    yield from _frozen_problems(arguments, launch)
    if arguments.lora_rank is None:
        yield from _idle_problems(arguments)
        return
    rank, targets = f"lora_rank={arguments.lora_rank}", arguments.lora_target_modules
    if arguments.model_type:
        yield (
            f"{rank} and model_type={arguments.model_type} exclude each other: adapters are trained"
            " beside weights that exist; give model_name_or_path in the place of the second, or"
            " drop the first"
        )
    if not targets:
        yield f"lora_target_modules is empty: name modules that get an adapter, or {ALL_LINEAR}"
    if ALL_LINEAR in targets and len(targets) > 1:
        given = json.dumps(targets)
        yield f"lora_target_modules={given}: {ALL_LINEAR} holds the others; keep it or them"
    if arguments.optim == "muon":
        yield (
            f"{rank} and optim=muon exclude each other: Muon moves whole matrices in all directions"
            " alike, and an adapter has few; use adamw"
        )
    if arguments.mixed_precision == "fp8":
        yield f"{rank} and mixed_precision=fp8 exclude each other: use bf16"
    if launch.tp_size > 1:
        yield (
            f"{rank} and parallelism_config_tp_size={launch.tp_size} exclude each other: adapters"
            " would have to be cut as the plan cuts the matrices; use fsdp.yaml or ddp.yaml"
        )


def _frozen_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """What is at odds with the type in which frozen matrices are held."""
    asked, precision = arguments.frozen_dtype, arguments.mixed_precision
    if asked == "float32":
        return
    given = f"frozen_dtype={asked}"
    if asked == "nf4":
        yield from _four_bit_problems(arguments, launch)
        return
    if arguments.lora_rank is None and not arguments.freeze_parameters:
        yield (
            f"{given} has no effect: every weight is trained, and those are held in float32; drop"
            " it (mixed_precision=bf16 computes in bf16), or give lora_rank or freeze_parameters"
        )
    if precision not in ("auto", "bf16"):
        yield (
            f"{given} and mixed_precision={precision} exclude each other: matrices in bfloat16 are"
            " multiplied in bfloat16; use mixed_precision=bf16, or frozen_dtype=float32"
        )
    if launch.tp_size > 1:
        yield (
            f"{given} and parallelism_config_tp_size={launch.tp_size} exclude each other: the plan"
            " cuts matrices in float32; use fsdp.yaml or ddp.yaml, or frozen_dtype=float32"
        )


def _four_bit_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    given = "frozen_dtype=nf4"
    if arguments.lora_rank is None:
        yield f"{given} needs lora_rank: what is held in 4 bits cannot be trained, adapters can"
    elif not is_installed("bitsandbytes"):
        yield f"{given} needs a package: pip install bitsandbytes, or use frozen_dtype=bfloat16"
    if arguments.use_dora:
        yield (
            f"{given} and use_dora=true exclude each other: DoRA looks into the matrix itself,"
            " which is packed; drop one of them"
        )
    if arguments.merge_adapter:
        yield (
            f"{given} and merge_adapter=true exclude each other: adapters are added to whole"
            " matrices. Train without merge_adapter; then start the same command with it and"
            " frozen_dtype=float32, which adds them to the weights as they were stored: its outputs"
            " differ a little from those that were trained"
        )
    is_cut = {
        f"the launcher's {launch.backend}": launch.backend in ("fsdp", "deepspeed"),
        f"parallelism_config_tp_size={launch.tp_size}": launch.tp_size > 1,
    }
    for what in (text for text, applies in is_cut.items() if applies):
        yield (
            f"{given} and {what} exclude each other: packed matrices are not cut in pieces; use"
            " ddp.yaml, or frozen_dtype=bfloat16"
        )


def _base_problems(arguments: Arguments) -> Iterator[str]:
    """An adapter where a model belongs."""
    folder = arguments.model_name_or_path or ""
    has_config = os.path.isfile(os.path.join(folder, "config.json"))
    if not folder or has_config or not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return
    base = "the model that it is for"
    try:
        with open(os.path.join(folder, ADAPTER_CONFIG), encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path") or base
    except (OSError, ValueError, AttributeError):
        pass
    yield (
        f"model_name_or_path={folder} is an adapter for {base}, not a model: start the run that"
        " made it once more with merge_adapter, which makes a model of the two, and name that; or"
        f" begin with {base}"
    )


def _idle_problems(arguments: Arguments) -> Iterator[str]:
    for field in dataclasses.fields(LoraArguments):
        value, default = getattr(arguments, field.name), getattr(Arguments(), field.name)
        if value != default:
            text = json.dumps(value)
            yield f"{field.name}={text} has no effect without lora_rank: drop it, or give that"
