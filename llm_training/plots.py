"""Curves as PNG: those of one run, and several runs in one figure.

Every figure is an object of its own, and pyplot, which keeps a state for the whole process, is left
alone: plots may be drawn on any thread. Colours are those of Okabe and Ito, which people with any
kind of colour blindness can tell apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from llm_training.recorded_runs import LOG, RecordedRun, Series, read_series

By = Literal["step", "tokens", "time"]
Array = NDArray[np.float64]
Dashes = Literal["-", "--", ":", "-."]

FOLDER = "plots"
DOTS_PER_INCH = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")  # the second seven runs, the third, ...
# More points than this are shown faintly, and the medians of so many stretches boldly.
MAX_POINTS_UNSMOOTHED, NUM_MEDIANS = 150, 75
NUM_BUCKETS = 1500  # of points drawn: a panel has about as many columns of pixels
MAX_MARKED_POINTS = 60
MAX_NAME = 60  # characters of a run's name in the legend
# A loss that falls so far, or a norm that varies so much, is drawn on a logarithmic scale.
LOG_FROM_RATIO_OF_LOSS, LOG_FROM_RATIO = 2.5, 20.0
LABELS = {
    "train/loss": "training loss (nats per token)",
    "eval/loss": "validation loss (nats per token)",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "perf/tokens_per_second": "tokens per second",
}
SINGLE_PLOTS = {
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "throughput": "perf/tokens_per_second",
}
LINEAR = ("train/learning_rate", "perf/tokens_per_second")  # and from 0
LOSS_OF_SET = re.compile(r"eval/(?:(.+)/)?loss")
TIME_UNITS = ((7200.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.0, 1.0, "s"))


class XAxis(NamedTuple):
    """What curves are drawn over.

    Attributes:
        by: step, tokens or time.
        seconds: length of the unit of time.
        label: with the unit.
    """

    by: By = "step"
    seconds: float = 1.0
    label: str = "step"

    def of(self, series: Series) -> Array:
        """Where the points of a series stand."""
        if self.by == "time":
            return series.seconds / self.seconds
        return series.tokens if self.by == "tokens" else series.steps.astype(float)


class Look(NamedTuple):
    """How a curve looks, and what the legend calls it."""

    label: str
    colour: str
    dashes: Dashes

    @classmethod
    def numbered(cls, number: int, label: str) -> Look:
        """The looks are told apart by colour, and from the eighth on by dashes too."""
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        return cls(label, COLOURS[number % len(COLOURS)], dashes)


def plot_run(folder: Path) -> list[Path]:
    """Draws the curves of a run from its train_log.jsonl, finished or not.

    Args:
        folder: its output folder.

    Returns:
        The files in `plots/` there: loss.png, learning_rate.png, grad_norm.png and throughput.png,
        without those of which nothing was logged.
    """
    series = read_series(folder / LOG)
    figures = {}
    if "train/loss" in series or any(map(LOSS_OF_SET.fullmatch, series)):
        figures["loss"] = loss_figure(series)
    for name, metric in SINGLE_PLOTS.items():
        if metric in series:
            figures[name] = single_figure(series[metric], metric)
    return [save(figure, folder / FOLDER / f"{name}.png") for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG; the file is the old one or the new one at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; its size is in inches."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# -------------------------------------------------------------------------------------- one run


def loss_figure(series: dict[str, Series]) -> Figure:
    """Training loss, and the loss of each validation set, by step and with tokens above."""
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    of_sets = [name for name in series if LOSS_OF_SET.fullmatch(name)]
    names = [name for name in ("train/loss", *sorted(of_sets, key=len)) if name in series]
    for number, name in enumerate(names):
        match = LOSS_OF_SET.fullmatch(name)
        label = "training" if match is None else f"validation {match[1] or ''}".strip()
        draw_metric(axes, series, name, XAxis(), Look.numbered(number, label))
    finish_axes(axes, "train/loss", [series[name] for name in names], XAxis())
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    add_token_axis(axes, series[names[0]])
    return figure


def single_figure(series: Series, metric: str) -> Figure:
    """One metric by step."""
    figure = new_figure(8, 3.6)
    axes = figure.add_subplot()
    draw_metric(axes, {metric: series}, metric, XAxis(), Look.numbered(0, ""))
    finish_axes(axes, metric, [series], XAxis())
    return figure


def add_token_axis(axes: Axes, series: Series) -> None:
    """Says above the plot how many tokens were predicted until each step."""
    steps, first = np.unique(np.append(0, series.steps), return_index=True)
    tokens = np.append(0.0, series.tokens)[first]
    if len(steps) < 2 or not (np.diff(tokens) > 0).all():  # also where they are not known
        return

    def line(x: Any, known: NDArray[Any], wanted: NDArray[Any]) -> Array:
        """Between the known points, and straight on beside them."""
        x = np.asarray(x, float)
        inside = np.interp(x, known, wanted)
        return np.where((x < 0) | (x > known[-1]), x * (wanted[-1] / known[-1]), inside)

    above = axes.secondary_xaxis(
        "top", functions=(lambda x: line(x, steps, tokens), lambda x: line(x, tokens, steps))
    )
    above.set_xlabel("tokens")
    above.xaxis.set_major_formatter(FuncFormatter(count_label))


# ---------------------------------------------------------------------------------- several runs


def comparison_figure(
    runs: Sequence[RecordedRun],
    names: Sequence[str],
    by: By | None = None,
    metrics: Sequence[str] = (),
) -> Figure:
    """Curves of several runs, a colour each.

    Args:
        names: what the runs are called in the legend.
        by: what they are drawn over; None: the losses over steps and over tokens, the rest over
            steps.
        metrics: drawn in place of the usual ones.
    """
    looks = [Look.numbered(number, name) for number, name in enumerate(names)]
    rows = panels_of(by, metrics)
    figure = new_figure(11, 0.9 + 3.3 * len(rows))
    grid = figure.add_gridspec(len(rows), 6)
    for i, row in enumerate(rows):
        width = 6 // len(row)
        for j, (metric, over) in enumerate(row):
            axes = figure.add_subplot(grid[i, j * width : (j + 1) * width])
            draw_panel(axes, runs, looks, metric, x_axis(over, runs))
    lines = [Line2D([], [], color=look.colour, linestyle=look.dashes) for look in looks]
    labels = [name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :] for name in names]
    # In inches: the figure, and an entry of the legend with its line.
    columns = int(11 / (0.7 + 0.1 * max(map(len, labels))))
    figure.legend(lines, labels, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def panels_of(by: By | None, metrics: Sequence[str]) -> list[list[tuple[str, By]]]:
    """What is drawn over what, in rows of two and three panels."""
    over: By = by or "step"
    if metrics:
        panels = [(metric, over) for metric in metrics]
        return [panels[first : first + 2] for first in range(0, len(panels), 2)]
    below = [(metric, over) for metric in SINGLE_PLOTS.values()]
    if by is not None:
        return [[("train/loss", by), ("eval/loss", by)], below]
    losses = ("train/loss", "eval/loss")
    return [*([(loss, "step"), (loss, "tokens")] for loss in losses), below]  # type: ignore[list-item]


def x_axis(by: By, runs: Sequence[RecordedRun]) -> XAxis:
    """Time is told in a unit that suits the longest run."""
    if by != "time":
        return XAxis(by, label=by)
    longest = max((run.seconds for run in runs), default=0.0)
    seconds, unit = next((own, unit) for least, own, unit in TIME_UNITS if longest >= least)
    return XAxis(by, seconds, f"time ({unit})")


def draw_panel(
    axes: Axes, runs: Sequence[RecordedRun], looks: Sequence[Look], metric: str, over: XAxis
) -> None:
    """One metric of all runs that logged it."""
    drawn = []
    for run, look in zip(runs, looks, strict=True):
        series = run.series.get(metric)
        if series is not None and np.isfinite(over.of(series)).all():
            draw_metric(axes, run.series, metric, over, look)
            drawn.append(series)
    finish_axes(axes, metric, drawn, over)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="grey")


# --------------------------------------------------------------------------------------- drawing


def draw_metric(
    axes: Axes, series: Mapping[str, Series], metric: str, over: XAxis, look: Look
) -> None:
    """A curve; one of many points is thinned so that its spikes stay, with its medians over it.

    An evaluation has a band of one standard error about it, where that was logged. What is not a
    number is marked at the upper edge.
    """
    own, colour = series[metric], look.colour
    x, y = over.of(own.finite), own.finite.values
    is_smoothed = is_noisy(metric) and len(x) > MAX_POINTS_UNSMOOTHED
    if is_smoothed:
        axes.plot(*thinned(x, y), color=colour, linewidth=0.6, alpha=0.3, zorder=1)
    x, y = medians(x, y) if is_smoothed else thinned(x, y)
    axes.plot(
        *(x, y, look.dashes),
        color=colour,
        label=look.label,
        linewidth=1.6 if is_smoothed else 1.3,
        marker="o" if metric.startswith("eval/") and len(x) <= MAX_MARKED_POINTS else "",
        markersize=3,
        zorder=3,
    )
    if (errors := series.get(f"{metric}_stderr")) is not None:
        draw_band(axes, own.finite, errors.finite, over, colour)
    strange = over.of(own)[~np.isfinite(own.values)]
    if len(strange):
        some = strange[:: 1 + len(strange) // NUM_BUCKETS]
        edge = axes.get_xaxis_transform()
        axes.plot(some, np.full(len(some), 0.98), "x", color=colour, transform=edge, markersize=5)


def draw_band(axes: Axes, own: Series, errors: Series, over: XAxis, colour: str) -> None:
    """One standard error to either side."""
    _, here, there = np.intersect1d(own.steps, errors.steps, return_indices=True)
    x, y, error = over.of(own)[here], own.values[here], errors.values[there]
    axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0, zorder=2)


def finish_axes(axes: Axes, metric: str, drawn: Sequence[Series], over: XAxis) -> None:
    """Scales, labels and grid."""
    values = np.concatenate([np.empty(0), *(series.finite.values for series in drawn)])
    is_loss = metric == "train/loss" or LOSS_OF_SET.fullmatch(metric)
    if metric in LINEAR:
        axes.set_ylim(0, 1.05 * float(values.max(initial=0.0)) or 1.0)
    elif len(values) and values.min() > 0:
        ratio = float(values.max() / values.min())
        if ratio > (LOG_FROM_RATIO_OF_LOSS if is_loss else LOG_FROM_RATIO):
            use_log_scale(axes, ratio)
    if metric == "perf/tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(count_label))
    elif metric == "train/learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylabel(LABELS.get(metric, metric))
    axes.set_xlabel(over.label)
    axes.xaxis.set_major_locator(
        MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=over.by == "step")
    )
    axes.xaxis.set_major_formatter(FuncFormatter(count_label))
    axes.set_title(notes_on(axes, metric, drawn), fontsize=8, color="dimgrey", loc="right")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def is_noisy(metric: str) -> bool:
    """Whether its values scatter from step to step."""
    return metric != "train/learning_rate"


def notes_on(axes: Axes, metric: str, drawn: Sequence[Series]) -> str:
    """What the reader must know of how the curves are drawn."""
    notes = []
    longest = max((len(series.finite.values) for series in drawn), default=0)
    if is_noisy(metric) and longest > MAX_POINTS_UNSMOOTHED:
        notes.append(f"bold: medians of about {longest / NUM_MEDIANS:,.0f} points")
    if any(isinstance(artist, FillBetweenPolyCollection) for artist in axes.collections):
        notes.append("band: ± 1 standard error")
    if not all(np.isfinite(series.values).all() for series in drawn):
        notes.append("x: not a finite number")
    return "; ".join(notes)


def use_log_scale(axes: Axes, ratio: float) -> None:
    """A logarithmic scale with plain numbers."""
    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1, 3)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def count_label(value: float, _: int | None = None) -> str:
    """1250000 as 1.25M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def thinned(x: Array, y: Array, num_buckets: int = NUM_BUCKETS) -> tuple[Array, Array]:
    """The lowest and the highest point of each of so many stretches, in their order.

    Curves of no more points than these are returned as they are.
    """
    if len(x) <= 2 * num_buckets:
        return x, y
    edges = np.linspace(0, len(x), num_buckets + 1).astype(int)
    lowest = [first + int(np.argmin(y[first:last])) for first, last in pairwise(edges)]
    highest = [first + int(np.argmax(y[first:last])) for first, last in pairwise(edges)]
    kept = np.unique([0, *lowest, *highest, len(x) - 1])
    return x[kept], y[kept]


def medians(x: Array, y: Array, num_stretches: int = NUM_MEDIANS) -> tuple[Array, Array]:
    """The medians of stretches of equally many points; a spike moves them little."""
    edges = np.linspace(0, len(x), num_stretches + 1).astype(int)
    parts = [slice(first, last) for first, last in pairwise(edges)]
    return np.array([np.median(x[p]) for p in parts]), np.array([np.median(y[p]) for p in parts])
