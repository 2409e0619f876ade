"""Where schedule, evaluations, checkpoints and early stopping do not fit the length of the run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from arguments import Arguments

ON_FLAG = "command line"  # as `Arguments.origins` says it
# Arguments that a person gives by flags alone.
WRITTEN_BY_RUNS = ("show_arguments", "from_run")


def length_problems(arguments: Arguments) -> Iterator[str]:
    """What is at odds between the arguments and max_steps or max_train_hours."""
    yield from _decay_problems(arguments)
    if arguments.max_steps is not None:
        yield from _schedule_problems(arguments, arguments.max_steps)
        yield from _interval_problems(arguments, arguments.max_steps)
        yield from _patience_problems(arguments, arguments.max_steps)


def _decay_problems(arguments: Arguments) -> Iterator[str]:
    kind, decay, hours = (
        arguments.lr_scheduler_type,
        arguments.lr_decay_steps,
        arguments.max_train_hours,
    )
    if decay and kind == "constant":
        advice = "leave it out, or choose another lr_scheduler_type"
        yield f"lr_decay_steps={decay} has no effect with lr_scheduler_type=constant: {advice}"
    elif decay and hours is not None and kind != "warmup-stable-decay":
        yield (
            f"lr_decay_steps={decay} and max_train_hours={hours:g} exclude each other with"
            f" lr_scheduler_type={kind}, whose decay ends with the hours: drop the first, or use"
            " warmup-stable-decay"
        )


def _schedule_problems(arguments: Arguments, total: int) -> Iterator[str]:
    warmup, decay = arguments.warmup_steps, arguments.lr_decay_steps
    if warmup > total:
        yield f"warmup_steps={warmup} is more than max_steps={total}: lower it or raise max_steps"
    elif warmup == total:
        advice = "lower the first or raise the second"
        yield f"warmup_steps={warmup} takes all of max_steps={total}: {advice}"
    elif decay and warmup + decay > total:
        steps = f"warmup_steps={warmup} + lr_decay_steps={decay} = {warmup + decay}"
        yield f"{steps} is more than max_steps={total}: lower one or raise max_steps"
    elif decay is None and arguments.lr_scheduler_type == "warmup-stable-decay":
        fifth = max(1, total // 5)
        if warmup + fifth > total:
            yield (
                f"warmup_steps={warmup} leaves no room for the decay of warmup-stable-decay, which"
                f" takes a fifth of max_steps={total}, {fifth} steps: lower it, or give"
                " lr_decay_steps"
            )


def _interval_problems(arguments: Arguments, total: int) -> Iterator[str]:
    for name, ends in (
        ("eval_steps", "at the start and the end alone, which eval_steps={} says as well"),
        ("save_steps", "only at the end, which save_steps=null says"),
    ):
        interval = getattr(arguments, name)
        if interval is None or interval <= total or not _are_one_wish(arguments, name):
            continue
        what = "evaluates" if name == "eval_steps" else "saves"
        yield (
            f"{name}={interval} is more than max_steps={total}: the run {what}"
            f" {ends.format(total)}; lower the first or raise the second"
        )


def _patience_problems(arguments: Arguments, total: int) -> Iterator[str]:
    """Early stopping that could come at the end at the earliest, where there is nothing to stop."""
    patience, interval = arguments.early_stopping_patience, arguments.eval_steps
    if patience is None or interval is None or interval > total:
        return
    if patience * interval >= total and _are_one_wish(arguments, "early_stopping_patience"):
        yield (
            f"early_stopping_patience={patience} never stops a run of max_steps={total} with"
            f" eval_steps={interval}, for {patience} evaluations take {patience * interval} steps:"
            " lower early_stopping_patience or eval_steps"
        )


def _are_one_wish(arguments: Arguments, name: str) -> bool:
    """Whether a person gave `name` together with max_steps, or over it.

    A run that a flag makes shorter keeps the intervals of its file, and a default contradicts
    nobody. Files in which one of `WRITTEN_BY_RUNS` stands hold every argument, whoever gave it.
    """
    origins = arguments.origins
    if origins.get(name) == ON_FLAG:
        return True
    place, other = (_file_of(origins.get(key, "")) for key in (name, "max_steps"))
    written_by_runs = [_file_of(origins.get(key, "")) for key in WRITTEN_BY_RUNS]
    return place is not None and place == other and place not in written_by_runs


def _file_of(origin: str) -> str | None:
    match = re.fullmatch(r"(.+) line [0-9]+", origin)
    return match[1] if match else None
