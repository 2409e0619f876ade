"""Flips bits of weights that lie on both of two processes, and notes what is found.

    accelerate launch --config_file accelerate_configs/ddp.yaml replica_worker.py CASES OUTPUT

CASES is a JSON object: the name of a backend to the environment that a launch under it gives its
processes. OUTPUT gets one: the name to what each rank found, fault by fault.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from arguments import resolve_batch_sizes
from llm_training.argument_parsing import read_arguments
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.launch import build_accelerator, seed_everything
from llm_training.launch_settings import read_launch_settings
from llm_training.modeling import build_model, fit_config, load_config
from llm_training.optim import build_optimizer
from llm_training.ranks import leave
from llm_training.replicas import BITS, differing_replicas, has_replicas

BLOCK_SIZE = 16
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WORDS = [
    *("--model_type", "llama", "--config_overrides", json.dumps(SIZES)),
    *("--train_file", __file__, "--tokenizer_name", "byte", "--block_size", str(BLOCK_SIZE)),
    *("--global_batch_size", "2", "--max_steps", "1", "--eval_steps", "null"),
    *("--device", "cpu", "--num_threads", "1", "--mixed_precision", "fp32"),
]
FAULTY_RANK = 1


def flip(tensor: Tensor) -> None:
    """Flips a bit of the last element on the faulty rank, if it has any; again undoes it."""
    if distributed.get_rank() == FAULTY_RANK:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.detach().view(-1).view(BITS[local.element_size()])[-1:] ^= 1


def trained(accelerator: Accelerator, arguments: Any, tp_size: int) -> nn.Module:
    """A small Llama as Accelerate prepares it, after one step on other rows on each rank."""
    config = load_config(arguments, None)
    fit_config(config, arguments, 260, BLOCK_SIZE)
    seed_everything(1)
    network = CausalLMWithLoss(build_model(config, arguments, tp_size=tp_size))
    optimizer = build_optimizer(network, arguments, "cpu")
    model, optimizer = accelerator.prepare(network, optimizer)
    rank = 0 if tp_size > 1 else accelerator.process_index
    tokens = torch.randint(0, 256, (1, BLOCK_SIZE), generator=torch.Generator().manual_seed(rank))
    loss, _ = model(input_ids=tokens, labels=tokens)
    accelerator.backward(loss)
    optimizer.step()
    return model


def replicated(model: nn.Module, suffix: str) -> Tensor:
    """The weight or buffer whose name ends like this."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return next(tensor for name, tensor in named if name.endswith(suffix))


def found_under(env: dict[str, str]) -> dict[str, Any]:
    """What is found in the model of one backend, sound and with each fault."""
    os.environ.update(env)
    launch = read_launch_settings()
    arguments = read_arguments(WORDS, num_processes=launch.data_parallel_size)
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    model = trained(accelerator, arguments, launch.tp_size)
    found: dict[str, Any] = {
        "copies": has_replicas(accelerator),
        "sound": differing_replicas(accelerator, model),
    }
    for suffix in ("q_proj.weight", "norm.weight", "inv_freq"):
        tensor = replicated(model, suffix)
        flip(tensor)
        found[suffix] = differing_replicas(accelerator, model)
        flip(tensor)
    found["mended"] = differing_replicas(accelerator, model)
    if not env:
        found |= found_in_meshes(accelerator)
    return found


def found_in_meshes(accelerator: Accelerator) -> dict[str, Any]:
    """The same for weights that are cut over one dimension of a mesh and copied over the other."""
    found = {}
    for name, shape in {"copied": (2, 1), "cut": (1, 2)}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        module = nn.Module()
        weight = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
        module.weight = nn.Parameter(weight)
        sound = differing_replicas(accelerator, module)
        flip(module.weight)
        found[name] = [sound, differing_replicas(accelerator, module)]
    return found


def main() -> None:
    """Runs the cases of the file named first, and writes to the file named second."""
    cases: dict[str, dict[str, str]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    environment, records = dict(os.environ), {}
    for name, env in cases.items():
        found = found_under(env)
        records[name] = [None] * distributed.get_world_size()
        distributed.all_gather_object(records[name], found)
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(records), "utf-8")


if __name__ == "__main__":
    main()
    leave(0)
