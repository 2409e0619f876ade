"""Pretrains and fine-tunes causal language models: parse, plan, build, resume, loop, export.

Started as `python train_llm.py run.json --learning_rate 3e-4`, or on any number of processes as
`accelerate launch --config_file accelerate_configs/single.yaml train_llm.py run.json`.
"""

from __future__ import annotations

import gc
import sys

from arguments import Arguments
from llm_training.argument_parsing import parse_arguments
from llm_training.stopping import end_with_launcher

if __name__ == "__main__":
    gc.disable()  # what is imported stays: to search it for garbage takes a fifth of the time
    end_with_launcher()
    # Help and every mistake in the settings are answered before the slow imports below.
    ARGUMENTS = parse_arguments(sys.argv[1:])
    if ARGUMENTS.verify_resume is not None:
        from llm_training.verify_resume import verify_resume

        sys.exit(verify_resume(ARGUMENTS))

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from llm_training.checkpointing import CheckpointError, SaveError
from llm_training.data import DataError
from llm_training.data.rows.store_rows import Batch
from llm_training.document_mask import DocumentMaskError
from llm_training.evaluate_only import evaluate_only
from llm_training.evaluation import evaluate
from llm_training.export import ExportError, export_model
from llm_training.generation import generate_sample
from llm_training.health import Kind, UnhealthyError, Verdict
from llm_training.launch import LaunchError, seed_everything
from llm_training.losses import count_predicted_tokens
from llm_training.mishaps import leave_out, pass_over
from llm_training.modeling import ModelError
from llm_training.optim import OptimizerError, set_learning_rate
from llm_training.outputs import OutputError, OutputFolder
from llm_training.planning import PlanError
from llm_training.ranks import (
    RankError,
    explain_broken_exchange,
    gradient_factor,
    is_first_to_say,
    leave,
    split_positions,
    sum_over_data,
    sum_over_ranks,
    tensor_parallel_size,
)
from llm_training.replicas import ReplicaError, has_replicas, require_equal_replicas
from llm_training.reporting import summary_lines
from llm_training.run import Run, StepResult, build_run, make_plan_anew
from llm_training.stopping import (
    GRACE_SECONDS,
    START_GRACE_SECONDS,
    Decision,
    Stopped,
    StopRequest,
    decide,
)
from llm_training.tracking import TrackingError, evaluation_line, progress_line
from llm_training.updates import backward, drop_gradients, finish_step, norms_by_layer

# What a user can cause and mend: told in one paragraph, without a traceback.
EXPECTED_ERRORS = (
    CheckpointError,
    DataError,
    DocumentMaskError,
    ExportError,
    LaunchError,
    ModelError,
    OptimizerError,
    OutputError,
    PlanError,
    RankError,
    ReplicaError,
    TrackingError,
    UnhealthyError,
)

