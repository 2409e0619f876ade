"""Compares runs: a table of what differs and how they ended, and a PNG with their curves.

Started as `python -m llm_training.compare runs/base runs/other`. A run is named by its output
folder, or by its id or name in MLflow; it may still be training.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_training.comparison_table import Row, table_lines
from llm_training.earlier_run import LEFT_BEHIND
from llm_training.recorded_runs import (
    RecordedRun,
    RecordedRunError,
    default_arguments,
    read_recorded_run,
)
from llm_training.throughput import format_count, format_duration
from llm_training.tracking.redaction import redact

NOISE = 2.0  # standard errors that a difference must exceed to count
SPEED = "perf/tokens_per_second"
UNKNOWN = "?"
# What an evaluation says beside the loss that is also worth a line.
BESIDE_LOSS = ("perplexity", "bits_per_byte", "token_accuracy")


class Difference(NamedTuple):
    """How far a loss lies from that of the first run.

    Attributes:
        value: nats per token; below 0: better than the first.
        stderr: of the difference, where both have one.
    """

    value: float
    stderr: float | None

    @property
    def is_beyond_noise(self) -> bool | None:
        """None where the noise is not known."""
        return None if self.stderr is None else abs(self.value) > NOISE * self.stderr


def main(words: Sequence[str] | None = None) -> int:
    """Reads the command line and compares; the exit code."""
    given = build_parser().parse_args(words)
    try:
        runs = [read_recorded_run(wish, given.tracking_uri) for wish in given.runs]
        names = names_of(runs)
        for metric in given.metric:
            refuse_unknown_metric(metric, runs)
        figure = draw(runs, names, given)
    except (RecordedRunError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(without_nan(as_json(runs, names, figure)), indent=2, allow_nan=False))
        return 0
    width = shutil.get_terminal_size((120, 24)).columns
    print("\n".join(table_lines(names, rows_of(runs, names, given.metric), width)))
    for note in notes_on(runs, names):
        print(note)
    print(f"Curves   {figure}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_training.compare",
        description="Compares runs: what differs, how they ended, and their curves as a PNG.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder, MLflow run id or name of a run there"
    )
    parser.add_argument("--output", default="compare.png", help="the PNG (default: compare.png)")
    parser.add_argument(
        "--tracking_uri",
        help="MLflow's store; default: the environment's MLFLOW_TRACKING_URI, else ./mlflow.db",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help="draw and list these metrics, such as eval/math/loss, in place of the usual ones",
    )
    parser.add_argument(
        "--by",
        choices=("step", "tokens", "time"),
        help="what curves are drawn over; default: losses over steps and tokens, the rest over"
        " steps",
    )
    parser.add_argument("--json", action="store_true", help="print an object in place of the table")
    return parser


def draw(runs: Sequence[RecordedRun], names: Sequence[str], given: argparse.Namespace) -> Path:
    """Writes the figure, and returns where it is."""
    from llm_training.plots import comparison_figure, save

    return save(comparison_figure(runs, names, given.by, given.metric), Path(given.output))


def names_of(runs: Sequence[RecordedRun]) -> list[str]:
    """What the runs are called: by their names where these differ, else by their places."""
    names = [run.name for run in runs]
    return [run.place if names.count(run.name) > 1 and run.place else run.name for run in runs]


def refuse_unknown_metric(metric: str, runs: Sequence[RecordedRun]) -> None:
    """A metric that no run has logged is a slip.

    Raises:
        RecordedRunError: it names those that there are.
    """
    known = sorted(set[str]().union(*(run.series for run in runs)))
    if metric not in known:
        raise RecordedRunError(f"--metric {metric} was logged by no run; there are {known}")


# ----------------------------------------------------------------------------------------- results


def difference(run: RecordedRun, first: RecordedRun, metric: str) -> Difference | None:
    """How far the last value of a loss lies from that of the first run.

    The rows are not known one by one, so the two are taken as independent; where both were judged
    on the same rows, the true standard error is usually smaller.
    """
    now, then = run.last(metric), first.last(metric)
    if run is first or now is None or then is None:
        return None
    errors = [of.at(f"{metric}_stderr", int(of.series[metric].steps[-1])) for of in (run, first)]
    if any(error is None or not math.isfinite(error) for error in errors):
        return Difference(now - then, None)
    return Difference(now - then, math.hypot(*(error or 0.0 for error in errors)))


def losses_of(runs: Sequence[RecordedRun]) -> list[str]:
    """The validation losses that any run logged, that of the main set first."""
    names = set[str]().union(*(run.series for run in runs))
    return sorted(
        (name for name in names if name.startswith("eval/") and name.endswith("/loss")),
        key=lambda name: (name != "eval/loss", name),
    )


def speed_of(run: RecordedRun) -> float | None:
    """The median of its tokens per second."""
    if SPEED not in run.series or not len(run.series[SPEED].finite.values):
        return None
    return float(np.median(run.series[SPEED].finite.values))


def common_tokens(runs: Sequence[RecordedRun]) -> float | None:
    """Tokens up to which all runs were evaluated; None where they ended alike, or do not say."""
    ends = [
        float(run.series["eval/loss"].finite.tokens[-1])
        for run in runs
        if "eval/loss" in run.series and len(run.series["eval/loss"].finite.tokens)
    ]
    if len(ends) < 2 or not all(map(math.isfinite, ends)) or max(ends) <= 1.01 * min(ends):
        return None
    return min(ends)


def loss_at_tokens(run: RecordedRun, tokens: float) -> float | None:
    """The validation loss at so many tokens, between two evaluations on the line between them."""
    if "eval/loss" not in run.series:
        return None
    series = run.series["eval/loss"].finite
    return float(np.interp(tokens, series.tokens, series.values)) if len(series.values) else None


# ------------------------------------------------------------------------------------- differences


def argument_values(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """Each argument of all runs; names and such that always differ are left out.

    One that a run does not name, because it is of an earlier version, has its default.
    """
    defaults = default_arguments()
    named = [name for run in runs for name in run.arguments]
    names = [name for name in dict.fromkeys([*defaults, *named]) if name not in LEFT_BEHIND]
    return {
        name: [
            redact(run.arguments.get(name, defaults.get(name)), name) if run.arguments else UNKNOWN
            for run in runs
        ]
        for name in names
    }


def provenance_values(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """Each fact of the provenance of all runs; inner ones as `validation_set_tokens.math`."""
    facts = [dict(_flat(run.provenance)) for run in runs]
    names = dict.fromkeys(name for own in facts for name in own)
    return {name: [own.get(name, UNKNOWN) for own in facts] for name in names}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", redact(value, name)


def differing(values: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Those that are not the same in all runs."""
    return {name: own for name, own in values.items() if any(value != own[0] for value in own)}


