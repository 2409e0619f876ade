"""A run: its parts, and how they are built from the arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arguments import Arguments, BatchSizes, resolve_batch_sizes
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.checkpointing import Checkpoint, CheckpointFolder, agree_on_checkpoint
from llm_training.compiling import mark_graph_steps
from llm_training.control_files import ControlFiles
from llm_training.data import DataError
from llm_training.data.rows.ahead import Windows
from llm_training.data.rows.store_rows import Rows
from llm_training.data.rows.windows import train_rows
from llm_training.deadline import OPEN_STEPS, Deadline, DeadlineState
from llm_training.flops import utilization
from llm_training.health import HealthMonitor, HealthState, Verdict
from llm_training.launch import build_accelerator, seed_everything
from llm_training.launch_settings import LaunchSettings, read_launch_settings
from llm_training.modeling import model_fingerprint
from llm_training.needs import estimate_needs
from llm_training.network import build_network
from llm_training.optim import build_optimizer, check_optimizer
from llm_training.outputs import OutputFolder
from llm_training.planning import Plan, make_plan
from llm_training.ranks import agree_on_seed, find_shared_folder, limit_waiting
from llm_training.reporting import (
    full_ledger,
    model_line,
    peak_of_all,
    precision_name,
    provenance,
    resume_lines,
    row_lines,
)
from llm_training.resolved_arguments import as_settings
from llm_training.run_data import (
    build_data,
    build_token_bytes,
    build_validation,
    build_windows,
    end_at_turns,
    try_attention,
)
from llm_training.run_record import record_of_run
from llm_training.state import TrainState
from llm_training.stopping import StopRequest
from llm_training.system_metrics import HeldMemory, SystemMetrics
from llm_training.throughput import Throughput
from llm_training.tracking import Tracking, redact
from llm_training.updates import UnseenStep


@dataclass
class Run:
    """The parts of a run, built once and handed to the loop.

    `model` is what Accelerate has prepared, `network` the Hugging Face model at its core.
    """

    arguments: Arguments
    accelerator: Accelerator
    plan: Plan
    model: nn.Module
    network: PreTrainedModel
    optimizer: AcceleratedOptimizer
    tokenizer: PreTrainedTokenizerBase | None
    windows: Windows
    validation: Mapping[str, Rows]  # by the name of the set; "": the main one
    token_bytes: NDArray[np.int32] | None  # of each token, (V,), where they are counted
    checkpoints: CheckpointFolder
    checkpoint: Checkpoint | None
    state: TrainState
    tracking: Tracking
    output: OutputFolder
    facts: dict[str, Any]
    meter: Throughput
    mfu_per_speed: float | None  # model FLOPs utilization at 1 token a second, where it is known
    held_memory: HeldMemory
    system_metrics: SystemMetrics | None  # of rank 0's machine, where a tracker shows them
    health: HealthMonitor
    request: StopRequest
    controls: ControlFiles
    deadline: Deadline = field(default_factory=Deadline)
    stop: str | None = None  # why the run must end, once an evaluation was left for it
    open_step: OpenStep | None = None  # the last one, while it is not known how it ended


@dataclass(frozen=True)
class StepResult:
    """What came of one step, the same on every rank.

    Attributes:
        loss_sum: in nats over all ranks.
        grad_norm: before clipping; NaN where it was not measured.
        is_applied: whether the weights were updated.
        verdict: why not, but for fp16's overflows.
        norms_by_layer: of the gradients, where the step was left out for them or its loss.
    """

    loss_sum: float
    grad_norm: float
    is_applied: bool
    verdict: Verdict
    norms_by_layer: dict[str, float]


@dataclass(frozen=True)
class OpenStep:
    """A step that has been given to the device.

    Attributes:
        first_sample: where it began in the data; `TrainState.samples` is where it ended.
        sample_ids: (N,) int64, its rows over all ranks.
        num_tokens: predicted tokens over all ranks.
        outcome: how it ended, or what will tell.
    """

    first_sample: int
    sample_ids: NDArray[np.int64]
    num_tokens: int
    learning_rate: float
    outcome: StepResult | UnseenStep


def build_run(
    arguments: Arguments, output: OutputFolder, request: StopRequest | None = None
) -> Run:
    """Everything the loop needs; what may be wrong is met before anything is written."""
    request = request or StopRequest()
    launch = read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    check_optimizer(arguments, accelerator.device.type)
    checkpoint = open_output(arguments, accelerator, output)
    data, config, block_size = build_data(arguments, accelerator, request.check)
    rows = train_rows(data, arguments, block_size)
    if rows is None and not arguments.streaming:
        raise DataError("There is no training data: give --train_file or --dataset_name.")
    validation = build_validation(arguments, accelerator, data, block_size, batch)
    state = checkpoint.read_state() if checkpoint else TrainState(seed=0)
    state.deadline = deadline_of(state, arguments, batch, rows, block_size)
    plan = plan_from(state, arguments, batch, rows, block_size)

    drawn_seed = state.seed if checkpoint else None
    seed = agree_on_seed(drawn_seed if arguments.seed is None else arguments.seed)
    seed_everything(seed)
    state.seed = seed
    windows, data_mark = build_windows(arguments, accelerator, data, plan, state)
    request.check()
    network, form_lines = build_network(accelerator, arguments, launch, config, batch, block_size)
    end_at_turns(arguments, data, network.model)
    optimizer = build_optimizer(network, arguments, accelerator.device.type)
    facts = provenance(accelerator, data, network, block_size)
    checkpoints = CheckpointFolder(
        accelerator,
        output.checkpoints,
        arguments.save_total_limit,
        identity=run_identity(plan, data_mark, network, seed),
        about=redact(facts | {"arguments": as_settings(arguments), "origins": arguments.origins}),
        is_async=arguments.async_save,
    )
    ledger = full_ledger(data, rows, validation)
    lines = [*data.lines(), *row_lines(rows, validation), model_line(accelerator, network)]
    lines += [*form_lines, *plan.lines()]
    if accelerator.is_main_process:
        lines += need_lines(accelerator, arguments, launch, config, plan, windows.document_mask)
    if checkpoint:
        allowed = checkpoints.check(checkpoint, plan.total_steps, arguments.allow_resume_change)
        changed = output.changed_arguments(arguments)
        lines += [*resume_lines(checkpoint.path, checkpoint.step, changed), *allowed]
    accelerator.print("\n".join(lines), flush=True)

    request.check()
    model, optimizer = accelerator.prepare(network, optimizer)
    mark_graph_steps(model, arguments)
    limit_waiting(accelerator, arguments.ddp_timeout)
    try_attention(accelerator, model, network, windows, plan)
    if accelerator.is_main_process:
        output.write_opening(arguments, facts, ledger)
    # Before the trackers begin: what fails after them would leave a run there that never ends.
    token_bytes = build_token_bytes(arguments, data)
    system_metrics = system_metrics_of(arguments, accelerator, output)
    tracking = Tracking(
        accelerator,
        arguments,
        output.path,
        record=record_of_run(
            arguments,
            facts,
            data,
            data_mark,
            plan.length(),
            resumed_step=checkpoint.step if checkpoint else None,
        ),
    )
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        plan=plan,
        model=model,
        network=network.model,
        optimizer=optimizer,
        tokenizer=data.tokenizer,
        windows=windows,
        validation=validation,
        token_bytes=token_bytes,
        checkpoints=checkpoints,
        checkpoint=checkpoint,
        state=state,
        tracking=tracking,
        output=output,
        facts=facts,
        meter=Throughput(),
        mfu_per_speed=utilization(facts["flops_per_token"], peak_of_all(accelerator)),
        held_memory=HeldMemory(accelerator.device),
        system_metrics=system_metrics,
        health=build_health(arguments, state),
        request=request,
        controls=ControlFiles(output.path, say=accelerator.print),
        deadline=Deadline.of_run(
            arguments.max_train_hours,
            state.deadline,
            evaluates=bool(validation),
            # Weights and two moments, in fp32.
            checkpoint_bytes=12 * facts["num_trained_parameters"],
            model_bytes=4 * facts["num_parameters"],
        ),
    )


def need_lines(
    accelerator: Accelerator,
    arguments: Arguments,
    launch: LaunchSettings,
    config: PretrainedConfig,
    plan: Plan,
    document_mask: bool,
) -> list[str]:
    """What the run needs of memory and disk, and where it looks as if that were not there."""

    def build(plain: Arguments, alone: LaunchSettings, own: PretrainedConfig) -> nn.Module:
        return build_network(accelerator, plain, alone, own, plan.batch, plan.block_size)[0]

    try:
        needs = estimate_needs(
            build,
            arguments,
            launch,
            config,
            plan,
            device=accelerator.device,
            precision=precision_name(accelerator),
            document_mask=document_mask,
        )
    except Exception as error:  # an estimate must not keep a run from beginning
        return [f"Memory   not estimated: {type(error).__name__}: {error}"]
    problems = needs.problems(arguments, launch, accelerator.device.type)
    return [*needs.lines(), *(f"WARNING: {problem}" for problem in problems)]


def plan_from(
    state: TrainState,
    arguments: Arguments,
    batch: BatchSizes,
    rows: Rows | None,
    block_size: int,
) -> Plan:
    """The plan of the run as it is from `state` on."""
    return make_plan(
        arguments,
        batch,
        rows,
        block_size,
        done_steps=state.step,
        done_samples=state.samples,
        decay_from=state.decay_from,
        laid=DeadlineState.of(state.deadline),
    )


def deadline_of(
    state: TrainState,
    arguments: Arguments,
    batch: BatchSizes,
    rows: Rows | None,
    block_size: int,
) -> dict[str, Any] | None:
    """`TrainState.deadline` as it is now; hours that are new begin to count here.

    A run that had no such limit before goes on with the rate at which it stands.
    """
    hours = arguments.max_train_hours
    if hours is None or state.deadline is not None:
        return state.deadline if hours is not None else None
    new = DeadlineState(hours)
    if state.step:
        unlimited = dataclasses.replace(arguments, max_train_hours=None)
        before = plan_from(state, unlimited, batch, rows, block_size)
        new.anchor = before.schedule.laid_anew(state.step, OPEN_STEPS).anchor
    return dataclasses.asdict(new)


def open_output(
    arguments: Arguments, accelerator: Accelerator, output: OutputFolder
) -> Checkpoint | None:
    """Takes the output folder for this run; returns the checkpoint to continue from, if any."""
    if accelerator.is_main_process:
        output.claim(start_anew=arguments.resume_from_checkpoint == "none")
    accelerator.wait_for_everyone()
    find_shared_folder(accelerator, output.path)
    checkpoint, passed_over = agree_on_checkpoint(
        accelerator, output.checkpoints, arguments.resume_from_checkpoint
    )
    for line in passed_over:
        accelerator.print(line)
    if checkpoint is None:
        accelerator.print(f"New run in {output.path}: it has no checkpoint yet")
    return checkpoint


def run_identity(
    plan: Plan, data_mark: str, network: CausalLMWithLoss, seed: int
) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it."""
    return {
        "model": model_fingerprint(network),
        "data": data_mark,
        "seed": seed,
        "block_size": plan.block_size,
        "global_batch_size": plan.batch.global_batch,
    }


def system_metrics_of(
    arguments: Arguments, accelerator: Accelerator, output: OutputFolder
) -> SystemMetrics | None:
    """What watches this machine; rank 0 alone logs, and without a tracker nobody would look."""
    is_shown = arguments.log_system_metrics and arguments.report_to != ["none"]
    return SystemMetrics(output.path) if is_shown and accelerator.is_main_process else None


def build_health(arguments: Arguments, state: TrainState) -> HealthMonitor:
    """What judges the steps of the run, from where it stands."""
    known = HealthState(**(state.health or {}))
    return HealthMonitor(known, arguments.max_skipped_steps, arguments.skip_spikes)


def make_plan_anew(run: Run) -> None:
    """Lets the plan follow from where the run stands, as a start from here would."""
    plan = run.plan
    run.plan = plan_from(run.state, run.arguments, plan.batch, plan.rows, plan.block_size)
    run.windows.run_until(run.plan.num_samples)
