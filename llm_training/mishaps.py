"""What the loop does about a step that was left out: it accounts for it, and may go back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llm_training.checkpointing import agree_on_checkpoint, list_checkpoints
from llm_training.health import (
    UnhealthyError,
    next_position,
    note_rewind,
    plan_rewind,
    write_dump,
)
from llm_training.run import Run, StepResult, build_health, make_plan_anew

MAX_DUMPS = 100  # of a run: with many spikes, the first ones tell enough


def leave_out(run: Run, result: StepResult, first: int, sample_ids: NDArray[np.int64]) -> None:
    """Accounts for a step that was left out; one more at the end takes its place.

    Raises:
        UnhealthyError: there were too many in a row, and the run may not go back.
    """
    step, samples = run.state.step + 1, (first, run.state.samples)
    newest = str(next(iter(list_checkpoints(run.output.checkpoints)), ""))
    try:
        if result.verdict.is_ok:
            line = run.health.note_overflow(step, samples, newest)
        else:
            write_skipped(run, result, first, sample_ids)
            line = run.health.note_skipped(step, samples, result.verdict, newest)
    except UnhealthyError as error:
        if not go_back(run):
            raise
        line = f"{error} This run goes back to step {run.state.step}."
    run.tracking.say(line)
    make_plan_anew(run)


def write_skipped(run: Run, result: StepResult, first: int, sample_ids: NDArray[np.int64]) -> None:
    """Writes down, for an inquiry, what the step that was left out consisted of."""
    if not run.accelerator.is_main_process or run.health.state.num_skipped >= MAX_DUMPS:
        return
    texts = []
    if run.plan.rows is not None and run.tokenizer is not None:
        rows = run.plan.rows.batch(sample_ids)["input_ids"]
        texts = [str(run.tokenizer.decode(row)) for row in rows]
    step = run.state.step + 1
    try:
        write_dump(
            run.output.skipped / f"step-{step:08d}-samples-{first}.json",
            step=step,
            sample_ids=sample_ids.tolist(),
            losses=[result.loss_sum / max(1, result.num_tokens)],
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
    return True


def pass_over(run: Run) -> None:
    """Moves the run behind samples that it came back to pass over."""
    state, step_size = run.state, run.plan.batch.global_batch
    position = next_position(state.samples, step_size, run.health.state.passed_over)
    if position != state.samples:
        run.tracking.say(f"Passed over: samples {state.samples}-{position - 1}")
        state.samples = position
        make_plan_anew(run)
