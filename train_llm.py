"""Pretrains and fine-tunes causal language models: parse, plan, build, resume, loop, export.

Started as `python train_llm.py run.json --learning_rate 3e-4`, or on any number of processes as
`accelerate launch --config_file accelerate_configs/single.yaml train_llm.py run.json`.
"""

from __future__ import annotations

import sys

from arguments import Arguments, describe, resolve_batch_sizes
from llm_training.argument_parsing import parse_arguments

if __name__ == "__main__":
    # Help and every mistake in the settings are answered before the slow imports below.
    ARGUMENTS = parse_arguments(sys.argv[1:])

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_training.checkpointing import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    find_checkpoint,
)
from llm_training.data import DataError
from llm_training.data.rows.store_rows import Batch, Rows
from llm_training.data.rows.streaming import StreamWindows
from llm_training.data.rows.windows import TrainingWindows, train_rows
from llm_training.document_mask import DocumentMaskError
from llm_training.evaluation import evaluate
from llm_training.export import ExportError, export_model
from llm_training.generation import generate_sample
from llm_training.health import NonFiniteError, require_finite
from llm_training.launch import (
    LaunchError,
    build_accelerator,
    seed_everything,
)
from llm_training.launch_settings import read_launch_settings
from llm_training.losses import count_predicted_tokens
from llm_training.modeling import (
    CausalLMWithLoss,
    ModelError,
    build_model,
    check_row_split,
    model_fingerprint,
)
from llm_training.optim import build_optimizer, set_learning_rate
from llm_training.outputs import OutputError, OutputFolder
from llm_training.planning import Plan, PlanError, make_plan
from llm_training.ranks import (
    RankError,
    agree_on_seed,
    backward_options,
    explain_broken_exchange,
    find_shared_folder,
    gradient_factor,
    is_first_to_say,
    last_words,
    leave,
    limit_waiting,
    split_positions,
    sum_over_data,
    sum_over_ranks,
    tensor_parallel_size,
)
from llm_training.reporting import (
    full_ledger,
    model_line,
    provenance,
    resume_lines,
    row_lines,
    summary_lines,
)
from llm_training.run_data import build_data, build_validation, build_windows, try_document_mask
from llm_training.state import TrainState
from llm_training.throughput import Throughput
from llm_training.tracking import (
    Tracking,
    TrackingError,
    evaluation_line,
    progress_line,
    redact,
)

# What a user can cause and mend: told in one paragraph, without a traceback.
EXPECTED_ERRORS = (
    CheckpointError,
    DataError,
    DocumentMaskError,
    ExportError,
    LaunchError,
    ModelError,
    NonFiniteError,
    OutputError,
    PlanError,
    RankError,
    TrackingError,
)


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
    windows: TrainingWindows | StreamWindows
    ledger: dict[str, Any]
    validation: Rows | None
    checkpoints: CheckpointFolder
    checkpoint: Checkpoint | None
    state: TrainState
    tracking: Tracking
    output: OutputFolder
    facts: dict[str, Any]
    meter: Throughput


def main(arguments: Arguments) -> int:
    """Runs what the arguments say; returns the exit code."""
    with last_words():
        return run_and_tell(arguments)


