"""What is done about a step that was left out, which may send the run back, or a full device."""

from __future__ import annotations

import os

import torch

from llm_training.checkpointing import agree_on_checkpoint, list_checkpoints
from llm_training.health import (
    UnhealthyError,
    next_position,
    note_rewind,
    plan_rewind,
    write_dump,
)
from llm_training.run import OpenStep, Run, StepResult, build_health, make_plan_anew
from llm_training.samples import rewind_samples

MAX_DUMPS = 100  # of a run: with many spikes, the first ones tell enough


def leave_out(run: Run, open_step: OpenStep, result: StepResult) -> None:
    """Accounts for a step that was left out; one more at the end takes its place.

    Raises:
        UnhealthyError: there were too many in a row, and the run may not go back.
    """
    step, samples = run.state.step + 1, (open_step.first_sample, run.state.samples)
    newest = str(next(iter(list_checkpoints(run.output.checkpoints)), ""))
    try:
        if result.verdict.is_ok:
            line = run.health.note_overflow(step, samples, newest)
        else:
            write_skipped(run, open_step, result)
            line = run.health.note_skipped(step, samples, result.verdict, newest)
    except UnhealthyError as error:
        if not go_back(run):
            raise
        line = f"{error} This run goes back to step {run.state.step}."
    run.tracking.say(line)
    make_plan_anew(run)


def write_skipped(run: Run, open_step: OpenStep, result: StepResult) -> None:
    """Writes down, for an inquiry, what the step that was left out consisted of."""
    if not run.accelerator.is_main_process or run.health.state.num_skipped >= MAX_DUMPS:
        return
    sample_ids, texts = open_step.sample_ids, []
    if run.plan.rows is not None and run.tokenizer is not None:
        rows = run.plan.rows.batch(sample_ids)["input_ids"]
        texts = [str(run.tokenizer.decode(row)) for row in rows]
    step = run.state.step + 1
    try:
        write_dump(
            run.output.skipped / f"step-{step:08d}-samples-{open_step.first_sample}.json",
            step=step,
            sample_ids=sample_ids.tolist(),
            losses=[result.loss_sum / max(1, open_step.num_tokens)],
            norms_by_layer=result.norms_by_layer,
            texts=texts,
        )
    except OSError as error:  # the training is worth more
        run.tracking.say(f"warning: what was in step {step} could not be written down: {error}")


def go_back(run: Run) -> bool:
    """Puts the run back to its newest checkpoint, to pass over what spoilt it; whether it may."""
    run.checkpoints.wait()
    checkpoint, _ = agree_on_checkpoint(run.accelerator, run.output.checkpoints, "auto")
    if checkpoint is None:
        return False
    before, at_checkpoint = run.health.state, checkpoint.read_state()
    passed = plan_rewind(
        before,
        checkpoint_sample=at_checkpoint.samples,
        end=run.state.samples,
        margin=run.plan.batch.global_batch,
        max_rewinds=run.arguments.max_rewinds,
    )
    if passed is None:
        return False
    run.checkpoints.load(checkpoint, run.model, run.optimizer)
    vars(run.state).update(vars(at_checkpoint))
    run.health = build_health(run.arguments, run.state)
    note_rewind(run.health.state, before, passed)
    run.tracking.go_back(run.state.step)
    if run.accelerator.is_main_process:
        rewind_samples(run.output.samples, run.state.step)
    return True


def passed_position(run: Run) -> int:
    """Where the next step reads: `TrainState.samples`, or behind samples to pass over."""
    step_size, passed_over = run.plan.batch.global_batch, run.health.state.passed_over
    return next_position(run.state.samples, step_size, passed_over)


def pass_over(run: Run) -> None:
    """Moves the run behind samples that it came back to pass over; no step may be open then."""
    state, position = run.state, passed_position(run)
    if position != state.samples:
        assert run.open_step is None, "the plan counts the steps that are done"
        run.tracking.say(f"Passed over: samples {state.samples}-{position - 1}")
        state.samples = position
        make_plan_anew(run)


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