# ------------------------------------------------------------------------------------------ output


def rows_of(
    runs: Sequence[RecordedRun], names: Sequence[str], metrics: Sequence[str] = ()
) -> Iterator[Row]:
    """The table, section by section."""
    arguments, facts = argument_values(runs), provenance_values(runs)
    changed, different = differing(arguments), differing(facts)
    why = "equal"
    if len(runs) == 1:  # nothing to differ from but the defaults
        why, different = "default", facts
        defaults = default_arguments()
        changed = {n: own for n, own in arguments.items() if own[0] != defaults.get(n)}
    for title, kind, shown, num_left in (
        ("Arguments", "argument", changed, len(arguments) - len(changed)),
        ("Ran with", "fact", different, len(facts) - len(different)),
    ):
        yield Row(title)
        for name, own in shown.items():
            yield Row(f"  {name}", [value_text(value) for value in own])
        if num_left:
            yield Row(f"  {num_left} {why} {kind}{'s' * (num_left > 1)} not shown")
    yield Row("Results")
    yield Row("  status", [run.status for run in runs])
    yield Row("  step", [f"{run.step:,}" for run in runs])
    yield Row("  tokens", [_shown(run.tokens, ",") for run in runs])
    yield Row("  time", [format_duration(run.seconds) for run in runs])
    speeds = [speed_of(run) for run in runs]
    yield Row("  tokens/s, median", [UNKNOWN if s is None else format_count(s) for s in speeds])
    yield from loss_rows(runs, names)
    beside = [f"eval/{name}" for name in BESIDE_LOSS]
    for metric in dict.fromkeys([*beside, *metrics]):
        if any(metric in run.series for run in runs):
            yield Row(f"  {metric}, last", [_shown(run.last(metric), ".4g") for run in runs])


