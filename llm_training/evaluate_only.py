"""Evaluating without training: a run's checkpoint, or a model as it is given."""

from __future__ import annotations

import dataclasses

from arguments import Arguments, resolve_batch_sizes
from llm_training.checkpointing import CheckpointFolder, agree_on_checkpoint
from llm_training.compiling import mark_graph_steps
from llm_training.data import DataError
from llm_training.evaluation import evaluate_sets, metrics_of
from llm_training.launch import build_accelerator, seed_everything
from llm_training.launch_settings import read_launch_settings
from llm_training.modeling import model_fingerprint
from llm_training.network import build_network
from llm_training.optim import build_optimizer
from llm_training.outputs import OutputFolder
from llm_training.ranks import agree_on_seed, sum_over_ranks
from llm_training.run_data import build_data, build_token_bytes, build_validation
from llm_training.stopping import Stopped, StopRequest, decide
from llm_training.tracking import evaluation_lines


def evaluate_only(arguments: Arguments, request: StopRequest) -> None:
    """Evaluates once: the run's checkpoint where there is one, else the model as it is given."""
    launch = read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    output = OutputFolder(str(arguments.output_dir))
    checkpoint, passed_over = agree_on_checkpoint(
        accelerator, output.checkpoints, arguments.resume_from_checkpoint
    )
    data, config, block_size = build_data(arguments, accelerator, request.check)
    validation = build_validation(arguments, accelerator, data, block_size, batch)
    if not validation:
        raise DataError("There is no validation data: give --validation_file.")
    token_bytes = build_token_bytes(arguments, data)
    seed_everything(agree_on_seed(arguments.seed))
    network, lines = build_network(accelerator, arguments, launch, config, batch, block_size)
    identity = {"model": model_fingerprint(network)}
    # FSDP2 shards a model together with its optimizer; nothing is stepped here.
    plain = dataclasses.replace(arguments, optim="adamw")
    optimizer = build_optimizer(network, plain, accelerator.device.type)
    model, _ = accelerator.prepare(network, optimizer)
    mark_graph_steps(model, arguments)
    if checkpoint:
        checkpoints = CheckpointFolder(accelerator, output.checkpoints, None, identity)
        checkpoints.check(checkpoint)
        lines += checkpoints.load(checkpoint, model, None)
    source = checkpoint.path if checkpoint else arguments.model_name_or_path or "untrained weights"
    accelerator.print("\n".join([*passed_over, *lines, f"Evaluating {source}"]), flush=True)
    judgements = evaluate_sets(
        accelerator,
        model,
        validation,
        arguments,
        batch,
        token_bytes=token_bytes,
        is_stopped=lambda: decide(sum_over_ranks(accelerator, *request.votes())).stop is not None,
    )
    if judgements is None:
        raise Stopped(request.reason or "SIGTERM", "before the evaluation was done")
    step = checkpoint.step if checkpoint else 0
    accelerator.print("\n".join(evaluation_lines(step, metrics_of(judgements))))
