"""torch.compile: what is compiled, where its code is kept, and the steps of CUDA graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn

from arguments import PrecisionArguments
from llm_training.speed_checks import GRAPH_MODES


def compile_plugin(arguments: PrecisionArguments) -> TorchDynamoPlugin:
    """What Accelerate is told of `--torch_compile`."""
    return TorchDynamoPlugin(
        backend="inductor" if arguments.torch_compile else "no",
        mode=arguments.torch_compile_mode,
        use_regional_compilation=arguments.torch_compile_scope == "blocks",
    )


def keep_compiled_code(cache_dir: str, scope: str = "blocks") -> str:
    """Has torch keep what it compiles beside the tokens, unless the environment says where.

    Its own place is a folder for temporary files, which many systems empty when they start.

    Returns:
        What the log says of it.
    """
    ours = str(Path(cache_dir).absolute() / "compiled")
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", ours)
    return (
        f"Compile  the first step and the first evaluation compile the {scope}, which takes up to"
        f" minutes; later starts find the code in {folder}"
    )


def mark_graph_steps(model: nn.Module, arguments: PrecisionArguments) -> None:
    """Tells CUDA graphs, where there are some, that each forward pass begins anew.

    Without the mark, torch would guess whether what the last pass returned is still needed.

    Args:
        model: as `accelerator.prepare` returned it.
    """
    if arguments.torch_compile and arguments.torch_compile_mode in GRAPH_MODES:
        model.register_forward_pre_hook(_mark_step)


def _mark_step(_: nn.Module, __: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()
