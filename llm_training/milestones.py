"""What is done now and then beside the steps: logging, saving, exporting, keeping to a deadline.

Every rank calls these; what one process alone must do, they see to themselves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llm_training.checkpointing import SaveError
from llm_training.deadline import OPEN_STEPS, Pauses, Readings
from llm_training.export import export_model
from llm_training.hub import publish
from llm_training.hub_client import Repository
from llm_training.ranks import sum_over_ranks, tensor_parallel_size
from llm_training.run import Run, make_plan_anew
from llm_training.tracking import progress_line


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
        metrics |= {f"perf/{name}": value for name, value in dataclasses.asdict(speed).items()}
        if run.mfu_per_speed is not None:
            metrics["perf/mfu"] = speed.tokens_per_second * run.mfu_per_speed
    metrics |= run.held_memory.read()
    if run.system_metrics is not None:
        metrics |= run.system_metrics.read()
    if num_skipped := run.health.state.num_skipped:
        metrics["train/skipped_steps"] = num_skipped
    state.logged_loss_sum, state.logged_tokens = 0.0, 0
    run.tracking.log(metrics, state.step)
    total_steps = None if run.plan.is_open else run.plan.total_steps
    seconds_left = run.meter.seconds_left(run.plan.total_steps - state.step)
    if total_steps is None:
        seconds_left = max(0.0, run.deadline.seconds_left)
    run.tracking.say(progress_line(state.step, total_steps, metrics, seconds_left))


def save(run: Run, *, is_best: bool = False, must_succeed: bool = True) -> None:
    """Saves a checkpoint; every rank must call this.

    Raises:
        SaveError: it could not be written, and must be or --on_save_error says stop.
    """
    state = run.state
    state.stream = run.windows.state(state.samples)
    state.health = dataclasses.asdict(run.health.state)
    state.deadline = run.deadline.to_keep()
    # One that is still being written tells nothing of how long that takes.
    is_waited_for = must_succeed or not run.arguments.async_save
    with run.meter.paused(), run.deadline.pause("save" if is_waited_for else None):
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
            run.tracking.flush(run.output.artifacts())
        except SaveError as error:
            if must_succeed or run.arguments.on_save_error == "stop":
                raise
            run.tracking.say(f"WARNING: {error}")


def export(run: Run, folder: Path) -> PreTrainedModel | None:
    """Writes the model as it is now; returns it opened again on rank 0, memory permitting."""
    with run.meter.paused(), run.deadline.pause("export"):
        return export_model(run.accelerator, run.model, run.network, run.tokenizer, folder)


def write_card(run: Run, folder: Path) -> None:
    """Puts a model card beside the model that was exported to `folder`; rank 0 does it."""
    if run.accelerator.is_main_process:
        with run.meter.paused(), run.deadline.pause():
            try:
                from llm_training.model_card import write_card_of_run

                write_card_of_run(run.output.path, folder)
            except Exception as error:  # the model is worth more
                told = f"{type(error).__name__}: {error}"
                run.tracking.say(f"WARNING: {folder} has no model card ({told})")


def publish_model(run: Run, repository: Repository | None, result: dict[str, Any]) -> None:
    """Uploads final/ to the hub and notes where; rank 0 alone has a repository to give."""
    if repository is not None:
        output = run.output
        say, request = run.tracking.say, run.request
        result["hub"] = publish(output, repository, say, lambda: request.reason)
        output.write_result(result)


def draw_plots(run: Run) -> None:
    """Draws the curves of the run into plots/; rank 0 does it."""
    if run.accelerator.is_main_process:
        try:  # matplotlib takes its time, and may be missing or broken
            from llm_training.plots import plot_run

            plot_run(run.output.path)
        except Exception as error:  # nothing that was trained may be lost for a picture
            run.tracking.say(f"WARNING: no plots are drawn ({type(error).__name__}: {error})")


def decay_now(run: Run) -> None:
    """Begins the final decay of warmup-stable-decay; the run ends with it."""
    state, before = run.state, run.plan
    if state.decay_from is not None:
        run.tracking.say(f"DECAY changes nothing: it has begun at step {state.decay_from}")
        return
    state.decay_from = state.step
    if run.deadline.is_set:
        decay_before_deadline(run)
    else:
        make_plan_anew(run)
    if run.plan.schedule == before.schedule:
        state.decay_from = None
        kind = run.arguments.lr_scheduler_type
        run.tracking.say(f"DECAY changes nothing: lr_scheduler_type={kind}, step {state.step}")
    else:
        run.tracking.say(f"DECAY: the run now ends at step {run.plan.total_steps}")


def decay_before_deadline(run: Run) -> None:
    """The same in a run whose length follows from its hours, which may not make it longer then.

    The decay is a fifth of all steps where nothing else is said, and so a quarter of those so far.
    """
    step, schedule = run.state.step, run.plan.schedule
    end = step + (schedule.decay_steps or max(1, step // 4))
    if schedule.kind == "warmup-stable-decay" and end < run.plan.total_steps:
        run.deadline.state.latest_step = end
        lay_out(run, end)


def review_length(run: Run) -> None:
    """Lays the run out by what is left of its hours, where that is due; every rank calls this."""
    deadline, step = run.deadline, run.state.step
    if not deadline.is_due(step):
        return
    pauses = Pauses(
        eval_steps=run.arguments.eval_steps if run.validation else None,
        save_steps=run.arguments.save_steps,
    )
    readings = Readings(*of_first_rank(run, *dataclasses.astuple(deadline.readings())))
    total = deadline.review(step, readings, pauses, run.arguments.max_steps)
    if total is None or total == run.plan.total_steps:
        return
    if run.plan.is_open:
        run.tracking.say(f"Length: about {total:,} steps fit into {deadline.state.hours:g} hours")
        if total <= run.arguments.warmup_steps:
            run.tracking.say(
                f"WARNING: --warmup_steps {run.arguments.warmup_steps} is as long as all of"
                " --max_train_hours, and nothing decays then. Give fewer, or more hours."
            )
    lay_out(run, total)


def lay_out(run: Run, total_steps: int) -> None:
    """Gives the run another number of steps; its rate goes on from where it stands."""
    schedule = run.plan.schedule.laid_anew(run.state.step, total_steps)
    is_open = total_steps >= OPEN_STEPS
    run.deadline.note(None if is_open else total_steps, schedule.anchor)
    run.state.deadline = run.deadline.to_keep()
    make_plan_anew(run)


def begin_deadline(run: Run) -> None:
    """Lets the hours of training count from here on; every rank calls this before its first step.

    Where other hours are asked for than before the stop, the length is open once more.
    """
    deadline, step = run.deadline, run.state.step
    deadline.start(step)
    if deadline.is_set and deadline.has_other_hours:
        (left,) = of_first_rank(run, deadline.seconds_left)
        lay_out(run, min(run.arguments.max_steps or OPEN_STEPS, OPEN_STEPS if left > 0 else step))


def of_first_rank(run: Run, *values: float) -> list[float]:
    """The values that rank 0 gives, on every rank; all must call this."""
    is_first = run.accelerator.is_main_process
    sums = sum_over_ranks(run.accelerator, *(value if is_first else 0.0 for value in values))
    return [total * tensor_parallel_size(run.accelerator) for total in sums]