def loss_rows(runs: Sequence[RecordedRun], names: Sequence[str]) -> Iterator[Row]:
    """Losses, and how far each lies from that of the first run."""
    yield Row("  train/loss, last", [_shown(run.last("train/loss"), ".4f") for run in runs])
    for metric in losses_of(runs):
        if metric == "eval/loss":
            lowest = [run.lowest(metric) for run in runs]
            texts = [f"{low[1]:.4f} at step {low[0]:,}" if low else UNKNOWN for low in lowest]
            yield Row("  eval/loss, best", texts)
        yield Row(f"  {metric}, last", [_with_error(run, metric) for run in runs])
        differences = [difference(run, runs[0], metric) for run in runs]
        if any(differences):
            texts = [difference_text(own) if own else "" for own in differences]
            yield Row(f"    less {names[0]}", texts)
            yield Row("", [noise_text(own) if own else "" for own in differences])
    if (tokens := common_tokens(runs)) is not None:
        losses = [loss_at_tokens(run, tokens) for run in runs]
        label = f"  eval/loss at {format_count(tokens)} tokens"
        yield Row(label, [_shown(loss, ".4f") for loss in losses])


def notes_on(runs: Sequence[RecordedRun], names: Sequence[str]) -> Iterator[str]:
    """What must be known to read the table."""
    found = [difference(run, runs[0], metric) for run in runs for metric in losses_of(runs)]
    if any(own and own.stderr is not None for own in found):
        yield (
            f"A difference to {names[0]} is beyond noise above {NOISE:g} of its standard errors;"
            " unpaired: the two losses are taken as independent."
        )
    first = runs[0].provenance.get("data_fingerprint")
    others = [
        name
        for run, name in zip(runs, names, strict=True)
        if run.provenance.get("data_fingerprint") != first
    ]
    if others:
        yield (
            f"Other data than {names[0]} (data_fingerprint): {', '.join(others)}. Losses compare"
            " only on the same validation text and tokenizer; bits per byte on the same text."
        )


def value_text(value: Any) -> str:
    """A value on one line; of hashes the beginning."""
    if isinstance(value, str):
        head, plus, tail = value.partition("+")
        is_hash = len(head) >= 32 and not head.strip("0123456789abcdef")
        return head[:12] + plus + tail if is_hash else value
    if isinstance(value, list) and all(isinstance(element, str) for element in value):
        return " ".join(value) or "[]"
    return json.dumps(value, ensure_ascii=False, default=str)


def difference_text(own: Difference) -> str:
    error = "" if own.stderr is None else f" ± {own.stderr:.4f}"
    return f"{own.value:+.4f}{error}"


def noise_text(own: Difference) -> str:
    if own.is_beyond_noise is None:
        return "noise unknown"
    return "beyond noise" if own.is_beyond_noise else "within noise"


def _with_error(run: RecordedRun, metric: str) -> str:
    value = run.last(metric)
    if value is None:
        return UNKNOWN
    error = run.at(f"{metric}_stderr", int(run.series[metric].steps[-1]))
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _shown(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def as_json(runs: Sequence[RecordedRun], names: Sequence[str], figure: Path) -> dict[str, Any]:
    """The same as plain data, with all final metrics."""
    arguments, facts = argument_values(runs), provenance_values(runs)
    different_arguments, different_facts = differing(arguments), differing(facts)
    return {
        "runs": [run_as_json(run, runs[0], name) for run, name in zip(runs, names, strict=True)],
        "differing_arguments": different_arguments,
        "num_equal_arguments": len(arguments) - len(different_arguments),
        "differing_provenance": different_facts,
        "num_equal_provenance": len(facts) - len(different_facts),
        "figure": str(figure),
    }


def run_as_json(run: RecordedRun, first: RecordedRun, name: str) -> dict[str, Any]:
    """How one run ended."""
    lowest = run.lowest("eval/loss")
    differences = {metric: difference(run, first, metric) for metric in losses_of([run])}
    return {
        "name": name,
        "place": run.place,
        "status": run.status,
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": speed_of(run),
        "best": lowest and {"metric": "eval/loss", "step": lowest[0], "value": lowest[1]},
        "last": {metric: run.last(metric) for metric in run.series},
        "to_first": {
            metric: {
                "difference": own.value,
                "standard_error": own.stderr,
                "is_paired": False,
                "is_beyond_noise": own.is_beyond_noise,
            }
            for metric, own in differences.items()
            if own
        },
    }


def without_nan(value: Any) -> Any:
    """A copy in which null stands for what is not a finite number, as JSON has none."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
