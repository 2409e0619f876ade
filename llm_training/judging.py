"""Judging the model in the middle of a run: evaluation, what follows from it, and its record.

Every rank calls these.
"""

from __future__ import annotations

from llm_training.evaluation import evaluate
from llm_training.ranks import sum_over_ranks
from llm_training.run import Run
from llm_training.stopping import decide
from llm_training.tracking import evaluation_line


def evaluate_and_log(run: Run) -> bool:
    """Evaluates where there is something to evaluate on; true if the loss is the best so far.

    A signal ends it early: then it counts for nothing, and the next start begins with it.
    """
    if run.validation is None:
        return False
    with run.meter.paused(), run.deadline.pause("evaluation"):
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
