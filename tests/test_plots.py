"""Proves that plots show what was logged: every curve, with labels, spikes and gaps, on any log."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from llm_training.plots import (
    COLOURS,
    MAX_POINTS_UNSMOOTHED,
    NUM_BUCKETS,
    comparison_figure,
    count_label,
    loss_figure,
    medians,
    panels_of,
    plot_run,
    single_figure,
    thinned,
    x_axis,
)
from llm_training.recorded_runs import RecordedRun, read_folder
from tests.recorded_run_files import STDERR, log_lines, write_log, write_run

ALL_PLOTS = ["loss", "learning_rate", "grad_norm", "throughput"]


def read(folder: Path, lines: list[dict[str, Any]]) -> RecordedRun:
    write_log(folder, lines)
    return read_folder(folder)


def is_drawn_on(path: Path) -> bool:
    image = matplotlib.image.imread(path)
    colours = {tuple(colour) for colour in (255 * image[::3, ::3]).astype(int).reshape(-1, 4)}
    return len(colours) > 20


def test_the_plots_of_a_run_are_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    paths = plot_run(tmp_path)
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in ALL_PLOTS]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(
        path.name for path in paths
    )
    assert all(is_drawn_on(path) for path in paths)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        ([{"step": 0, "time": 1.0, "eval/loss": 2.0}], ["loss"]),
        ([{"step": 0, "time": 1.0, "eval/math/loss": 2.0}], ["loss"]),
        ([{"step": 1, "time": 1.0, "train/loss": "NaN"}], ["loss"]),
        ([{"step": 1, "time": 1.0, "train/grad_norm": "Infinity"}], ["grad_norm"]),
        ([{"step": 1, "time": 1.0, "train/grad_norm": 0.0}], ["grad_norm"]),
        ([{"step": 1, "time": 1.0, "train/loss": 1e300}], ["loss"]),
        ([{"step": 1, "time": 1.0, "train/loss": 1.0, "train/tokens": 0}], ["loss"]),
    ],
)
def test_any_log_can_be_drawn(
    tmp_path: Path, lines: list[dict[str, Any]], expected: list[str]
) -> None:
    write_log(tmp_path, lines)
    assert [path.stem for path in plot_run(tmp_path)] == expected


def test_the_loss_of_training_and_of_each_set_is_drawn_with_tokens_above(tmp_path: Path) -> None:
    run = read(tmp_path, log_lines())
    (axes,) = loss_figure(run.series).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == ["training", "validation", "validation math"]
    assert lines["training"].get_ydata().tolist() == run.series["train/loss"].values.tolist()
    assert lines["validation"].get_xdata().tolist() == [0, 50, 100]
    assert len({line.get_color() for line in lines.values()}) == 3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    (above,) = axes.child_axes
    assert above.get_xlabel() == "tokens"
    forward, back = above._functions  # type: ignore[attr-defined]
    assert forward(np.array([0, 25, 100, 110])).tolist() == [0, 25e3, 100e3, 110e3]
    assert back(np.array([0, 25e3, 110e3])).tolist() == [0, 25, 110]


def test_a_validation_loss_has_a_band_of_its_standard_error(tmp_path: Path) -> None:
    run = read(tmp_path, log_lines())
    (axes,) = loss_figure(run.series).axes
    assert len(axes.collections) == 2
    edge = axes.collections[0].get_paths()[0].vertices
    loss = run.series["eval/loss"].values
    assert edge[:, 1].max() == pytest.approx(loss.max() + STDERR)
    assert edge[:, 1].min() == pytest.approx(loss.min() - STDERR)
    assert "± 1 standard error" in axes.get_title("right")


def test_a_loss_that_falls_far_is_drawn_logarithmically(tmp_path: Path) -> None:
    for floor, scale in ((9.0, "linear"), (1.0, "log")):
        (axes,) = loss_figure(read(tmp_path, log_lines(floor=floor)).series).axes
        assert axes.get_yscale() == scale


def test_what_is_no_number_is_marked_and_the_rest_drawn(tmp_path: Path) -> None:
    lines = log_lines()
    lines[2] |= {"train/grad_norm": "NaN"}
    lines[3] |= {"train/grad_norm": "Infinity"}
    series = read(tmp_path, lines).series["train/grad_norm"]
    (axes,) = single_figure(series, "train/grad_norm").axes
    curve, marks = axes.lines
    assert marks.get_xdata().tolist() == [20, 30]
    assert curve.get_xdata().tolist() == [10, *range(40, 101, 10)]
    assert axes.get_title("right") == "x: not a finite number"
    assert axes.get_ylabel() == "gradient norm"


def test_a_long_curve_is_thinned_and_keeps_its_spikes(tmp_path: Path) -> None:
    values = 1.0 + 0.1 * np.sin(np.arange(50_000))
    values[12_345], values[23_456] = 40.0, 0.01
    lines = [
        {"step": step, "time": float(step), "train/grad_norm": value, "train/learning_rate": 1.0}
        for step, value in enumerate(values.tolist())
    ]
    series = read(tmp_path, lines).series
    (axes,) = single_figure(series["train/grad_norm"], "train/grad_norm").axes
    faint, bold = axes.lines
    assert len(faint.get_xdata()) <= 2 * NUM_BUCKETS + 2
    drawn = dict(zip(faint.get_xdata().tolist(), faint.get_ydata().tolist(), strict=True))
    assert (drawn[12_345], drawn[23_456], drawn[0], drawn[49_999]) == (
        *(40.0, 0.01),
        *(values[0], values[-1]),
    )
    assert bold.get_ydata().max() < 1.2 and "medians of about 667 points" in axes.get_title("right")
    (axes,) = single_figure(series["train/learning_rate"], "train/learning_rate").axes
    assert len(axes.lines) == 1 and axes.get_title("right") == ""


def test_short_curves_are_left_as_they_are() -> None:
    x, y = np.arange(2.0 * NUM_BUCKETS), np.arange(2.0 * NUM_BUCKETS)
    assert thinned(x, y)[0] is x
    few = np.array([1.0, 2.0, 90.0, 4.0, 5.0, 6.0])
    assert medians(few, few, 2)[1].tolist() == [2.0, 5.0]


def test_runs_are_compared_in_panels_with_a_colour_each(tmp_path: Path) -> None:
    runs = [read_folder(write_run(tmp_path / name, num_steps=100)) for name in "ab"]
    figure = comparison_figure(runs, ["a", "b"])
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert labels == [
        ("step", "training loss (nats per token)"),
        ("tokens", "training loss (nats per token)"),
        ("step", "validation loss (nats per token)"),
        ("tokens", "validation loss (nats per token)"),
        ("step", "learning rate"),
        ("step", "gradient norm"),
        ("step", "tokens per second"),
    ]
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == list(COLOURS[:2])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    by_tokens = figure.axes[1].lines[0].get_xdata()
    assert by_tokens[-1] == 100_000


def test_more_runs_than_colours_are_told_apart_by_dashes(tmp_path: Path) -> None:
    run = read(tmp_path, log_lines())
    figure = comparison_figure([run] * 9, list("abcdefghi"))
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 9


def test_a_legend_of_long_names_stays_on_the_page(tmp_path: Path) -> None:
    run = read(tmp_path, log_lines())
    for length in (1, 25, 200):
        figure = comparison_figure([run] * 9, ["n" * length] * 9, metrics=["train/loss"])
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_a_metric_can_be_drawn_over_time(tmp_path: Path) -> None:
    run = read(tmp_path, log_lines())
    figure = comparison_figure([run], ["a"], "time", ["eval/math/loss"])
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (min)", "eval/math/loss")
    assert axes.lines[0].get_xdata().tolist() == pytest.approx([0, 100 / 60, 200 / 60])
    assert x_axis("time", []).label == "time (s)"
    assert [len(row) for row in panels_of(None, ["a", "b", "c"])] == [2, 1]
    assert [len(row) for row in panels_of("tokens", [])] == [2, 3]


def test_what_a_run_did_not_log_is_said(tmp_path: Path) -> None:
    run = read(tmp_path, [{"step": 1, "time": 1.0, "train/loss": 2.0}])
    figure = comparison_figure([run], ["a"])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [[], *[["not logged"]] * 6]  # nor where its tokens are not known


def test_plots_may_be_drawn_on_many_threads_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        write_log(folder, log_lines())
    threads = [threading.Thread(target=plot_run, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = write_run(tmp_path / "alone")
    expected = [path.read_bytes() for path in plot_run(alone)]
    for folder in folders:
        found = [(folder / "plots" / f"{name}.png").read_bytes() for name in ALL_PLOTS]
        assert found == expected


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (1250, "1.25k"), (2e6, "2M"), (1.5e9, "1.5B"), (0.5, "0.5")]
)
def test_numbers_on_axes_are_short_and_exact(value: float, label: str) -> None:
    assert count_label(value) == label


def test_few_points_are_not_smoothed(tmp_path: Path) -> None:
    lines = [{"step": s, "time": s, "train/loss": 1.0} for s in range(MAX_POINTS_UNSMOOTHED)]
    (axes,) = loss_figure(read(tmp_path, lines).series).axes
    assert len(axes.lines) == 1 and len(axes.lines[0].get_xdata()) == MAX_POINTS_UNSMOOTHED
