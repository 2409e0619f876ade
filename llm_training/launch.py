"""The Accelerator: device, precision, accumulation and threads, and the seed of everything."""

from __future__ import annotations

import logging
import math
import os
import platform
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from arguments import Arguments, BatchSizes
from llm_training.compiling import compile_plugin
from llm_training.cpu_backends import start_gloo
from llm_training.float8 import Float8Error, check_float8, float8_recipe
from llm_training.launch_checks import precision_conflict
from llm_training.launch_settings import LaunchSettings

# Of control groups, version 2: "200000 100000" is the time of two cores, "max 100000" no limit.
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


class LaunchError(ValueError):
    """The device, the precision or the launch does not fit the machine."""


def build_accelerator(
    arguments: Arguments, launch: LaunchSettings, *, batch: BatchSizes
) -> Accelerator:
    """The Accelerator of this run, with the backend that the launcher asked for.

    Raises:
        LaunchError: the device is not there, cannot compute the precision, or Accelerate would
            run something else than was asked for.
    """
    quiet_libraries()
    device_type = find_device_type(arguments.device, launch)
    precision = choose_precision(arguments.mixed_precision, device_type)
    check_speed_choices(arguments, launch, device_type)
    if conflict := precision_conflict({"no": "fp32"}.get(precision, precision), launch):
        raise LaunchError(f"{conflict} (mixed_precision={arguments.mixed_precision}).")
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where imported, need not guess
        set_threads(arguments.num_threads)
    if arguments.seed is not None and arguments.deterministic:
        make_deterministic(device_type)
    check_combination(launch)
    timeout = timedelta(seconds=arguments.ddp_timeout)
    backend = "tensor_parallel" if launch.tp_size > 1 else launch.backend
    is_sharded = backend in ("fsdp", "deepspeed", "tensor_parallel")
    if device_type == "cpu" and is_sharded:
        start_gloo(backend, timeout)
    handlers: list[KwargsHandler] = [InitProcessGroupKwargs(timeout=timeout)]
    if precision == "fp8":
        handlers.append(float8_recipe())
    try:
        accelerator = Accelerator(
            cpu=device_type == "cpu" and backend != "deepspeed",
            mixed_precision=precision,
            # The windows are ours: without this, the end of a loader would force extra steps.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=batch.accumulation, sync_with_dataloader=False
            ),
            dynamo_plugin=compile_plugin(arguments),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise LaunchError(
            f"Accelerate refuses {launch.config_file or 'this launch'}: {error}"
        ) from error
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        fill_deepspeed_config(accelerator, arguments, batch)
    elif accelerator.distributed_type == DistributedType.FSDP and precision != "no":
        keep_sums_exact(accelerator)
    check_launch(accelerator, arguments, launch, device_type)
    return accelerator


def check_speed_choices(arguments: Arguments, launch: LaunchSettings, device_type: str) -> None:
    """Refuses what only some devices compute, once `--device auto` is known.

    Raises:
        LaunchError: fp8, TF32, CUDA graphs or liger-kernel without a GPU that has them.
    """
    if arguments.mixed_precision == "fp8":
        try:
            check_float8(device_type, backend=launch.backend, tp_size=launch.tp_size)
        except Float8Error as error:
            raise LaunchError(str(error)) from error
    if device_type == "cuda":
        return
    asked = {
        "--tf32 true": arguments.tf32 is True,
        "--use_liger_kernel true": arguments.use_liger_kernel,
        "--torch_compile_mode reduce-overhead": arguments.torch_compile_mode == "reduce-overhead",
    }
    if only_on_gpus := [flag for flag, is_given in asked.items() if is_given]:
        raise LaunchError(
            f"{' and '.join(only_on_gpus)}: for NVIDIA GPUs alone, and this run is on"
            f" {device_type}. Leave it out."
        )


def check_combination(launch: LaunchSettings) -> None:
    """Refuses what Accelerate cannot combine.

    Raises:
        LaunchError: tensor parallelism with anything beside it, or rows split without FSDP2.
    """
    place = launch.config_file or "The launcher"
    if launch.tp_size > 1 and launch.backend == "fsdp":
        raise LaunchError(
            f"{place} asks for FSDP2 with parallelism_config_tp_size {launch.tp_size}. Accelerate"
            " 1.15 needs transformers.integrations.tensor_parallel.ReplicateParallel for it, which"
            " transformers 5.5 and later do not have. Use fsdp.yaml or tp.yaml alone."
        )
    if launch.tp_size > 1 and (launch.cp_size > 1 or launch.num_processes != launch.tp_size):
        raise LaunchError(
            f"{place} asks for parallelism_config_tp_size {launch.tp_size} and"
            f" parallelism_config_cp_size {launch.cp_size} with {launch.num_processes} processes."
            " Accelerate runs tensor parallelism alone: give as many processes as its size, and"
            " cp_size 1."
        )
    if launch.cp_size > 1 and launch.backend != "fsdp":
        raise LaunchError(
            f"{place} asks for parallelism_config_cp_size {launch.cp_size} with {launch.backend}."
            " Accelerate splits rows only together with FSDP2: start from"
            " accelerate_configs/cp.yaml."
        )