NOTHING_ASKED = Decision(None, frozenset())
EMPTY = Verdict(Kind.EMPTY, "no token to predict")
# One process can then let the model speak without the others.
WHOLE_MODEL_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def main(arguments: Arguments) -> int:
    """Runs what the arguments say; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # where a locale has no such character
            stream.reconfigure(errors="backslashreplace")
    minutes = arguments.save_before_timeout
    # Alone, a process waits for no other: what it saves may take its time.
    grace = START_GRACE_SECONDS if os.environ.get("WORLD_SIZE", "1") != "1" else None
    deadline = None if minutes is None else 60 * minutes
    with StopRequest(deadline_seconds=deadline, grace_seconds=grace) as request:
        return run_and_tell(arguments, request)


def run_and_tell(arguments: Arguments, request: StopRequest) -> int:
    """Runs what the arguments say, and tells in one paragraph what a user can mend."""
    try:
        if arguments.eval_only:
            evaluate_only(arguments, request)
        else:
            run_training(arguments, request)
    except Stopped as stopped:
        if is_first_to_say(str(stopped)):
            print(f"train_llm.py: {stopped}", file=sys.stderr, flush=True)
        return stopped.exit_code
    except EXPECTED_ERRORS as error:
        if is_first_to_say(str(error)):
            print(f"train_llm.py: {error}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"train_llm.py: {explain_out_of_memory(error)}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        explanation = explain_broken_exchange(error)
        if explanation is None:
            raise
        print(f"train_llm.py: {explanation}", file=sys.stderr, flush=True)
        return 1
    return 0


def run_training(arguments: Arguments, request: StopRequest) -> None:
    """Builds the run, trains it to its end and leaves a model and a result behind."""
    output = OutputFolder(str(arguments.output_dir))
    if is_finished(output, arguments):
        return
    is_first = os.environ.get("RANK", "0") == "0"
    with output.lock() if is_first else nullcontext():
        run = build_run(arguments, output, request)
        with tracked(run):
            resume(run)
            train(run)
            finish(run)


def explain_out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What to tell a person whose device is too small for the run."""
    peak = ""
    if torch.cuda.is_available():
        peak = (
            f" At its peak this process held {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB."
        )
    return (
        f"rank {os.environ.get('RANK', '0')}: the device has no memory left."
        f" {str(error).splitlines()[0]}{peak} Checkpoints are whole. What helps, each with the same"
        " curve: a smaller --per_device_train_batch_size at the same --global_batch_size,"
        " --gradient_checkpointing true, more devices with accelerate_configs/fsdp.yaml."
    )


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


# ----------------------------------------------------------------------------------------- resume


def resume(run: Run) -> None:
    """Puts weights, optimizer and random state where the run stands: at a checkpoint or at step 0.

    Nothing may draw a random number between this and the first step: it would change the run.
    """
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
    state = run.state
    if run.request.grace_seconds is not None:
        run.request.grace_seconds = GRACE_SECONDS  # from here on there is something to save
    if has_replicas(run.accelerator):
        require_equal_replicas(run.accelerator, run.model, state.step)
    if is_due(state.step, run.arguments.eval_steps) and state.evaluated_step != state.step:
        # At the start, or where the run was stopped before it was done.
        is_best = evaluate_and_log(run) if state.step == 0 else evaluate_in_passing(run)
        if is_best and state.step:
            save(run, is_best=run.arguments.save_best)
        obey(run, NOTHING_ASKED)
    run.meter.start()
    while state.step < run.plan.total_steps and not is_stopped_early(run):
        pass_over(run)
        window = run.windows.window(state.samples)
        num_tokens = count_window_tokens(run, window)
        learning_rate = run.plan.schedule.at(state.step)
        set_learning_rate(run.optimizer, learning_rate)
        result = optimizer_step(run, window, num_tokens)

        first, sample_ids = state.samples, run.windows.sample_ids(state.samples)
        state.note_samples(sample_ids)
        state.samples += min(run.plan.batch.global_batch, run.plan.num_samples - first)
        run.meter.update((state.samples - first) * run.plan.block_size)
        if result.is_applied:
            state.step += 1
            state.tokens += num_tokens
            state.logged_tokens += num_tokens
            state.logged_loss_sum += result.loss_sum
            run.health.note_good(result.loss_sum / num_tokens, result.grad_norm)
            act_when_due(run, learning_rate, result.grad_norm)
        else:
            leave_out(run, result, first, sample_ids)
        obey(run, result.decision)
    if state.logged_tokens:  # the last steps were left out
        log_progress(run, run.plan.schedule.at(state.step), math.nan)
    if state.evaluated_step != state.step:
        save(run, is_best=evaluate_in_passing(run))


def act_when_due(run: Run, learning_rate: float, grad_norm: float) -> None:
    """After a step that was applied: logs, evaluates and saves what is due."""
    arguments, state = run.arguments, run.state
    is_last = state.step == run.plan.total_steps
    if is_due(state.step, arguments.replica_check_steps) and has_replicas(run.accelerator):
        require_equal_replicas(run.accelerator, run.model, state.step)
    if is_due(state.step, arguments.logging_steps) or is_last:
        log_progress(run, learning_rate, grad_norm)
    is_best = False
    if is_due(state.step, arguments.eval_steps) or is_last:
        is_best = evaluate_in_passing(run)
        is_last = is_last or is_stopped_early(run)
    if is_due(state.step, arguments.save_steps) or is_last or is_best:
        save(run, is_best=is_best, must_succeed=is_last)


