"""The Accelerator: device, precision, accumulation and threads, and the seed of everything."""

from __future__ import annotations

import logging
import os
import platform
import secrets

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
    set_seed,
)

from arguments import Arguments


class LaunchError(ValueError):
    """The device, the precision or the launch does not fit the machine."""


def build_accelerator(arguments: Arguments, *, accumulation: int, processes: int) -> Accelerator:
    """The Accelerator of this run.

    Args:
        accumulation: micro-batches in the window of one rank.
        processes: world size that the batch sizes were derived for.

    Raises:
        LaunchError: the device is not there, cannot compute the precision, or another number of
            processes runs than was asked for.
    """
    quiet_libraries()
    device_type = find_device_type(arguments.device)
    precision = choose_precision(arguments.mixed_precision, device_type)
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where imported, need not guess
        set_threads(arguments.num_threads)
    if arguments.seed is not None:
        make_deterministic(device_type)
    accelerator = Accelerator(
        cpu=device_type == "cpu",
        mixed_precision=precision,
        # The windows are ours: without this, the end of a loader would force extra steps.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation, sync_with_dataloader=False
        ),
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if arguments.torch_compile else "no", use_regional_compilation=True
        ),
    )
    if accelerator.num_processes != processes:
        raise LaunchError(
            f"{processes} processes were started (WORLD_SIZE), but Accelerate runs"
            f" {accelerator.num_processes}. Check distributed_type and num_processes in the file"
            " given to accelerate launch."
        )
    if accelerator.device.type != device_type:
        raise LaunchError(
            f"--device {arguments.device} means {device_type} here, but Accelerate chose"
            f" {accelerator.device.type}. Give --device {accelerator.device.type}."
        )
    return accelerator


def quiet_libraries() -> None:
    """Keeps what other packages say of their own inner life off the console."""
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights, each save
    transformers.logging.disable_progress_bar()
    # Rows are full, or padded at their end only and masked by their labels: no mask is needed.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "attention_mask" not in record.getMessage()
    )


def find_device_type(device: str) -> str:
    """The device type that `--device` stands for on this machine.

    Raises:
        LaunchError: it is not there.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        # Accelerate's environment switch, set by `use_cpu: true` in its configuration file.
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return "cpu"
        return next(name for name, is_there in found.items() if is_there)
    if not found[device]:
        raise LaunchError(
            f"--device {device}: this machine has none that torch {torch.__version__} can use."
            " Give --device auto, or install a torch build for it."
        )
    return device


def choose_precision(mixed_precision: str, device_type: str) -> str:
    """Accelerate's name of the precision: "bf16", "fp16" or "no".

    Raises:
        LaunchError: the device would not compute it, and would fall back in silence.
    """
    if mixed_precision == "auto":
        return "bf16" if has_bf16(device_type) else "no"
    if mixed_precision == "fp16" and device_type == "cpu":
        raise LaunchError("--mixed_precision fp16 does nothing on a CPU: use bf16, fp32 or auto.")
    if mixed_precision == "bf16" and device_type == "cuda" and not has_bf16(device_type):
        raise LaunchError("--mixed_precision bf16: this GPU has no bf16. Use fp16, fp32 or auto.")
    return "no" if mixed_precision == "fp32" else mixed_precision


def has_bf16(device_type: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware, so that it pays."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        # Not oneDNN's own answer: it is also yes where bf16 is only emulated, and slower.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device_type == "cpu" and platform.machine() == "aarch64":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def set_threads(num_threads: int | None) -> None:
    """Gives each process its share of the cores.

    `accelerate launch` exports OMP_NUM_THREADS=1 on a CPU, which halves the speed of a single
    process; the number of threads is therefore always set here.
    """
    if num_threads is None:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_threads = max(1, count_cores() // local_processes)
    torch.set_num_threads(num_threads)


def count_cores() -> int:
    """Cores that this process may use; on systems that do not tell, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_deterministic(device_type: str) -> None:
    """Lets torch choose algorithms that give the same bits each time; a CPU does so anyway."""
    if device_type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def agree_on_seed(seed: int | None) -> int:
    """The seed of the run: the one given, or one that rank 0 draws for all."""
    if seed is not None:
        return seed
    return int(broadcast_object_list([secrets.randbelow(2**32)])[0])


def seed_everything(seed: int, *, each_rank_its_own: bool) -> None:
    """Seeds Python, NumPy and torch: all ranks alike to build weights, apart for dropout."""
    set_seed(seed, device_specific=each_rank_its_own)


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all ranks, in double precision; every rank must call this."""
    if accelerator.num_processes == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return [float(total) for total in accelerator.reduce(totals, "sum")]
