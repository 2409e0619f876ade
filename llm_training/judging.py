"""Judging the model in the middle of a run: evaluation, what follows from it, and its record.

Every rank calls these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from arguments import EvaluationArguments
from llm_training.evaluation import Judgement, evaluate_sets, metrics_of
from llm_training.metrics import MetricError
from llm_training.ranks import sum_over_ranks
from llm_training.run import Run
from llm_training.state import Aim, Result
from llm_training.stopping import decide
from llm_training.tracking import evaluation_lines
from llm_training.uncertainty import paired_difference

FALLING = ("loss", "perplexity", "bits_per_byte")


def evaluate_and_log(run: Run) -> bool:
    """Evaluates where there is something to evaluate on; true if the result is the best so far.

    A signal ends it early: then it counts for nothing, and the next start begins with it.

    Raises:
        MetricError: the metric that decides is not among the results; on every rank.
    """
    state = run.state
    if not run.validation:
        return False
    if state.evaluated_step == state.step:
        run.tracking.say(f"EVAL changes nothing: step {state.step} is evaluated already")
        return False
    with run.meter.paused(), run.deadline.pause("evaluation"):
        judgements = evaluate_sets(
            run.accelerator,
            run.model,
            run.validation,
            run.arguments,
            run.plan.batch,
            token_bytes=run.token_bytes,
            is_stopped=lambda: is_asked_to_stop(run),
        )
    if judgements is None:
        return False
    state.evaluated_step = state.step
    found = metrics_of(judgements).items()
    # But for how many tokens there were, the same each time.
    metrics = {name: value for name, value in found if not name.endswith("/tokens")}
    # By tokens, the losses of training and validation can be laid over each other. A step whose
    # own line was logged has them already.
    is_logged = state.step > 0 and state.logged_tokens == 0
    tokens = {} if is_logged else {"train/tokens": state.tokens}
    run.tracking.log(metrics | tokens, state.step)
    for line in evaluation_lines(state.step, metrics):
        run.tracking.say(line)
    aim = aim_of(run.arguments)
    result = result_of(run, judgements, metrics, aim)
    state.note_loss(metrics["eval/loss"])
    return state.note_result(result, aim, paired_difference)


def aim_of(arguments: EvaluationArguments) -> Aim:
    """What the best checkpoint and early stopping go by."""
    metric, rises = arguments.metric_for_best_model, arguments.greater_is_better
    return Aim(
        metric,
        rises=metric.rpartition("/")[-1] not in FALLING if rises is None else rises,
        min_delta=arguments.early_stopping_min_delta,
        in_standard_errors=arguments.early_stopping_min_delta_unit == "standard_errors",
    )


def result_of(
    run: Run, judgements: Mapping[str, Judgement], metrics: Mapping[str, float], aim: Aim
) -> Result:
    """The result that decides, with the losses of its groups of rows where they are asked for.

    Raises:
        MetricError: it is not among the metrics, or of a single row.
    """
    if aim.metric not in metrics:
        raise MetricError(
            f"--metric_for_best_model {aim.metric} is not among the results of the evaluation:"
            f" {', '.join(metrics)}. Name one of these."
        )
    names = deciding_sets(judgements, aim.metric)
    result = Result(
        aim.metric,
        aim.rises,
        metrics[aim.metric],
        run.state.step,
        rows=" ".join(mark_of_set(run, name) for name in names),
    )
    if not aim.in_standard_errors:
        return result
    judged = [judgements[name] for name in names]
    losses = np.concatenate([of_set.group_losses for of_set in judged])
    tokens = np.concatenate([of_set.group_tokens for of_set in judged])
    if np.count_nonzero(tokens) < 2:
        raise MetricError(
            f"--early_stopping_min_delta_unit standard_errors: {aim.metric} is of a single row,"
            " which has none. Give more validation data, or absolute."
        )
    return dataclasses.replace(
        result, group_losses=tuple(losses.tolist()), group_tokens=tuple(tokens.tolist())
    )


def deciding_sets(judgements: Mapping[str, Judgement], metric: str) -> list[str]:
    """The sets whose rows a metric is of: one, or all of them where there is no main set."""
    name = metric.removeprefix("eval/").rpartition("/")[0]
    if name not in judgements:
        name = ""  # a source of the mixture, whose rows are among those of the main set
    return [name] if name in judgements else list(judgements)


def mark_of_set(run: Run, name: str) -> str:
    """Marks the rows that a set is judged on: equal marks are equal rows."""
    rows, limit = run.validation[name], run.arguments.eval_max_batches
    sets = run.facts.get("validation_set_fingerprints", {})
    fingerprint = sets[name] if name else run.facts["data_fingerprint"]
    most = rows.num_rows if limit is None else limit * run.plan.batch.global_batch
    return f"{fingerprint[:12]}:{rows.block_size}:{min(rows.num_rows, most)}"


def is_asked_to_stop(run: Run) -> bool:
    """Whether any rank got a signal; every rank must call this, and all get the same answer."""
    run.stop = decide(sum_over_ranks(run.accelerator, *run.request.votes())).stop
    return run.stop is not None