def run_and_tell(arguments: Arguments) -> int:
    """Runs what the arguments say, and tells in one paragraph what a user can mend."""
    try:
        if arguments.eval_only:
            evaluate_only(arguments)
        else:
            run_training(arguments)
    except EXPECTED_ERRORS as error:
        if is_first_to_say(str(error)):
            print(f"train_llm.py: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        explanation = explain_broken_exchange(error)
        if explanation is None:
            raise
        print(f"train_llm.py: {explanation}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("train_llm.py: interrupted; the same command continues the run.", file=sys.stderr)
        return 130
    return 0


def run_training(arguments: Arguments) -> None:
    """Builds the run, trains it to its end and leaves a model and a result behind."""
    output = OutputFolder(str(arguments.output_dir))
    if is_finished(output, arguments):
        return
    run = build_run(arguments, output)
    with tracked(run):
        resume(run)
        train(run)
        finish(run)


def is_finished(output: OutputFolder, arguments: Arguments) -> bool:
    """Whether this very run has ended already; if so, says how."""
    result = output.read_result() if arguments.resume_from_checkpoint == "auto" else None
    if result is None or output.changed_arguments(arguments):
        return False
    if os.environ.get("RANK", "0") == "0":
        print(f"{output.path} already holds this run, finished.")
        print("\n".join(summary_lines(result)))
        print("Nothing was changed. To train anew, give another --run_name or --output_dir.")
    return True


# ------------------------------------------------------------------------------------------ build


def build_run(arguments: Arguments, output: OutputFolder) -> Run:
    """Everything the loop needs; what may be wrong is met before anything is written."""
    launch = read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    checkpoint = open_output(arguments, accelerator, output)
    data, config, block_size = build_data(arguments, accelerator)
    rows = train_rows(data, arguments, block_size)
    if rows is None and not arguments.streaming:
        raise DataError("There is no training data: give --train_file or --dataset_name.")
    validation = build_validation(arguments, accelerator, data, block_size, batch)
    state = checkpoint.read_state() if checkpoint else TrainState(seed=0)
    done = {"done_steps": state.step, "done_samples": state.samples}
    plan = make_plan(arguments, batch, rows, block_size, **done)

    drawn_seed = state.seed if checkpoint else None
    seed = agree_on_seed(drawn_seed if arguments.seed is None else arguments.seed)
    seed_everything(seed)
    state.seed = seed
    windows, data_mark = build_windows(arguments, accelerator, data, plan, state)
    network = CausalLMWithLoss(build_model(config, arguments, tp_size=launch.tp_size))
    check_row_split(network.model, block_size, launch.cp_size)
    optimizer = build_optimizer(network, arguments, accelerator.device.type)
    facts = provenance(accelerator, data, network)
    checkpoints = CheckpointFolder(
        accelerator,
        output.checkpoints,
        arguments.save_total_limit,
        identity=run_identity(plan, data_mark, network, seed),
        about=redact(describe(arguments) | facts),
    )
    ledger = full_ledger(data, rows, validation)
    lines = [*data.lines(), *row_lines(rows, validation), model_line(accelerator, network)]
    lines += plan.lines()
    if checkpoint:
        allowed = checkpoints.check(checkpoint, plan.total_steps, arguments.allow_resume_change)
        changed = output.changed_arguments(arguments)
        lines += [*resume_lines(checkpoint.path, checkpoint.step, changed), *allowed]
    accelerator.print("\n".join(lines), flush=True)

    model, optimizer = accelerator.prepare(network, optimizer)
    limit_waiting(arguments.ddp_timeout)
    try_document_mask(accelerator, model, network, windows, plan)
    tracking = Tracking(
        accelerator,
        arguments,
        output.path,
        parameters=describe(arguments) | facts,
        resumed_step=checkpoint.step if checkpoint else 0,
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
        ledger=ledger,
        validation=validation,
        checkpoints=checkpoints,
        checkpoint=checkpoint,
        state=state,
        tracking=tracking,
        output=output,
        facts=facts,
        meter=Throughput(),
    )


def open_output(
    arguments: Arguments, accelerator: Accelerator, output: OutputFolder
) -> Checkpoint | None:
    """Takes the output folder for this run; returns the checkpoint to continue from, if any."""
    if accelerator.is_main_process:
        output.claim(start_anew=arguments.resume_from_checkpoint == "none")
    accelerator.wait_for_everyone()
    find_shared_folder(accelerator, output.path)
    checkpoint, passed_over = find_checkpoint(output.checkpoints, arguments.resume_from_checkpoint)
    for line in passed_over:
        accelerator.print(line)
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


# ----------------------------------------------------------------------------------------- resume


def resume(run: Run) -> None:
    """Puts weights, optimizer and random state where the run stands: at a checkpoint or at step 0.

    Nothing may draw a random number between this and the first step: it would change the run.
    """
    if run.accelerator.is_main_process:
        run.output.write_opening(run.arguments, run.facts, run.ledger)
    rank = run.accelerator.process_index // tensor_parallel_size(run.accelerator)
    seed_everything(run.state.seed, rank=rank)
    if run.checkpoint:
        run.checkpoints.set_aside_newer(run.checkpoint)
        reset = run.arguments.reset_optimizer
        lines = run.checkpoints.load(
            run.checkpoint, run.model, run.optimizer, reset_optimizer=reset
        )
        for line in lines:
            run.tracking.say(line)


# ------------------------------------------------------------------------------------------- loop


def train(run: Run) -> None:
    """The loop: one iteration is one optimizer step over one window of micro-batches."""
    arguments, plan, state = run.arguments, run.plan, run.state
    if state.step == 0:
        evaluate_and_log(run)
    run.meter.start()
    while state.step < plan.total_steps and not is_stopped_early(run):
        window = run.windows.window(state.samples)
        num_tokens = count_window_tokens(run, window)
        learning_rate = plan.schedule.at(state.step)
        set_learning_rate(run.optimizer, learning_rate)
        loss_sum, grad_norm = optimizer_step(run, window, num_tokens)

        num_samples = min(plan.batch.global_batch, plan.num_samples - state.samples)
        state.note_samples(run.windows.sample_ids(state.samples))
        state.step += 1
        state.samples += num_samples
        state.tokens += num_tokens
        state.logged_tokens += num_tokens
        state.logged_loss_sum += loss_sum
        run.meter.update(num_samples * plan.block_size)

        is_last = state.step == plan.total_steps
        if is_due(state.step, arguments.logging_steps) or is_last:
            log_progress(run, learning_rate, grad_norm)
        is_best = False
        if is_due(state.step, arguments.eval_steps) or is_last:
            is_best = evaluate_and_log(run) and arguments.save_best
            is_last = is_last or is_stopped_early(run)
        if is_best:
            export(run, run.output.best)
        if is_due(state.step, arguments.save_steps) or is_last or is_best:
            state.stream = run.windows.state(state.samples)
            with run.meter.paused():
                run.checkpoints.save(state, is_best=is_best)


def optimizer_step(run: Run, window: list[Batch], num_tokens: int) -> tuple[float, float]:
    """Forward, backward and update over one window.

    The loss of the step is (sum of token losses) / `num_tokens`, over the window and all ranks, so
    its gradient is the same however the window is split. Accelerate divides each backward pass by
    the accumulation and averages it over the ranks, hence the factor.

    Returns:
        The summed loss in nats over all ranks, and the gradient norm before clipping.
    """
    accelerator, state = run.accelerator, run.state
    factor = gradient_factor(accelerator, len(window)) / max(1, num_tokens)
    loss_sum = torch.zeros((), device=accelerator.device)
    grad_norm = math.nan
    for micro_batch in window:
        batch = {name: tensor.to(accelerator.device) for name, tensor in micro_batch.items()}
        with accelerator.accumulate(run.model), split_positions(accelerator, batch) as share:
            loss, _ = run.model(**share)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                # Before the backward pass: some backends update the weights inside it.
                (total_loss,) = sum_over_ranks(accelerator, float(loss_sum))
                require_finite("loss", total_loss, state.step, state.samples)
            accelerator.backward(loss * factor, **backward_options(accelerator))
            if accelerator.sync_gradients:
                # Without a limit the norm is still measured.
                limit = run.arguments.max_grad_norm or math.inf
                grad_norm = float(accelerator.clip_grad_norm_(run.model.parameters(), limit))
                if accelerator.scaler is None:  # fp16's scaler skips steps that overflow by itself
                    require_finite("gradient norm", grad_norm, state.step, state.samples)
            run.optimizer.step()
            run.optimizer.zero_grad()
    return total_loss, grad_norm


def count_window_tokens(run: Run, window: list[Batch]) -> int:
    """Predicted tokens of the window over all ranks."""
    tokens = sum(int(count_predicted_tokens(batch["labels"])) for batch in window)
    return int(sum_over_data(run.accelerator, tokens)[0])


def is_due(step: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens after this one."""
    return interval is not None and step % interval == 0


def is_stopped_early(run: Run) -> bool:
    """Whether too many evaluations in a row brought nothing better."""
    patience = run.arguments.early_stopping_patience
    return patience is not None and run.state.evals_without_better >= patience


def log_progress(run: Run, learning_rate: float, grad_norm: float) -> None:
    """One line of the log: means since the last one, the rest as of this step."""
    state = run.state
    metrics = {
        "train/loss": state.logged_loss_sum / max(1, state.logged_tokens),
        "train/grad_norm": grad_norm,
        "train/learning_rate": learning_rate,
        "train/tokens": state.tokens,
    }
    if (epoch := run.plan.epoch(state.samples)) is not None:
        metrics["train/epoch"] = epoch
    if (speed := run.meter.read()) is not None:
        metrics["perf/tokens_per_second"] = speed
    state.logged_loss_sum, state.logged_tokens = 0.0, 0
    run.tracking.log(metrics, state.step)
    seconds_left = run.meter.seconds_left(run.plan.total_steps - state.step)
    run.tracking.say(progress_line(state.step, run.plan.total_steps, metrics, seconds_left))


def evaluate_and_log(run: Run) -> bool:
    """Evaluates where there is something to evaluate on; true if the loss is the best so far."""
    if run.validation is None:
        return False
    with run.meter.paused():
        metrics = evaluate(
            run.accelerator, run.model, run.validation, run.arguments, run.plan.batch
        )
    del metrics["eval/tokens"]  # the same each time
    run.tracking.log(metrics, run.state.step)
    run.tracking.say(evaluation_line(run.state.step, metrics))
    return run.state.note_evaluation(metrics["eval/loss"], run.arguments.early_stopping_min_delta)


# -------------------------------------------------------------------------------------------- end


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Closes the trackers with how it really went."""
    output = run.output
    artifacts = [output.arguments, output.provenance, output.ledger, output.log]
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        run.tracking.finish("KILLED" if killed else "FAILED", artifacts)
        raise
    finally:
        run.windows.close()
    run.tracking.finish("FINISHED", [*artifacts, output.result])


def finish(run: Run) -> None:
    """Exports the model, lets it speak, and says how the run ended."""
    accelerator, state = run.accelerator, run.state
    for line in run.windows.account_lines():
        run.tracking.say(line)
    exported = export(run, run.output.final)
    result = {
        "step": state.step,
        "stopped_early": state.step < run.plan.total_steps,
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "sample": final_sample(run, exported),
        "model": str(run.output.final),
        "review": run.tracking.review_hint(),
    }
    if accelerator.is_main_process:
        run.output.write_result(result)
    accelerator.print("\n".join(summary_lines(result)), flush=True)


def export(run: Run, folder: Path) -> PreTrainedModel | None:
    """Writes the model as it is now; returns it opened again on rank 0, memory permitting."""
    with run.meter.paused():
        return export_model(run.accelerator, run.model, run.network, run.tokenizer, folder)


def final_sample(run: Run, exported: PreTrainedModel | None) -> str | None:
    """What the exported model makes of the prompt, where one is given; None on other ranks.

    The live one cannot speak alone on rank 0, where its weights lie on all of them.
    """
    speaker = exported
    if speaker is None and run.accelerator.num_processes == 1:  # memory was too short to open it
        speaker = run.network
    if run.tokenizer is None or run.arguments.sample_prompt is None or speaker is None:
        return None
    with run.accelerator.autocast():
        return generate_sample(
            speaker,
            run.tokenizer,
            run.arguments.sample_prompt,
            max_new_tokens=run.arguments.sample_max_new_tokens,
            temperature=run.arguments.sample_temperature,
            seed=run.state.seed,
        )


def evaluate_only(arguments: Arguments) -> None:
    """Evaluates once: the run's checkpoint where there is one, else the model as it is given."""
    launch = read_launch_settings()
    batch = resolve_batch_sizes(arguments, launch.data_parallel_size)
    accelerator = build_accelerator(arguments, launch, batch=batch)
    output = OutputFolder(str(arguments.output_dir))
    checkpoint, passed_over = find_checkpoint(output.checkpoints, arguments.resume_from_checkpoint)
    data, config, block_size = build_data(arguments, accelerator)
    validation = build_validation(arguments, accelerator, data, block_size, batch)
    if validation is None:
        raise DataError("There is no validation data: give --validation_file.")
    seed_everything(agree_on_seed(arguments.seed))
    network = CausalLMWithLoss(build_model(config, arguments, tp_size=launch.tp_size))
    check_row_split(network.model, block_size, launch.cp_size)
    identity = {"model": model_fingerprint(network)}
    # FSDP2 shards a model together with its optimizer; nothing is stepped here.
    optimizer = build_optimizer(network, arguments, accelerator.device.type)
    model, _ = accelerator.prepare(network, optimizer)
    if checkpoint:
        checkpoints = CheckpointFolder(accelerator, output.checkpoints, None, identity)
        checkpoints.check(checkpoint)
        passed_over += checkpoints.load(checkpoint, model, None)
    source = checkpoint.path if checkpoint else arguments.model_name_or_path or "untrained weights"
    accelerator.print("\n".join([*passed_over, f"Evaluating {source}"]), flush=True)
    metrics = evaluate(accelerator, model, validation, arguments, batch)
    accelerator.print(evaluation_line(checkpoint.step if checkpoint else 0, metrics))


if __name__ == "__main__":
    leave(main(ARGUMENTS))
