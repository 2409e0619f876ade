"""What a run says of itself: before it begins, to its reviewers, and when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from arguments import Arguments, describe
from llm_training.modeling import CausalLMWithLoss, count_parameters


def model_line(accelerator: Accelerator, network: CausalLMWithLoss) -> str:
    """What is trained, in which precision, on what."""
    parameters, outside_embeddings = count_parameters(network)
    precision = accelerator.mixed_precision.replace("no", "fp32")
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    return (
        f"Model    {network.config.model_type}, {parameters:,} parameters, {outside_embeddings:,}"
        f" of them outside of embeddings; {precision} on {accelerator.device}{threads}"
    )


def resume_lines(path: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """Where the run goes on, and with which other arguments than before."""
    return [
        f"Resume   from {path} at step {step:,}",
        *(f"Changed  {n}: {old} at the last start, now {new}" for n, (old, new) in changed.items()),
    ]


def run_parameters(
    arguments: Arguments, data_fingerprint: str, network: nn.Module
) -> dict[str, Any]:
    """What a reviewer should know of the run: every argument, the data, the sizes, the versions."""
    parameters, outside_embeddings = count_parameters(network)
    return describe(arguments) | {
        "data_fingerprint": data_fingerprint,
        "num_parameters": parameters,
        "num_parameters_outside_embeddings": outside_embeddings,
        "torch_version": torch.__version__,
        "accelerate_version": accelerate.__version__,
        "transformers_version": transformers.__version__,
    }


def summary_lines(result: dict[str, Any]) -> list[str]:
    """How a run ended, read off its result.json."""
    early = ", stopped early" if result["stopped_early"] else ""
    lines = [f"Done     {result['step']:,} steps{early}, {result['tokens']:,} tokens predicted"]
    if result["last_loss"] is not None:
        lines.append(
            f"Loss     {result['first_loss']:.4f} at the start, {result['last_loss']:.4f} at the"
            f" end, {result['best_loss']:.4f} at best (step {result['best_step']}): validation,"
            " nats per token"
        )
    if result["sample"] is not None:
        lines += ["Sample", *("    " + line for line in result["sample"].splitlines())]
    return [*lines, f"Model    {result['model']}", f"Review   {result['review']}"]
