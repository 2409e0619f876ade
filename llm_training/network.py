"""The network of a run: the model, in the form in which its device computes it best."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator
from transformers import PretrainedConfig

from arguments import Arguments, BatchSizes
from llm_training.cpu_speed import fast_path_line, fuse_gelu, keep_memory_warm
from llm_training.launch_settings import LaunchSettings
from llm_training.modeling import (
    CausalLMWithLoss,
    ModelError,
    build_model,
    check_row_split,
    choose_chunked_loss,
)
from llm_training.reporting import precision_name


def build_network(
    accelerator: Accelerator,
    arguments: Arguments,
    launch: LaunchSettings,
    config: PretrainedConfig,
    batch: BatchSizes,
    block_size: int,
) -> tuple[CausalLMWithLoss, list[str]]:
    """The model with its loss, before any backend has seen it, and what the log says of its form.

    Raises:
        ModelError: it cannot be had, split or computed as was asked.
    """
    kernel = arguments.attn_implementation or ""
    if "flash" in kernel and precision_name(accelerator) == "fp32":
        raise ModelError(
            f"--attn_implementation {kernel} computes in 16 bits alone, and this run in fp32: give"
            " --mixed_precision bf16, or --attn_implementation sdpa."
        )
    is_on_cpu = accelerator.device.type == "cpu"
    is_fast_path = is_on_cpu and arguments.cpu_fast_path
    memory = keep_memory_warm() if is_fast_path else ""
    model = build_model(config, arguments, tp_size=launch.tp_size)
    check_row_split(model, block_size, launch.cp_size)
    rows_at_once = max(batch.per_device, arguments.per_device_eval_batch_size or 0)
    is_chunked, lines = choose_chunked_loss(
        model,
        arguments.chunked_loss,
        num_positions=rows_at_once * block_size // launch.cp_size,
        device_type=accelerator.device.type,
        tp_size=launch.tp_size,
    )
    if is_fast_path:
        lines = [fast_path_line(fuse_gelu(model), memory), *lines]
    if arguments.torch_compile:
        lines = [keep_compiled_code(arguments.cache_dir), *lines]
    return CausalLMWithLoss(model, chunked_loss=is_chunked), lines


def keep_compiled_code(cache_dir: str) -> str:
    """Has torch keep what it compiles beside the tokens, unless the environment says where.

    Its own place is a folder for temporary files, which many systems empty when they start.

    Returns:
        What the log says of it.
    """
    ours = str(Path(cache_dir).absolute() / "compiled")
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", ours)
    return (
        "Compile  the first step and the first evaluation compile the blocks, which takes up to"
        f" minutes; later starts find the code in {folder}"
    )
