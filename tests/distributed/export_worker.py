"""Trains tiny models for two steps, exports them, and notes what each process saw of it.

    accelerate launch --config_file accelerate_configs/ddp.yaml export_worker.py FOLDER CASE ...

FOLDER gets a model folder for each case, beside it a JSON object of facts for each process. Every
process trains on the same rows, so that the means over processes are what one process computes.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from arguments import Arguments, BatchSizes
from llm_training import export
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.export import ExportError, export_model
from llm_training.launch import build_accelerator
from llm_training.launch_settings import read_launch_settings
from llm_training.modeling import build_model
from llm_training.ranks import leave
from llm_training.updates import backward, finish_step
from tests.continuations import continue_text

VOCABULARY, LENGTH = 300, 16
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    ),
}
MATRICES = {"gpt2": "h.0.mlp.c_fc.weight", "llama": "layers.0.mlp.up_proj.weight"}
TOKENIZER = train_tokenizer("byte", ["abc"], VOCABULARY)
# Faults of rank 0 alone, which all ranks must hear of. They use the model of the case before.
FAULTS = ("disk_full", "wrong_part")


class Parts(NamedTuple):
    """A model in training: as it is prepared, and the Hugging Face model inside."""

    accelerator: Accelerator
    model: nn.Module
    network: PreTrainedModel
    optimizer: AcceleratedOptimizer


def build(model_type: str, precision: str) -> Parts:
    """A tiny model after two steps of gradient descent, prepared for the backend."""
    launch = read_launch_settings()
    arguments = Arguments(device="cpu", num_threads=1, max_grad_norm=0.0)
    arguments.mixed_precision = precision  # type: ignore[assignment]
    sizes = BatchSizes(1, 1, launch.data_parallel_size, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=sizes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # ZeRO-3 would leave weights as small as these whole, and keep them after use.
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        zero.update({f"stage3_{limit}": 0 for limit in limits})
    torch.manual_seed(0)
    network = build_model(CONFIGS[model_type], arguments, tp_size=launch.tp_size)
    if model_type == "llama":
        network.model.norm.weight.data.uniform_(0.5, 1.5)
        network.model.norm.weight.requires_grad_(False)  # backends treat what is not trained apart
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    model, optimizer = accelerator.prepare(CausalLMWithLoss(network), optimizer)
    parts = Parts(accelerator, model, network, optimizer)
    train(parts, seeds=(0, 1))
    return parts


def train(parts: Parts, seeds: tuple[int, ...]) -> float:
    """A step for each seed; returns the loss of the last."""
    for seed in seeds:
        rows = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        loss, _ = parts.model(rows, rows)
        mean = loss / (2 * (LENGTH - 1))
        backward(parts.accelerator, parts.model, mean)
        finish_step(parts.accelerator, parts.model, parts.optimizer, None, lambda norm: True)
    return float(mean.detach())


def export_case(parts: Parts, folder: Path) -> dict[str, Any]:
    """Exports between an evaluation and more training; returns what this process saw."""
    accelerator, model, network, _ = parts
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    model.train()
    network.base_model.eval()  # one part is in another mode than the rest
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    opened = export_model(accelerator, model, network, None, folder)
    is_undisturbed = (
        modes == [m.training for m in model.modules()],
        torch.equal(random_state, torch.get_rng_state()),
    )
    model.train()
    return {
        "rank": accelerator.process_index,
        "processes": accelerator.num_processes,
        "backend": accelerator.distributed_type.value,
        "split_weights": describe_split(network),
        "opened": None if opened is None else str(opened.device),
        "sample": None if opened is None else speak(accelerator, opened),
        "modes_kept": is_undisturbed[0],
        "random_state_kept": is_undisturbed[1],
        "loss_afterwards": train(parts, seeds=(2, 3)),
    }


def speak(accelerator: Accelerator, opened: PreTrainedModel) -> str:
    """A sample from the model as it was opened again; the other processes do not take part."""
    with accelerator.autocast():
        return continue_text(opened, TOKENIZER, "def ", max_new_tokens=8, temperature=0.5)


def describe_split(network: PreTrainedModel) -> str:
    """How this process holds a matrix of the model: whole, or which part."""
    weight = network.get_parameter(
        f"{network.base_model_prefix}.{MATRICES[network.config.model_type]}"
    )
    if isinstance(weight, DTensor):
        return str(weight.placements)
    if hasattr(weight, "ds_id"):
        part: Any = weight
        return f"1/{part.ds_numel // part.ds_tensor.numel()}"
    return "master apart" if hasattr(weight, "_hp_mapping") else "whole"


def fault_case(parts: Parts, folder: Path, fault: str) -> dict[str, Any]:
    """What this process is told of a fault of rank 0."""
    accelerator, model, network, _ = parts
    gather = export.gather_weights

    def save_nothing(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def gather_wrongly(model: nn.Module, *, keep: bool, **how: bool) -> dict[str, Tensor]:
        weights = gather(model, keep=keep, **how)
        if keep:  # as if the parts of two ranks had been put together in the wrong order
            weights["lm_head.weight"] = weights["lm_head.weight"].roll(VOCABULARY // 2, 0)
        return weights

    if accelerator.is_main_process:
        folder.mkdir(parents=True)
        (folder / "of_before").touch()
    save = PreTrainedModel.save_pretrained
    if fault == "disk_full":
        PreTrainedModel.save_pretrained = save_nothing  # type: ignore[method-assign]
    else:
        export.gather_weights = gather_wrongly
    start, told = time.monotonic(), None
    try:
        export_model(accelerator, model, network, None, folder)
    except ExportError as error:
        told = str(error)
    finally:
        PreTrainedModel.save_pretrained = save  # type: ignore[method-assign]
        export.gather_weights = gather
    return {"told": told, "seconds": time.monotonic() - start}


def run_cases(folder: Path, cases: list[str]) -> None:
    """Runs the cases, such as `llama-fp32` or `disk_full`, one after the other."""
    parts: Parts | None = None
    for case in cases:
        if case in FAULTS:
            assert parts is not None
            facts = fault_case(parts, folder / "faults" / case / case, case)
            rank = parts.accelerator.process_index
        else:
            parts = None
            forget_accelerator()
            parts = build(*case.split("-"))
            facts = export_case(parts, folder / case)
            rank = parts.accelerator.process_index
        (folder / f"{case}.{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def forget_accelerator() -> None:
    """Lets the next case have a precision of its own, among the same processes."""
    gc.collect()
    gc.freeze()  # what is left, libraries above all, need not be looked through again
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
