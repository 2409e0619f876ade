"""A few steps of a run, an evaluation and a checkpoint, timed and thrown away."""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

from arguments import Arguments
from llm_training.evaluation import evaluate_sets
from llm_training.launch import seed_everything
from llm_training.outputs import OutputFolder
from llm_training.planning import Plan
from llm_training.run import Run, build_run
from llm_training.stopping import StopRequest
from llm_training.throughput import format_count, format_duration
from llm_training.tracking.train_log import read_points

# The first steps make what later ones find.
STEPS_BEFORE = 2


@dataclass(frozen=True)
class Measured:
    """What a trial took, in seconds.

    Attributes:
        step: the median; slowest: of all.
        evaluation: None where the run evaluates nothing.
        save: of a checkpoint, as long as the run would pause for it.
    """

    step: float
    slowest: float
    num_steps: int
    evaluation: float | None
    save: float


def run_trial(
    arguments: Arguments, request: StopRequest, plan: Plan | None, train: Callable[[Run], None]
) -> None:
    """Trains `dry_run_steps` steps beside the output folder, on all ranks; nothing of it stays.

    Args:
        plan: of the whole run, for which rank 0 says what it will take; None elsewhere.
        train: the loop.
    """
    output = OutputFolder(f"{str(arguments.output_dir).rstrip('/')}.trial-run")
    own = trial_arguments(arguments, str(output.path))
    if plan is not None:
        shutil.rmtree(output.path, ignore_errors=True)
    try:
        with output.lock() if plan is not None else nullcontext():
            measured = _run(own, output, request, train)
        if plan is not None:
            print("\n".join(trial_lines(measured, arguments, plan)), flush=True)
    finally:
        if plan is not None:
            shutil.rmtree(output.path, ignore_errors=True)


def trial_lines(measured: Measured, arguments: Arguments, plan: Plan) -> list[str]:
    """What was measured, and what follows for the whole run."""
    speed = plan.tokens_per_step / measured.step
    pauses = f"save {measured.save:.2f} s"
    if measured.evaluation is not None:
        pauses += f", evaluation {measured.evaluation:.2f} s"
    lines = [
        f"Speed    {1 / measured.step:.3g} steps/s, {format_count(speed)} tokens/s; {pauses}"
        f" (measured; {measured.num_steps} steps, median {measured.step:.3g} s, slowest"
        f" {measured.slowest:.3g} s)"
    ]
    if plan.hours is not None:
        steps = 3600 * plan.hours / measured.step
        return [
            *lines,
            f"Time     about {steps:,.0f} steps fit into {plan.hours:g} hours, less what saves and"
            " evaluations take (from what was measured)",
        ]
    num_saves = _times_due(plan.total_steps, arguments.save_steps)
    num_evaluations = 0
    if measured.evaluation is not None:
        num_evaluations = 1 + _times_due(plan.total_steps, arguments.eval_steps)
    seconds = plan.total_steps * measured.step
    aside = num_saves * measured.save + num_evaluations * (measured.evaluation or 0.0)
    return [
        *lines,
        f"Time     {format_duration(seconds + aside)} for all {plan.total_steps:,} steps,"
        f" {format_duration(aside)} of it for {num_saves} saves and {num_evaluations} evaluations"
        " (from what was measured)",
    ]


def _times_due(total_steps: int, every: int | None) -> int:
    """How often something happens that is done every so many steps and at the end."""
    return -(-total_steps // every) if every else 1


def trial_arguments(arguments: Arguments, folder: str) -> Arguments:
    """The same steps, but few of them, logged one by one to nobody."""
    return dataclasses.replace(
        arguments,
        output_dir=folder,
        report_to=["none"],
        logging_steps=1,
        max_steps=(arguments.dry_run_steps or 0) + STEPS_BEFORE,
        max_train_hours=None,
        warmup_steps=0,
        lr_decay_steps=None,
        save_steps=None,
        save_best=False,
        resume_from_checkpoint="auto",
        early_stopping_patience=None,
        sample_prompt=[],
        sample_validation_prompts=0,
        sample_steps=None,
        max_rewinds=0,
        leakage_report=False,
    )


def _run(
    arguments: Arguments, output: OutputFolder, request: StopRequest, train: Callable[[Run], None]
) -> Measured:
    run = build_run(arguments, output, request)
    validation, run.validation = run.validation, {}  # the loop would begin and end with it
    try:
        seed_everything(run.state.seed, rank=run.accelerator.process_index)
        train(run)
        ended = time.time()
        began = time.perf_counter()
        if validation:
            evaluate_sets(
                run.accelerator,
                run.model,
                validation,
                arguments,
                run.plan.batch,
                token_bytes=run.token_bytes,
            )
        evaluation = time.perf_counter() - began if validation else None
        run.accelerator.wait_for_everyone()
    finally:
        run.windows.close()
        run.tracking.finish("FINISHED", [])
    points = read_points(output.path, run.state.step) if run.accelerator.is_main_process else []
    return measured_from([point.time for point in points], ended, evaluation)


def measured_from(times: list[float], ended: float, evaluation: float | None) -> Measured:
    """What the times of the steps' ends tell, in seconds, and that of the loop's, after a save."""
    seconds = [after - before for before, after in pairwise(times)][STEPS_BEFORE - 1 :]
    return Measured(
        step=statistics.median(seconds or [math.nan]),
        slowest=max(seconds, default=math.nan),
        num_steps=len(seconds),
        evaluation=evaluation,
        save=max(0.0, ended - times[-1]) if times else 0.0,
    )
