"""What a run would do and need, without doing it: `--dry_run`.

One process speaks for all, and no weight is allocated. docs/planning.md explains the numbers.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from arguments import Arguments, resolve_batch_sizes
from llm_training.argument_checks import masks_documents
from llm_training.checkpoint_files import whole_ones
from llm_training.checkpointing import check_identity
from llm_training.data import DataError
from llm_training.data.estimate import DataOutlook, prepare_or_estimate
from llm_training.data.rows.store_rows import Rows
from llm_training.data.rows.windows import train_rows, validation_rows, validation_set_rows
from llm_training.flops import model_flops_per_token
from llm_training.launch import (
    LaunchError,
    check_combination,
    check_speed_choices,
    choose_precision,
    find_device_type,
    quiet_libraries,
)
from llm_training.launch_checks import precision_conflict
from llm_training.launch_settings import LaunchSettings, read_launch_settings
from llm_training.memory_needs import backend_of
from llm_training.metrics import check_metrics
from llm_training.modeling import (
    check_existing,
    count_parameters,
    count_trained,
    fit_config,
    load_config,
    model_fingerprint,
)
from llm_training.needs import estimate_needs
from llm_training.network import build_network
from llm_training.optim import block_matrices, check_optimizer, split_by_decay
from llm_training.outputs import OutputFolder
from llm_training.planning import Plan, PlanError, make_plan
from llm_training.reporting import row_lines
from llm_training.run_data import check_metric_for_best_model
from llm_training.stopping import StopRequest
from llm_training.throughput import format_count

# Tokens for each parameter with which a given amount of computing gives the lowest loss.
CHINCHILLA_RATIO = 20


def dry_run(arguments: Arguments, request: StopRequest) -> Plan | None:
    """Prints what the run would do and need; returns its plan on rank 0, None elsewhere.

    Raises:
        PlanError: it will not fit.
        LaunchError, DataError, ModelError: as from the run itself.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    quiet_libraries()
    launch = read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    stand_in = stand_in_for(arguments, launch)
    device_type, precision = stand_in.device.type, stand_in.precision
    check_optimizer(arguments, device_type)

    def say(line: str) -> None:
        request.check()
        print(line, flush=True)

    outlook = prepare_or_estimate(arguments, tokenizer_source=arguments.model_name_or_path, say=say)
    config = load_config(arguments, outlook.data.tokenizer)
    unused = check_existing(config, arguments)
    block_size = fit_config(
        config,
        arguments,
        outlook.data.vocab_size,
        arguments.block_size,
        tokenizer=outlook.data.tokenizer,
        say=say,
    )
    rows, validation = rows_of(outlook, arguments, block_size)
    plan = make_plan(arguments, batch, rows, block_size)
    form: list[str] = []

    def build(plain: Arguments, alone: LaunchSettings, own_config: Any) -> nn.Module:
        accelerator = cast(Accelerator, stand_in)  # what is asked of it, it has
        network, lines = build_network(accelerator, plain, alone, own_config, batch, block_size)
        form[:] = lines
        return network

    needs = estimate_needs(
        build,
        arguments,
        launch,
        config,
        plan,
        device=stand_in.device,
        precision=precision,
        document_mask=masks_documents(arguments),
        token_bytes=outlook.num_bytes,
    )
    lines = outlook.data.lines()
    lines += row_lines(rows, validation) if not outlook.estimated else []
    lines += model_lines(needs.network, config, f"{precision} on {device_type}{split_of(launch)}")
    lines += [*unused, *form, *optimizer_lines(needs.network, arguments)]
    lines += plan_lines(plan, needs.network, config, is_estimated=bool(outlook.estimated))
    lines += needs.lines()
    print("\n".join(lines), flush=True)
    if unwritable := [*folder_problems(arguments)]:
        raise PlanError("\n".join(unwritable))
    print("\n".join(resume_lines(arguments, needs.network, plan)), flush=True)
    if problems := [*needs.problems(arguments, launch, device_type)]:
        raise PlanError("\n".join(problems))
    return plan


def stand_in_for(arguments: Arguments, launch: LaunchSettings) -> SimpleNamespace:
    """What the network asks of an Accelerator, without starting one: it would wait for others.

    Raises:
        LaunchError: as from `build_accelerator`, as far as one process can tell.
    """
    device_type = find_device_type(arguments.device, launch)
    precision = choose_precision(arguments.mixed_precision, device_type)
    check_speed_choices(arguments, launch, device_type)
    name = {"no": "fp32"}.get(precision, precision)
    if conflict := precision_conflict(name, launch):
        raise LaunchError(f"{conflict} (mixed_precision={arguments.mixed_precision}).")
    check_combination(launch)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local_rank}" if device_type == "cuda" else device_type)
    # fp8 changes modules when they have content; their memory is about that of bf16.
    mixed = "bf16" if precision == "fp8" else precision
    return SimpleNamespace(device=device, mixed_precision=mixed, precision=name)


