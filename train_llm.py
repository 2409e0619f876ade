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
    if any(word.partition("=")[0] == "--convert" for word in sys.argv[1:]):
        from llm_training.convert import convert_command

        sys.exit(convert_command(sys.argv[1:]))
    # Help and every mistake in the settings are answered before the slow imports below.
    ARGUMENTS = parse_arguments(sys.argv[1:])
    if ARGUMENTS.verify_resume is not None:
        from llm_training.verify_resume import verify_resume

        sys.exit(verify_resume(ARGUMENTS))
    if ARGUMENTS.find_batch_size:
        from llm_training.batch_finder import find_batch_size

        sys.exit(find_batch_size(ARGUMENTS))

    from llm_training.tracking.mlflow_process import start_early

    start_early(ARGUMENTS)

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper

import torch
from torch import Tensor

from llm_training.checkpointing import CheckpointError
from llm_training.data import DataError
from llm_training.data.rows.ahead import to_device
from llm_training.data.rows.store_rows import Batch
from llm_training.document_mask import DocumentMaskError
from llm_training.dry_run import dry_run
from llm_training.evaluate_only import evaluate_only
from llm_training.export import ExportError
from llm_training.health import UnhealthyError
from llm_training.hub import command_for, open_for_run
from llm_training.hub_client import HubError, Repository
from llm_training.judging import evaluate_and_log
from llm_training.launch import LaunchError, seed_everything
from llm_training.losses import count_predicted_tokens
from llm_training.metrics import MetricError
from llm_training.milestones import (
    begin_deadline,
    decay_now,
    draw_plots,
    export,
    log_progress,
    publish_model,
    review_length,
    save,
    write_card,
)
from llm_training.mishaps import explain_out_of_memory, leave_out, pass_over, passed_position
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
from llm_training.run import Run, build_run
from llm_training.samples import rewind_samples
from llm_training.speaking import final_samples, speak
from llm_training.steps import read_step, update_weights
from llm_training.stopping import (
    GRACE_SECONDS,
    START_GRACE_SECONDS,
    Decision,
    Stopped,
    StopRequest,
    decide,
)
from llm_training.tracking import TrackingError, is_untold, last_lines
from llm_training.trial import run_trial
from llm_training.updates import UnseenStep, backward, drop_gradients

