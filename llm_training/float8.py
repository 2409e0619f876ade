"""Matrices of the blocks multiplied in 8 bits (fp8) by torchao, through Accelerate.

Weights, gradients and optimizer stay in float32, all other arithmetic as under bf16. Each matrix
product scales its two sides by their largest absolute values and rounds them to 8 bits.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs
from torch import nn

# Ada and Hopper are the first to multiply 8 bits.
MIN_CAPABILITY = (8, 9)
# A side of a matrix must be a multiple of it: torch._scaled_mm takes no other.
MULTIPLE = 16
# What picks the experts of a token: small, and a rounded choice is another choice.
ROUTERS = ("gate", "router")


class Float8Error(ValueError):
    """This run cannot multiply in 8 bits; the message says why and what to do."""


def check_float8(device_type: str, *, backend: str, tp_size: int = 1) -> None:
    """Makes sure that the machine and the launch can train in fp8.

    Raises:
        Float8Error: another kind of device, too old a GPU, or a backend that cannot.
    """
    instead = "Give --mixed_precision bf16 (or auto)."
    if device_type != "cuda":
        raise Float8Error(
            f"--mixed_precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada,"
            f" Hopper or newer), and this run is on {device_type}. {instead}"
        )
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        raise Float8Error(
            f"--mixed_precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper or"
            f" newer); {torch.cuda.get_device_name()} has {found}. {instead}"
        )
    if backend == "deepspeed" or tp_size > 1:
        other = "DeepSpeed" if backend == "deepspeed" else "tensor parallelism"
        raise Float8Error(
            f"--mixed_precision fp8 is not made for {other}: use accelerate_configs/ddp.yaml or"
            f" fsdp.yaml. Or: {instead}"
        )


def float8_recipe(*, emulate: bool = False) -> AORecipeKwargs:
    """What Accelerate tells torchao; `emulate` computes the same slowly on any device.

    Raises:
        Float8Error: torchao is not installed, or too old.
    """
    try:
        from torchao.float8 import Float8LinearConfig

        # FSDP2 gathers the weights in bf16, as ours are saved and compared by their own type.
        config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
        return AORecipeKwargs(config=config)
    except ImportError as error:
        raise Float8Error(
            f"--mixed_precision fp8 needs the package torchao ({error}): pip install torchao, or"
            " give --mixed_precision bf16."
        ) from error


def use_float8(accelerator: Accelerator, network: nn.Module, head: nn.Module | None) -> str:
    """Has `accelerator.prepare` convert the matrices that may be multiplied in 8 bits.

    Args:
        network: what will be prepared.
        head: its last layer, which keeps 16 bits.

    Returns:
        What the log says of it.

    Raises:
        Float8Error: it has no such matrix.
    """
    chosen, num_linear = choose_matrices(network, head)
    if not chosen:
        raise Float8Error(
            f"--mixed_precision fp8: of the {num_linear} linear layers of this model none can be"
            f" multiplied in 8 bits. It takes plain ones between the first and the last, with sides"
            f" that are multiples of {MULTIPLE}; GPT-2 has layers of its own kind. Use another"
            " model (llama, qwen3), other sizes, or --mixed_precision bf16."
        )
    handler: Any = accelerator.ao_recipe_handler
    handler.module_filter_func = lambda _, name: name in chosen
    return (
        f"Float8   {len(chosen)} of {num_linear} matrices, the rest in bf16; pays only together"
        " with --torch_compile true"
    )


def choose_matrices(network: nn.Module, head: nn.Module | None) -> tuple[set[str], int]:
    """Names of the linear layers to convert, and how many there are, the head included.

    The first and the last one before the head stay: errors there do most harm.
    """
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    inner = [(name, module) for name, module in linear if module is not head][1:-1]
    chosen = {
        name
        for name, module in inner
        if module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
        and name.rpartition(".")[2] not in ROUTERS
    }
    return chosen, len(linear)
