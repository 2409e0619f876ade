"""What is wrong with how a run is judged: its validation sets, and the metric that decides."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator

from arguments import Arguments, mixture_sources
from llm_training.validation_sets import validation_set_arguments

# What is computed here; other names in eval_metrics are left to the package evaluate.
LOCAL_METRICS = ("perplexity", "bits_per_byte", "token_accuracy")
# Beside these, what is logged of every set.
_ALWAYS_LOGGED = ("loss", "loss_stderr", "tokens")
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
# As MLflow takes them in the name of a metric.
_SOURCE_NAME = re.compile(r"[\w. :-]+(/[\w. :-]+)*")


def evaluation_problems(arguments: Arguments) -> Iterator[str]:
    """What is at odds between validation data, metrics, the best checkpoint and early stopping."""
    yield from _wish_problems(arguments)
    yield from _sample_problems(arguments)
    yield from _name_problems(arguments)
    yield from _other_metric_problems(arguments)
    yield from _metric_problems(arguments)
    yield from _min_delta_problems(arguments)


def _can_validate(arguments: Arguments) -> bool:
    return bool(arguments.validation_sets) or any(
        own.validation_file or own.validation_split_percentage > 0
        for own in mixture_sources(arguments).values()
    )


def _sample_problems(arguments: Arguments) -> Iterator[str]:
    """Samples without anything to continue."""
    number = arguments.sample_validation_prompts
    if arguments.sample_steps and not arguments.sample_prompt and not number:
        advice = "give sample_prompt or sample_validation_prompts"
        yield f"sample_steps={arguments.sample_steps} has nothing to continue: {advice}"
    if number > 0 and (arguments.eval_steps is None or not _can_validate(arguments)):
        advice = "give sample_prompt, or let the run evaluate (eval_steps, validation_file)"
        yield f"sample_validation_prompts={number} needs validation data: {advice}"


def _wish_problems(arguments: Arguments) -> Iterator[str]:
    """Wishes that need evaluations, where there are none."""
    can_validate = _can_validate(arguments)
    for name in ("save_best", "early_stopping_patience", "eval_only"):
        value = getattr(arguments, name)
        wish = f"{name}={json.dumps(value)}"
        if value and not can_validate:
            advice = "give validation_file, or a validation_split_percentage above 0"
            yield f"{wish} needs validation data: {advice}"
        if value and arguments.eval_steps is None and name != "eval_only":
            yield f"{wish} needs evaluations, but eval_steps is null: set eval_steps"


def _name_problems(arguments: Arguments) -> Iterator[str]:
    """Names that would stand in the names of metrics, and cannot."""
    metrics = {*_ALWAYS_LOGGED, *LOCAL_METRICS, *arguments.eval_metrics}
    for name in arguments.validation_sets:
        if not _SET_NAME.fullmatch(name):
            advice = "use letters, digits, _ and -"
            yield f"validation_sets: {json.dumps(name)} cannot name a set: {advice}"
        elif name in arguments.train_mixture:
            yield (
                f"validation_sets: {name} is a source of train_mixture, whose validation data is"
                " judged by that name already: give the set another"
            )
        elif name in metrics:
            yield f"validation_sets: {name} is the name of a metric: give the set another"
    for name in arguments.train_mixture:
        if not _SOURCE_NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
            yield (
                f"train_mixture: {json.dumps(name, ensure_ascii=False)} would stand in the names of"
                " metrics, and cannot: use letters, digits, spaces and _ - . : /"
            )


def _other_metric_problems(arguments: Arguments) -> Iterator[str]:
    """What is left to the package evaluate, where it is a slip or a path that leads nowhere."""
    for name in arguments.eval_metrics:
        if name in LOCAL_METRICS:
            continue
        if close := difflib.get_close_matches(name, LOCAL_METRICS, n=1, cutoff=0.85):
            yield f"eval_metrics={name}: did you mean {close[0]}?"
        elif (name.endswith(".py") or name.startswith((".", "/"))) and not os.path.exists(name):
            yield (
                f"eval_metrics={name} does not exist: there is no {os.path.abspath(name)}; correct"
                " the path"
            )


def _metric_problems(arguments: Arguments) -> Iterator[str]:
    """A metric to go by that will not be logged, as far as its name tells."""
    wish, metric = f"metric_for_best_model={arguments.metric_for_best_model}", own_name(arguments)
    names = [*arguments.validation_sets, *arguments.train_mixture]
    of_set = set_name(arguments)
    if of_set is None:
        yield f"{wish} is no metric of an evaluation: such as eval/loss, or eval/NAME/loss of a set"
        return
    if of_set and of_set not in names:
        known = f"there are {', '.join(names)}" if names else "there is none"
        yield f"{wish}: no set of validation_sets has the name {of_set}; {known}"
        return
    known_here = ("loss", *(name for name in arguments.eval_metrics if name in LOCAL_METRICS))
    # What a metric of evaluate calls its results is not known before the first evaluation.
    has_others = any(name not in LOCAL_METRICS for name in arguments.eval_metrics)
    if metric in known_here or (has_others and metric not in (*LOCAL_METRICS, *_ALWAYS_LOGGED)):
        return
    advice = f"add {metric} to eval_metrics" if metric in LOCAL_METRICS else "use one of these"
    yield f"{wish} is not computed: {advice}; there are {', '.join(known_here)}"


def _min_delta_problems(arguments: Arguments) -> Iterator[str]:
    """Standard errors as the unit of early_stopping_min_delta, where it has no meaning."""
    if arguments.early_stopping_min_delta_unit != "standard_errors":
        return
    wish = "early_stopping_min_delta_unit=standard_errors"
    if arguments.early_stopping_patience is None:
        yield f"{wish} has no effect without early_stopping_patience: drop it, or give that"
    elif not arguments.early_stopping_min_delta:
        yield (
            f"{wish} with early_stopping_min_delta=0 asks for no difference at all: give one such"
            " as 2, or drop the first"
        )
    elif own_name(arguments) != "loss":
        yield (
            f"{wish} is for a loss, and metric_for_best_model={arguments.metric_for_best_model} has"
            " none: go by eval/loss or that of a set, or use absolute"
        )
    elif set_name(arguments) in arguments.train_mixture:
        yield (
            f"{wish} is not known of a source, as in"
            f" metric_for_best_model={arguments.metric_for_best_model}: give its validation data as"
            " a set of validation_sets too, or use absolute"
        )


def own_name(arguments: Arguments) -> str:
    """What metric_for_best_model measures: `loss` of eval/math/loss."""
    return arguments.metric_for_best_model.rpartition("/")[-1]


def set_name(arguments: Arguments) -> str | None:
    """The set or source that it is measured on, "" for the main one; None: it is no such name."""
    name = arguments.metric_for_best_model
    if not name.startswith("eval/") or name.endswith("/"):
        return None
    return name.removeprefix("eval/").rpartition("/")[0]


def set_problems(arguments: Arguments) -> Iterator[tuple[str, Arguments, str | None]]:
    """Of each set its name, its own arguments, and what is wrong with where its data is."""
    for name, own in validation_set_arguments(arguments).items():
        settings, problem = arguments.validation_sets[name], None
        if settings.get("validation_file") and settings.get("dataset_name"):
            problem = "validation_file and dataset_name exclude each other: keep one"
        elif not own.validation_file and not own.dataset_name:
            problem = "no data: give validation_file or dataset_name"
        elif not own.validation_file and "dataset_name" not in settings:
            if arguments.streaming:
                problem = (
                    "streaming=true reads no further split: give its data as a validation_file, or"
                    " as a dataset_name of its own"
                )
            elif "dataset_validation_split" not in settings:
                problem = "no data of its own: give validation_file or dataset_validation_split"
        yield name, own, problem
