"""What a run will need, told before it begins: memory and disk, beside what is there."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from arguments import Arguments
from llm_training.disk_needs import DiskNeed, disk_problems, estimate_disk, free_disk
from llm_training.launch_settings import LaunchSettings
from llm_training.memory_needs import (
    MemoryNeed,
    backend_of,
    estimate_memory,
    free_memory,
    memory_problems,
    optimizer_bytes,
)
from llm_training.planning import Plan
from llm_training.traced_memory import Outline

# Makes the network of a run from these; called where nothing takes memory.
Build = Callable[[Arguments, LaunchSettings, PretrainedConfig], nn.Module]
ATTENTION_DROPOUT_FIELDS = ("attn_pdrop", "attention_dropout")


@dataclass(frozen=True)
class Needs:
    """What a run needs, and what it finds.

    Attributes:
        network: the model without content.
        free_memory: of one device, for one process; free_disk: below `output_dir`.
    """

    network: nn.Module
    memory: MemoryNeed
    disk: DiskNeed
    free_memory: int
    free_disk: int

    def lines(self) -> list[str]:
        """Both for a person."""
        return [self.memory.line(self.free_memory), self.disk.line(self.free_disk)]

    def problems(
        self, arguments: Arguments, launch: LaunchSettings, device_type: str
    ) -> Iterator[str]:
        """What will not fit, each with what to change."""
        yield from memory_problems(self.memory, self.free_memory, arguments, launch, device_type)
        yield from disk_problems(
            self.disk, Path(str(arguments.output_dir)), Path(arguments.cache_dir)
        )


def estimate_needs(
    build: Build,
    arguments: Arguments,
    launch: LaunchSettings,
    config: PretrainedConfig,
    plan: Plan,
    *,
    device: torch.device,
    precision: str,
    document_mask: bool = False,
    token_bytes: int = 0,
) -> Needs:
    """What the run of `plan` needs.

    Args:
        build: `network.build_network`, for the most part.
        precision: bf16, fp16, fp8 or fp32.
        token_bytes: of a token store that is still to be made.
    """
    outline = outline_of(build, arguments, launch, config, device.type)
    memory = estimate_memory(
        outline,
        arguments,
        launch,
        plan.batch,
        plan.block_size,
        precision=precision,
        document_mask=document_mask,
    )
    sizes = [(p.numel(), p.requires_grad) for p in outline.model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    is_adapter = arguments.lora_rank is not None and not arguments.merge_adapter
    disk = estimate_disk(
        arguments,
        num_parameters=trained,
        model_parameters=trained if is_adapter else sum(size for size, _ in sizes),
        optimizer_bytes=optimizer_bytes(outline.model, arguments.optim),
        backend=backend_of(launch),
        is_half=precision != "fp32",
        total_steps=None if plan.is_open else plan.total_steps,
        tokens=token_bytes,
    )
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Needs(
        network=outline.model,
        memory=memory,
        disk=disk,
        free_memory=free_memory(device, processes_here),
        free_disk=free_disk(Path(str(arguments.output_dir))),
    )


def outline_of(
    build: Build,
    arguments: Arguments,
    launch: LaunchSettings,
    config: PretrainedConfig,
    device_type: str,
) -> Outline:
    """The network of a run without content, in a form that a CPU can go through.

    No weight is loaded, and kernels that work on content alone are left out. A GPU's attention
    kernels keep no scores, also under dropout.
    """
    config, kernel = copy.deepcopy(config), arguments.attn_implementation
    if device_type != "cpu":
        kernel = "eager" if kernel == "eager" else "sdpa"
        for name in ATTENTION_DROPOUT_FIELDS:
            if kernel == "sdpa" and hasattr(config, name):
                setattr(config, name, 0.0)
    plain = dataclasses.replace(
        arguments,
        model_name_or_path=None,
        model_type=config.model_type,
        attn_implementation=kernel,
        torch_compile=False,
        use_liger_kernel=False,
        # Only new models are padded by themselves.
        pad_vocab_to_multiple_of=arguments.pad_vocab_to_multiple_of
        or (None if arguments.model_name_or_path is None else 1),
    )
    alone = dataclasses.replace(launch, tp_size=1)
    return Outline(lambda: build(plain, alone, config))