# What a user can cause and mend: told in one paragraph, without a traceback.
EXPECTED_ERRORS = (
    CheckpointError,
    DataError,
    DocumentMaskError,
    ExportError,
    HubError,
    LaunchError,
    MetricError,
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
        if arguments.dry_run:
            plan = dry_run(arguments, request)
            open_for_run(arguments)
            if arguments.dry_run_steps:
                run_trial(arguments, request, plan, train)
        elif arguments.eval_only:
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
        repository = open_for_run(arguments)  # before hours of training
        run = build_run(arguments, output, request)
        with tracked(run):
            resume(run)
            train(run)
            finish(run, repository)


def is_finished(output: OutputFolder, arguments: Arguments) -> bool:
    """Whether this very run has ended already; if so, says how."""
    result = output.read_result() if arguments.resume_from_checkpoint == "auto" else None
    if result is None or output.changed_arguments(arguments):
        return False
    if os.environ.get("RANK", "0") == "0":
        print(f"{output.path} already holds this run, finished.")
        print("\n".join(summary_lines(result)))
        if is_untold(output.path):
            command = f"python -m llm_training.tracking sync {output.path}"
            print(f"A kill kept MLflow from hearing how it ended; this sends it: {command}")
        if arguments.push_to_hub and not result.get("hub"):
            print(f"It is not on the hub yet; this sends it: {command_for(output.path)}")
        print("Nothing was changed. To train anew, give another --run_name or --output_dir.")
    return True


# ----------------------------------------------------------------------------------------- resume


def resume(run: Run) -> None:
    """Puts weights, optimizer and random state where the run stands: at a checkpoint or at step 0.

    Nothing may draw a random number between this and the first step: it would change the run.
    """
    rank = run.accelerator.process_index // tensor_parallel_size(run.accelerator)
    seed_everything(run.state.seed, rank=rank)
    if run.accelerator.is_main_process:
        rewind_samples(run.output.samples, run.checkpoint.step if run.checkpoint else -1)
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
    begin_deadline(run)
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
    if is_due(state.step, run.arguments.sample_steps):
        speak(run)
        obey(run, NOTHING_ASKED)
    run.meter.start()
    while state.step < run.plan.total_steps and not is_stopped_early(run):
        pass_over(run)
        with run.meter.waiting():
            window = run.windows.window(state.samples)
        num_tokens = count_window_tokens(run, window)
        loss_sum = compute_gradients(run, window, num_tokens)
        if not settle(run):  # the step before has sent the run back: these gradients serve nothing
            drop_gradients(run.accelerator, run.model, run.optimizer)
            continue
        learning_rate = run.plan.schedule.at(state.step)
        set_learning_rate(run.optimizer, learning_rate)
        run.open_step = update_weights(run, loss_sum, num_tokens, learning_rate)
        decision = agree(run)
        if is_awaited(run, decision):
            settle(run)
        obey(run, decision)
    if state.logged_tokens:  # the last steps were left out
        log_progress(run, run.plan.schedule.at(state.step), math.nan)
    if state.evaluated_step != state.step:
        save(run, is_best=evaluate_in_passing(run))
        obey(run, NOTHING_ASKED)


def compute_gradients(run: Run, window: list[Batch], num_tokens: int) -> Tensor:
    """Forward and backward over one window; returns this rank's summed loss, () float32.

    The loss of the step is (sum of token losses) / `num_tokens`, over the window and all ranks, so
    its gradient is the same however the window is split. Accelerate divides each backward pass by
    the accumulation and averages it over the ranks, hence the factor.
    """
    accelerator = run.accelerator
    factor = gradient_factor(accelerator, len(window)) / max(1, num_tokens)
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in window:
        batch = to_device(micro_batch, accelerator.device)
        with accelerator.accumulate(run.model), split_positions(accelerator, batch) as share:
            loss, _ = run.model(**share)
            loss_sum += loss.detach()
            backward(accelerator, run.model, loss * factor)
    return loss_sum


def is_awaited(run: Run, decision: Decision) -> bool:
    """Whether anything that follows must know how the last step ended.

    Otherwise the device computes on, and what it found is read during the next step. The last two
    steps of a run are awaited: one that is left out changes what comes after them.
    """
    assert run.open_step is not None
    if decision != NOTHING_ASKED or not isinstance(run.open_step.outcome, UnseenStep):
        return True
    arguments, step = run.arguments, run.state.step + 1
    intervals = (arguments.logging_steps, arguments.eval_steps, arguments.save_steps)
    others = (arguments.sample_steps, arguments.replica_check_steps)
    is_something_due = any(is_due(step, interval) for interval in (*intervals, *others))
    passes_over = passed_position(run) != run.state.samples
    return is_something_due or passes_over or step >= run.plan.total_steps - 1


def settle(run: Run) -> bool:
    """Takes in how the last step ended, where that was left open, and does what is due after it.

    Returns:
        Whether the run still stands where it did: too many bad steps may have sent it back.
    """
    step, state, run.open_step = run.open_step, run.state, None
    if step is None:
        return True
    result, samples = read_step(run, step), state.samples
    run.meter.update((samples - step.first_sample) * run.plan.block_size)
    if result.is_applied:
        state.step += 1
        state.tokens += step.num_tokens
        state.logged_tokens += step.num_tokens
        state.logged_loss_sum += result.loss_sum
        run.health.note_good(result.loss_sum / step.num_tokens, result.grad_norm)
        act_when_due(run, step.learning_rate, result.grad_norm)
    else:
        leave_out(run, step, result)
    return state.samples == samples


def act_when_due(run: Run, learning_rate: float, grad_norm: float) -> None:
    """After a step that was applied: looks at the clock, logs, evaluates and saves what is due."""
    arguments, state = run.arguments, run.state
    review_length(run)
    is_last = state.step == run.plan.total_steps
    if is_due(state.step, arguments.replica_check_steps) and has_replicas(run.accelerator):
        require_equal_replicas(run.accelerator, run.model, state.step)
    if is_due(state.step, arguments.logging_steps) or is_last:
        log_progress(run, learning_rate, grad_norm)
    is_best = False
    if is_due(state.step, arguments.eval_steps) or is_last:
        is_best = evaluate_in_passing(run)
        is_last = is_last or is_stopped_early(run)
    if is_due(state.step, arguments.sample_steps):
        speak(run)
    if is_due(state.step, arguments.save_steps) or is_last or is_best:
        save(run, is_best=is_best, must_succeed=is_last)


def evaluate_in_passing(run: Run) -> bool:
    """Evaluates where it was not done yet, and exports a model to keep; whether it is one."""
    is_best = evaluate_and_log(run) and run.arguments.save_best
    if is_best:
        export(run, run.output.best)
        write_card(run, run.output.best)
    return is_best


def agree(run: Run) -> Decision:
    """What a signal to any rank or a file in the output folder asks for, for all ranks alike."""
    orders = run.controls.take() if run.accelerator.is_main_process else ()
    return decide(sum_over_ranks(run.accelerator, *run.request.votes(orders)))


def obey(run: Run, decision: Decision) -> None:
    """Does what a signal or a file in the output folder asked for, on all ranks alike.

    Raises:
        Stopped: the run was asked to end; all that was done is saved.
    """
    orders = decision.orders
    if "DECAY" in orders:
        decay_now(run)
    if "EVAL" in orders and run.validation:
        evaluate_in_passing(run)
    if "SAMPLE" in orders:
        speak(run, is_ordered=True)
    stop = decision.stop or run.stop
    if ("SAVE" in orders or stop) and run.state.samples:  # before, there is nothing to save
        save(run)
    if stop:
        raise Stopped(stop, f"at step {run.state.step}")


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


# -------------------------------------------------------------------------------------------- end


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Closes the trackers with how it really went."""
    output = run.output
    gc.freeze()  # to search all that was built for garbage takes a tenth of a second
    try:
        yield
    except BaseException as error:
        if isinstance(error, Stopped):
            run.tracking.finish("KILLED", output.artifacts(), reason=error.reason)
        else:
            run.tracking.finish("FAILED", output.artifacts(), error=last_lines(error))
        raise
    finally:
        gc.unfreeze()
        run.windows.close()
    run.tracking.finish("FINISHED", [*output.artifacts(), output.result])


def finish(run: Run, repository: Repository | None) -> None:
    """Exports the model, lets it speak, publishes it, and says how the run ended."""
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
        "best": state.best and state.best.summary(),
        "samples": final_samples(run, exported),
        "model": str(run.output.final),
        "review": run.tracking.review_hint(),
    }
    if accelerator.is_main_process:
        run.output.write_result(result)
    write_card(run, run.output.final)
    draw_plots(run)
    if run.arguments.log_model or run.arguments.register_model:
        run.tracking.log_model(run.output.final, run.arguments.register_model)
    publish_model(run, repository, result)
    accelerator.print("\n".join(summary_lines(result)), flush=True)


if __name__ == "__main__":
    gc.enable()
    leave(main(ARGUMENTS))