def optimizer_step(run: Run, window: list[Batch], num_tokens: int) -> StepResult:
    """Forward, backward and update over one window.

    The loss of the step is (sum of token losses) / `num_tokens`, over the window and all ranks, so
    its gradient is the same however the window is split. Accelerate divides each backward pass by
    the accumulation and averages it over the ranks, hence the factor. A step that is left out
    changes nothing.
    """
    accelerator, health = run.accelerator, run.health
    factor = gradient_factor(accelerator, len(window)) / max(1, num_tokens)
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in window:
        batch = {name: tensor.to(accelerator.device) for name, tensor in micro_batch.items()}
        with accelerator.accumulate(run.model), split_positions(accelerator, batch) as share:
            loss, _ = run.model(**share)
            loss_sum += loss.detach()
            backward(accelerator, run.model, loss * factor)
    orders = run.controls.take() if accelerator.is_main_process else ()
    total_loss, *votes = sum_over_ranks(accelerator, float(loss_sum), *run.request.votes(orders))
    decision = decide(votes)
    verdict = health.judge_loss(total_loss / num_tokens) if num_tokens else EMPTY
    layers: dict[str, float] = {}
    if not verdict.is_ok:
        layers = norms_by_layer(accelerator, run.model) if num_tokens else {}
        drop_gradients(accelerator, run.model, run.optimizer)
        return StepResult(total_loss, num_tokens, math.nan, False, verdict, layers, decision)

    def accept(grad_norm: float) -> bool:
        nonlocal verdict, layers
        verdict = health.judge_norm(grad_norm)
        layers = {} if verdict.is_ok else norms_by_layer(accelerator, run.model)
        return verdict.is_ok

    limit = run.arguments.max_grad_norm
    outcome = finish_step(accelerator, run.model, run.optimizer, limit, accept)
    norm, is_applied = outcome.grad_norm, outcome.is_applied
    return StepResult(total_loss, num_tokens, norm, is_applied, verdict, layers, decision)


def obey(run: Run, decision: Decision) -> None:
    """Does what a signal or a file in the output folder asked for, on all ranks alike.

    Raises:
        Stopped: the run was asked to end; all that was done is saved.
    """
    orders = decision.orders
    if "DECAY" in orders:
        decay_now(run)
    if "EVAL" in orders and run.validation is not None:
        evaluate_in_passing(run)
    if "SAMPLE" in orders:
        speak(run)
    stop = decision.stop or run.stop
    if ("SAVE" in orders or stop) and run.state.samples:  # before, there is nothing to save
        save(run)
    if stop:
        raise Stopped(stop, f"at step {run.state.step}")


def decay_now(run: Run) -> None:
    """Begins the final decay of warmup-stable-decay; the run ends with it."""
    state, before = run.state, run.plan
    if state.decay_from is not None:
        run.tracking.say(f"DECAY changes nothing: it has begun at step {state.decay_from}")
        return
    state.decay_from = state.step
    make_plan_anew(run)
    if run.plan.schedule == before.schedule:
        state.decay_from = None
        kind = run.arguments.lr_scheduler_type
        run.tracking.say(f"DECAY changes nothing: lr_scheduler_type={kind}, step {state.step}")
    else:
        run.tracking.say(f"DECAY: the run now ends at step {run.plan.total_steps}")


def speak(run: Run) -> None:
    """Lets the model speak as it is now, where one process holds it whole."""
    if run.tokenizer is None or run.arguments.sample_prompt is None:
        run.tracking.say("SAMPLE: there is no --sample_prompt to continue, or no tokenizer")
    elif (
        run.accelerator.distributed_type not in WHOLE_MODEL_TYPES
        or tensor_parallel_size(run.accelerator) > 1
    ):
        run.tracking.say("SAMPLE: no process holds the whole model; look at best/ or final/")
    elif run.accelerator.is_main_process:
        with run.meter.paused():
            run.tracking.say(f"sample step {run.state.step} | {sample(run, run.network)}")