def fill_deepspeed_config(
    accelerator: Accelerator, arguments: Arguments, batch: BatchSizes
) -> None:
    """Writes our values where the DeepSpeed file says `auto` or nothing.

    DeepSpeed clips and divides by its own values and ignores what the loop says.

    Raises:
        LaunchError: stage 0.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"].get("stage", 0) == 0:
        raise LaunchError(
            "zero_optimization.stage 0 splits nothing, and DeepSpeed then tells no gradient norm."
            " Use accelerate_configs/ddp.yaml, or stage 1, 2 or 3."
        )
    ours = {
        "train_micro_batch_size_per_gpu": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.global_batch,
        "gradient_clipping": arguments.max_grad_norm or 0.0,
    }
    for name, value in ours.items():
        config[name] = value


def keep_sums_exact(accelerator: Accelerator) -> None:
    """Lets FSDP2 compute in 16 bits, but neither round the loss to them nor add gradients in them.

    Accelerate's own policy does both; DDP does neither.
    """
    dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16  # fp8's rest
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def check_launch(
    accelerator: Accelerator, arguments: Arguments, launch: LaunchSettings, device_type: str
) -> None:
    """Makes sure that what runs is what was asked for; Accelerate falls back without a word.

    Raises:
        LaunchError: another number of processes, another device or another backend.
    """
    if accelerator.num_processes != launch.num_processes:
        raise LaunchError(
            f"{launch.num_processes} processes were started (WORLD_SIZE), but Accelerate runs"
            f" {accelerator.num_processes}. Check distributed_type and num_processes in the file"
            " given to accelerate launch."
        )
    if accelerator.device.type != device_type:
        raise LaunchError(
            f"--device {arguments.device} means {device_type} here, but Accelerate chose"
            f" {accelerator.device.type}. Give --device {accelerator.device.type}."
        )
    active = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}
    found = active.get(accelerator.distributed_type, "")
    if launch.backend in active.values() and found != launch.backend:
        raise LaunchError(
            f"{launch.config_file or 'The launcher'} asks for {launch.backend}, but Accelerate runs"
            f" {accelerator.distributed_type.value}. Check distributed_type in that file."
        )


def quiet_libraries() -> None:
    """Keeps what other packages say of their own inner life off the console."""
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights, each save
    # Of kernels for generating text, as soon as peft finds the package.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    # Sharding backends call torch's exchanges by their old names, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Rows are full, or padded at their end only and masked by their labels: no mask is needed.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "attention_mask" not in record.getMessage()
    )


def find_device_type(device: str, launch: LaunchSettings) -> str:
    """The device type that `--device` stands for on this machine.

    Raises:
        LaunchError: it is not there, or several processes would share the CPU unasked.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        if launch.use_cpu:
            return "cpu"
        device = next(name for name, is_there in found.items() if is_there)
        if device == "cpu" and launch.backend != "single":
            raise LaunchError(
                f"This machine has no accelerator that torch {torch.__version__} can use, and"
                f" {launch.config_file or 'the launcher'} starts {launch.num_processes} processes"
                f" with {launch.backend}. Give --device cpu to try it out on the CPU, over gloo."
            )
        return device
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
    process. The number is therefore always set here: for torch, and with it for OpenMP, oneDNN and
    MKL; the variable reaches neither the tokenizers nor what runs beside a forward pass.
    """
    if num_threads is None:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_threads = max(1, count_cores() // local_processes)
    torch.set_num_threads(num_threads)


def describe_threads() -> str:
    """The threads of this process, and what the environment said instead, for the log."""
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    undone = f" (OMP_NUM_THREADS={asked} undone)" if asked not in (None, str(threads)) else ""
    return f"{threads} thread{'' if threads == 1 else 's'}{undone}"


def count_cores() -> int:
    """Cores that this process may use; on systems that do not tell, those of the machine.

    A container that may use the time of two cores still sees all of its machine's.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = read_cpu_quota()
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def read_cpu_quota(file: Path = CPU_QUOTA_FILE) -> float | None:
    """How many cores' time the container of this process may use; None for all."""
    try:
        quota, period = file.read_text("ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def make_deterministic(device_type: str) -> None:
    """Lets torch choose algorithms that give the same bits each time; a CPU does so anyway."""
    if device_type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # which transformers reads
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would also write over all memory that is taken, so that what reads too early shows.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seeds Python, NumPy and torch: all ranks alike to build weights, apart for dropout."""
    set_seed((seed + rank) % 2**32)  # NumPy takes no larger ones