def rows_of(
    outlook: DataOutlook, arguments: Arguments, block_size: int
) -> tuple[Rows | None, dict[str, Rows]]:
    """The rows of training and of each validation set, whose main one has the name "".

    Of estimated tokens, they are as if these made one stream.

    Raises:
        DataError: there is nothing to train on.
        MetricError: one that is to be computed in evaluations cannot be.
    """
    if outlook.estimated:
        arguments = dataclasses.replace(arguments, packing="stream", document_mask=False)
    rows = train_rows(outlook.data, arguments, block_size)
    if rows is None and not arguments.streaming:
        raise DataError("There is no training data: give --train_file or --dataset_name.")
    if arguments.eval_steps is None:
        return rows, {}
    check_metric_for_best_model(arguments, check_metrics(arguments.eval_metrics))
    main = validation_rows(outlook.data, arguments, block_size)
    sets = validation_set_rows(outlook.data, arguments, block_size)
    return rows, ({} if main is None else {"": main}) | sets


def split_of(launch: LaunchSettings) -> str:
    """Between how many processes the run is split, and how."""
    if launch.num_processes == 1:
        return ""
    by: str = "tensor parallel" if launch.tp_size > 1 else backend_of(launch)
    by += " with context parallel" if launch.cp_size > 1 else ""
    return f", {by} x {launch.num_processes}"


def model_lines(network: nn.Module, config: Any, where: str) -> list[str]:
    """What is trained, and its parameters."""
    total = sum(parameter.numel() for parameter in network.parameters())
    counted, outside = count_parameters(network)
    padding = f" ({total - counted:,} of padding not counted)" if total > counted else ""
    trained = count_trained(network)
    are_trained = "all trained" if trained == counted else f"{trained:,} of them trained"
    return [
        f"Model    {config.model_type}, {counted:,} parameters, {are_trained}{padding};"
        f" {counted - outside:,} in embeddings; {where}"
    ]


def optimizer_lines(network: nn.Module, arguments: Arguments) -> list[str]:
    """Which parameters are decayed, and which Muon takes."""
    decayed, kept = split_by_decay(network)
    sizes = [sum(p.numel() for p in group) for group in (decayed, kept)]
    line = (
        f"Decay    {sizes[0]:,} parameters in {len(decayed)} matrices by"
        f" {arguments.weight_decay:g}; {sizes[1]:,} in {len(kept)} vectors and tables not"
    )
    if arguments.optim == "muon":
        line += f"; Muon takes {sum(p.numel() for p in block_matrices(network)):,}, AdamW the rest"
    return [line]


def plan_lines(plan: Plan, network: nn.Module, config: Any, *, is_estimated: bool) -> Iterator[str]:
    """Length, learning rate and amount of computing."""
    for line in plan.lines():
        if line.startswith("Length"):
            per_epoch = plan.rows and f"{plan.rows.num_rows / plan.batch.global_batch:,.1f}"
            line += f"; {per_epoch} steps an epoch" if per_epoch else ""
            line += " (estimated)" if is_estimated else ""
        if not line.startswith("Rate"):
            yield line
    if plan.is_open:
        yield "Rate     follows from the steps; --dry_run_steps 10 tells about how many fit"
        return
    last = plan.total_steps - 1
    points = (0, plan.schedule.warmup_steps, last // 2, 3 * last // 4, last)
    yield from plan.rate_lines(points)
    tokens = plan.num_samples * plan.block_size
    ratio = tokens / max(1, count_parameters(network)[0])
    flops = model_flops_per_token(network, config, plan.block_size)
    computing = f"{flops:.3g} FLOPs a token, {flops * tokens:.3g} in all; " if flops else ""
    yield (
        f"Compute  {computing}{ratio:.2g} tokens a parameter"
        f" (Chinchilla: {CHINCHILLA_RATIO}, which takes"
        f" {format_count(CHINCHILLA_RATIO * tokens / ratio)})"
    )


def resume_lines(arguments: Arguments, network: nn.Module, plan: Plan) -> list[str]:
    """Where the run would begin, or go on.

    Raises:
        OutputError, CheckpointError: what lies in the output folder is of something else.
    """
    output = OutputFolder(str(arguments.output_dir))
    output.refuse_what_is_not_ours(start_anew=arguments.resume_from_checkpoint == "none")
    newest = next(iter(whole_ones(output.checkpoints)), None)
    if newest is None or arguments.resume_from_checkpoint != "auto":
        return [f"Output   {output.path}"]
    real = dataclasses.replace(arguments, dry_run=False, dry_run_steps=None)
    if output.read_result() is not None and not output.changed_arguments(real):
        return [f"Resume   not at all: {output.path} already holds this run, finished"]
    identity = {  # but for the data, which may be estimated here
        "model": model_fingerprint(network),
        "block_size": plan.block_size,
        "global_batch_size": plan.batch.global_batch,
    }
    if arguments.seed is not None:
        identity["seed"] = arguments.seed
    total_steps = None if plan.is_open else plan.total_steps
    allowed = check_identity(newest, identity, total_steps, arguments.allow_resume_change)
    where = f"Resume   from {newest.path} at step {newest.step:,}: only what is left is trained"
    return [where, *allowed]


def folder_problems(arguments: Arguments) -> Iterator[str]:
    """Whether this user may write what the run will write."""
    for name in ("output_dir", "cache_dir"):
        path = Path(str(getattr(arguments, name))).expanduser().absolute()
        parent = next(folder for folder in (path, *path.parents) if folder.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            reason = error.strerror or error
            yield (
                f"--{name} {path} cannot be written ({reason}): give a folder that this user may"
                " write to."
            )