def save(run: Run, *, is_best: bool = False, must_succeed: bool = True) -> None:
    """Saves a checkpoint; every rank must call this.

    Raises:
        SaveError: it could not be written, and must be or --on_save_error says stop.
    """
    state = run.state
    state.stream = run.windows.state(state.samples)
    state.health = dataclasses.asdict(run.health.state)
    with run.meter.paused():
        try:
            run.checkpoints.wait()
        except SaveError as error:  # of the one before; this one is not lost for it
            if run.arguments.on_save_error == "stop":
                raise
            run.tracking.say(f"WARNING: {error}")
        try:
            run.checkpoints.save(state, is_best=is_best)
            if must_succeed:
                run.checkpoints.wait()
        except SaveError as error:
            if must_succeed or run.arguments.on_save_error == "stop":
                raise
            run.tracking.say(f"WARNING: {error}")


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
        if run.mfu_per_speed is not None:
            metrics["perf/mfu"] = speed * run.mfu_per_speed
    if num_skipped := run.health.state.num_skipped:
        metrics["train/skipped_steps"] = num_skipped
    state.logged_loss_sum, state.logged_tokens = 0.0, 0
    run.tracking.log(metrics, state.step)
    seconds_left = run.meter.seconds_left(run.plan.total_steps - state.step)
    run.tracking.say(progress_line(state.step, run.plan.total_steps, metrics, seconds_left))


def evaluate_in_passing(run: Run) -> bool:
    """Evaluates where it was not done yet, and exports a model to keep; whether it is one."""
    is_best = evaluate_and_log(run) and run.arguments.save_best
    if is_best:
        export(run, run.output.best)
    return is_best


def evaluate_and_log(run: Run) -> bool:
    """Evaluates where there is something to evaluate on; true if the loss is the best so far.

    A signal ends it early: then it counts for nothing, and the next start begins with it.
    """
    if run.validation is None:
        return False
    with run.meter.paused():
        metrics = evaluate(
            run.accelerator,
            run.model,
            run.validation,
            run.arguments,
            run.plan.batch,
            is_stopped=lambda: is_asked_to_stop(run),
        )
    if metrics is None:
        return False
    run.state.evaluated_step = run.state.step
    del metrics["eval/tokens"]  # the same each time
    run.tracking.log(metrics, run.state.step)
    run.tracking.say(evaluation_line(run.state.step, metrics))
    return run.state.note_evaluation(metrics["eval/loss"], run.arguments.early_stopping_min_delta)


def is_asked_to_stop(run: Run) -> bool:
    """Whether any rank got a signal; every rank must call this, and all get the same answer."""
    run.stop = decide(sum_over_ranks(run.accelerator, *run.request.votes())).stop
    return run.stop is not None


# -------------------------------------------------------------------------------------------- end


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Closes the trackers with how it really went."""
    output = run.output
    try:
        yield
    except BaseException as error:
        is_killed = isinstance(error, Stopped)
        run.tracking.finish("KILLED" if is_killed else "FAILED", output.artifacts())
        raise
    finally:
        run.windows.close()
    run.tracking.finish("FINISHED", [*output.artifacts(), output.result])


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
    return sample(run, speaker)


def sample(run: Run, speaker: PreTrainedModel) -> str:
    """What `speaker`, which this process holds whole, makes of the prompt."""
    assert run.tokenizer is not None and run.arguments.sample_prompt is not None
    with run.accelerator.autocast():
        return generate_sample(
            speaker,
            run.tokenizer,
            run.arguments.sample_prompt,
            max_new_tokens=run.arguments.sample_max_new_tokens,
            temperature=run.arguments.sample_temperature,
            seed=run.state.seed,
        )


if __name__ == "__main__":
    gc.enable()
    leave(main(ARGUMENTS))
