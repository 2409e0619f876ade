"""What is wrong with the arguments that make GPUs faster, before anything slow is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from arguments import Arguments, batch_problems, resolve_batch_sizes
from llm_training.launch_settings import LaunchSettings

# Modes of torch.compile that record CUDA graphs where there is a GPU.
GRAPH_MODES = ("reduce-overhead", "max-autotune")


def speed_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """What is at odds between precision, kernels, torch.compile, the device and the launch."""
    yield from _device_problems(arguments)
    yield from _package_problems(arguments)
    yield from _float8_problems(arguments, launch)
    if arguments.torch_compile:
        yield from _scope_problems(arguments, launch)
        yield from _graph_problems(arguments, launch)
    else:
        for name, default in (("torch_compile_scope", "blocks"), ("torch_compile_mode", "default")):
            value = getattr(arguments, name)
            if value != default:
                yield f"{name}={value} has no effect without torch_compile: drop it, or give that"


def _device_problems(arguments: Arguments) -> Iterator[str]:
    device = arguments.device
    if device not in ("cpu", "mps"):
        return
    if arguments.tf32:
        yield f"tf32=true has no effect with device={device}: it is for NVIDIA GPUs; drop it"
    if not arguments.deterministic:
        yield (
            f"deterministic=false has no effect with device={device}, which is repeatable anyway:"
            " drop it"
        )
    if arguments.use_liger_kernel:
        both = f"use_liger_kernel=true and device={device}"
        yield f"{both} exclude each other: its kernels are for GPUs; drop the first"
    if arguments.mixed_precision == "fp8":
        both = f"mixed_precision=fp8 and device={device}"
        yield f"{both} exclude each other: it needs an NVIDIA GPU (Ada, Hopper or newer); use bf16"
    if arguments.torch_compile and arguments.torch_compile_mode == "reduce-overhead":
        yield (
            f"torch_compile_mode=reduce-overhead has no effect with device={device}: only GPUs have"
            " CUDA graphs; drop it"
        )


def _package_problems(arguments: Arguments) -> Iterator[str]:
    if arguments.device in ("cpu", "mps"):
        return  # refused there with and without the packages
    if arguments.use_liger_kernel and not _is_installed("liger_kernel"):
        yield "use_liger_kernel=true needs a package: pip install liger-kernel, or drop it"
    if arguments.mixed_precision == "fp8" and not _is_installed("torchao"):
        yield "mixed_precision=fp8 needs a package: pip install torchao, or use bf16"


def _float8_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    if arguments.mixed_precision != "fp8":
        return
    if launch.backend == "deepspeed":
        yield "mixed_precision=fp8 is not made for DeepSpeed: use ddp.yaml or fsdp.yaml, or bf16"
    if launch.tp_size > 1:
        yield (
            f"mixed_precision=fp8 and parallelism_config_tp_size={launch.tp_size} exclude each"
            " other: use ddp.yaml or fsdp.yaml, or bf16"
        )


def _scope_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """Whole models are compiled in one process: wrappers of several would be compiled with them."""
    if arguments.torch_compile_scope == "model" and launch.num_processes > 1:
        yield (
            f"torch_compile_scope=model compiles the exchanges of {launch.num_processes} processes"
            " with the model, which is not made for: use torch_compile_scope=blocks, or one process"
        )


def _graph_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """CUDA graphs write each pass into the same memory: what is kept over passes is lost."""
    mode = arguments.torch_compile_mode
    if mode not in GRAPH_MODES or arguments.device in ("cpu", "mps"):
        return
    instead = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    advice = f"or torch_compile_mode={instead}"
    if arguments.torch_compile_scope == "blocks":
        yield (
            f"torch_compile_mode={mode} records CUDA graphs, in which blocks of one code would"
            f" write over each other's results: give torch_compile_scope=model, {advice}"
        )
    sizes = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.global_batch_size,
    )
    if any(size is not None and size < 1 for size in sizes):
        return  # told as out of range
    if any(batch_problems(arguments, launch.data_parallel_size)):
        return
    accumulation = resolve_batch_sizes(arguments, launch.data_parallel_size).accumulation
    if accumulation > 1:
        yield (
            f"torch_compile_mode={mode} records CUDA graphs, which write over the gradients of"
            f" earlier micro-batches, and a step has {accumulation}: give a larger"
            f" per_device_train_batch_size, {advice}"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
