"""AdamW, its two groups of parameters, and the learning rate set from outside."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from arguments import OptimizationArguments
from llm_training.zero_init import whole_shape

# One kernel for the whole update; on CPU the other forms are four to seven times slower.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters with and without weight decay; each stands in one of the lists once.

    Decayed are the weight matrices. Not decayed are vectors (norms, biases), for which zero is no
    natural rest, and embedding tables, whose rare rows would fade between the few steps that use
    them. A head tied to the embedding is the embedding; an untied head is a matrix.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = len(whole_shape(parameter)) >= 2 and id(parameter) not in tables
            (decayed if is_matrix else kept).append(parameter)
    return decayed, kept


def build_optimizer(
    model: nn.Module, arguments: OptimizationArguments, device_type: str
) -> torch.optim.AdamW:
    """AdamW over `model`'s trained parameters, fused where the device has it.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).
    """
    decayed, kept = split_by_decay(model)
    groups = [
        # One kernel takes either whole tensors or, in tensor parallelism, parts of them: not both.
        {"params": [p for p in parameters if isinstance(p, DTensor) == is_part], "weight_decay": w}
        for parameters, w in ((decayed, arguments.weight_decay), (kept, 0.0))
        for is_part in (False, True)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=device_type in FUSED_DEVICES,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
