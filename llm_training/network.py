"""The network of a run: the model, in the form in which its device computes it best."""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedModel

from arguments import Arguments, BatchSizes
from llm_training.argument_checks import masks_documents
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.compiling import keep_compiled_code
from llm_training.cpu_dropout import speed_up_dropout
from llm_training.cpu_speed import fast_path_line, fuse_gelu, keep_memory_warm
from llm_training.float8 import Float8Error, use_float8
from llm_training.frozen_dtype import FrozenDtypeError, hold_frozen
from llm_training.gpu_speed import Kernel, LigerError, choose_attention, set_tf32, use_liger_kernel
from llm_training.launch_settings import LaunchSettings
from llm_training.lora import LoraError, add_adapters
from llm_training.modeling import (
    ModelError,
    build_model,
    check_row_split,
    choose_chunked_loss,
    fit_vocab,
)
from llm_training.neftune import add_embedding_noise
from llm_training.parameter_patterns import PatternError, freeze_parameters, rate_lines
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
    device_type = accelerator.device.type
    gpu_lines = set_tf32(
        arguments.tf32, precision=precision_name(accelerator), device_type=device_type
    )
    kernel, kernel_lines = choose_kernel(accelerator, arguments, config)
    is_fast_path = device_type == "cpu" and arguments.cpu_fast_path
    memory = keep_memory_warm() if is_fast_path else ""
    with_kernel = dataclasses.replace(arguments, attn_implementation=kernel)
    vocab_lines: list[str] = []
    model = build_model(
        config,
        with_kernel,
        tp_size=launch.tp_size,
        device_type=device_type,
        say=vocab_lines.append,
    )
    vocab_lines += fit_vocab(model, arguments, tp_size=launch.tp_size)
    is_zero = launch.backend == "deepspeed"
    frozen_type = precision_name(accelerator) if is_zero else "fp32"
    tuned_lines = choose_trained(model, arguments, frozen_type)
    try:
        tuned_lines += hold_frozen(
            model, arguments, precision=precision_name(accelerator), device_type=device_type
        )
    except FrozenDtypeError as error:
        raise ModelError(str(error)) from error
    check_row_split(model, block_size, launch.cp_size)
    rows_at_once = max(batch.per_device, arguments.per_device_eval_batch_size or 0)
    is_chunked, lines = choose_chunked_loss(
        model,
        arguments.chunked_loss,
        num_positions=rows_at_once * block_size // launch.cp_size,
        device_type=device_type,
        tp_size=launch.tp_size,
    )
    if is_fast_path:
        # torch draws the masks in compiled code, and for ranks that share rows or heads.
        draws_bits = not arguments.torch_compile and launch.tp_size == launch.cp_size == 1
        num_dropouts = speed_up_dropout(model) if draws_bits else 0
        lines = [fast_path_line(fuse_gelu(model), num_dropouts, memory), *lines]
    elif device_type != "cpu" and (num_fused := fuse_gelu(model)):
        gpu_lines.append(f"GELU     fused in {num_fused} blocks")
    if arguments.torch_compile:
        scope = arguments.torch_compile_scope
        lines = [keep_compiled_code(arguments.cache_dir, scope), *lines]
    network = CausalLMWithLoss(
        model, chunked_loss=is_chunked, label_smoothing=arguments.label_smoothing_factor
    )
    tuned_lines += add_embedding_noise(
        network, arguments.neftune_noise_alpha, num_parts=launch.cp_size
    )
    gpu_lines += kernel_lines + speed_up(accelerator, arguments, network)
    return network, [*tuned_lines, *gpu_lines, *vocab_lines, *lines]


def choose_trained(model: PreTrainedModel, arguments: Arguments, frozen_type: str) -> list[str]:
    """Adapters, frozen parameters and rates as they are asked for; returns what the log says.

    Args:
        frozen_type: in which the backend holds what is not trained: fp32, bf16 or fp16.

    Raises:
        ModelError: the model has no place for them, or no parameters of these names.
    """
    try:
        lines = add_adapters(model, arguments)
        lines += freeze_parameters(model, arguments, held_in=frozen_type)
        return lines + rate_lines(model, arguments)
    except (LoraError, PatternError) as error:
        raise ModelError(str(error)) from error


def choose_kernel(
    accelerator: Accelerator, arguments: Arguments, config: PretrainedConfig
) -> tuple[Kernel | None, list[str]]:
    """The attention kernel, None for what transformers takes, and what the log says of it.

    Raises:
        ModelError: flash attention was asked for in fp32.
    """
    asked, precision = arguments.attn_implementation, precision_name(accelerator)
    if "flash" in (asked or "") and precision == "fp32":
        raise ModelError(
            f"--attn_implementation {asked} computes in 16 bits alone, and this run in fp32: give"
            " --mixed_precision bf16, or --attn_implementation sdpa."
        )
    return choose_attention(
        asked,
        config,
        is_masked=masks_documents(arguments),
        precision=precision,
        device_type=accelerator.device.type,
    )


def speed_up(
    accelerator: Accelerator, arguments: Arguments, network: CausalLMWithLoss
) -> list[str]:
    """Puts other kernels in, where they were asked for; returns what the log says of them.

    Raises:
        ModelError: this model has no place for them.
    """
    lines = []
    try:
        if arguments.use_liger_kernel:
            lines.append(use_liger_kernel(network.model))
        if precision_name(accelerator) == "fp8":
            lines.append(use_float8(accelerator, network, network.model.get_output_embeddings()))
    except (Float8Error, LigerError) as error:
        raise ModelError(str(error)) from error
    return lines
