"""A run read back, finished or still training: from its output folder alone, or from MLflow.

Torch is not imported, and MLflow only where a wish is no folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arguments import KINDS, Arguments
from llm_training.argument_files import literal
from llm_training.earlier_run import (
    RUN_ID,
    arguments_of_folder,
    arguments_of_mlflow_run,
    open_store,
    output_of_mlflow_run,
    reason_of,
)

LOG = "train_log.jsonl"
MARKS = (LOG, "arguments.json")  # either makes a folder that of a run
# A longer silence than both is a pause: the run was stopped, and resumed later.
PAUSE_SECONDS = 600.0
PAUSE_IN_GAPS = 20.0  # of the median time between two points
STATUSES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed"}

Columns = dict[str, tuple[list[int], list[float], list[float]]]  # of a metric: step, time, value


class RecordedRunError(ValueError):
    """A run cannot be read back; the message says what was looked for, and where."""


class Series(NamedTuple):
    """What was logged of one metric, by rising step, each step once.

    Attributes:
        steps: (N,) int64.
        tokens: (N,) float64; predicted in training until then, NaN where that was not logged.
        seconds: (N,) float64; since the first point, without the time for which the run stood still
            between a stop and its resume.
        values: (N,) float64; NaN and infinity as they were logged.
    """

    steps: NDArray[np.int64]
    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def finite(self) -> Series:
        """The points whose value is a number."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.tokens[kept], self.seconds[kept], self.values[kept])


@dataclass(frozen=True)
class RecordedRun:
    """A run as its records tell it.

    Attributes:
        name: its run_name, or what it was asked for by.
        place: its output folder, or its id in MLflow.
        arguments: as it resolved them; empty where they were not kept.
        provenance: data, sizes, hardware, versions and revision.
        ledger: what became of every document; empty where only MLflow knows the run.
        result: how it ended; None while it has not, and where only MLflow knows the run.
        status: finished, stopped early, failed, killed, running or not finished.
        series: by the name of the metric, such as `train/loss`.
    """

    name: str
    place: str
    arguments: dict[str, Any]
    provenance: dict[str, Any]
    ledger: dict[str, Any]
    result: dict[str, Any] | None
    status: str
    series: dict[str, Series]

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    @property
    def tokens(self) -> int | None:
        """Predicted in training until its last logged step."""
        last = self.last("train/tokens")
        return None if last is None else round(last)

    @property
    def seconds(self) -> float:
        """From its first logged point to its last, without pauses."""
        return max((float(series.seconds[-1]) for series in self.series.values()), default=0.0)

    def last(self, metric: str) -> float | None:
        """The last value of a metric, which may be NaN; None where it was not logged."""
        series = self.series.get(metric)
        return None if series is None else float(series.values[-1])

    def at(self, metric: str, step: int) -> float | None:
        """The value of a metric at a step; None where it was not logged there."""
        series = self.series.get(metric)
        if series is None:
            return None
        place = int(np.searchsorted(series.steps, step))
        is_there = place < len(series.steps) and series.steps[place] == step
        return float(series.values[place]) if is_there else None

    def lowest(self, metric: str) -> tuple[int, float] | None:
        """Step and value of the lowest number logged of a metric; None where there is none."""
        series = self.series.get(metric)
        if series is None or not len(series.finite.values):
            return None
        place = int(np.argmin(series.finite.values))
        return int(series.finite.steps[place]), float(series.finite.values[place])

    def until(self, step: int) -> tuple[int | None, float]:
        """Tokens predicted and seconds trained until a step; None where tokens were not logged."""
        if not self.series:
            return None, 0.0
        longest = max(self.series.values(), key=lambda series: int(series.steps[-1]))
        seconds = float(np.interp(step, longest.steps, longest.seconds))
        known = self.series.get("train/tokens")
        if known is None:
            return None, seconds
        steps, tokens = np.append(0, known.steps), np.append(0.0, known.values)
        return round(float(np.interp(step, steps, tokens))), seconds

    def evaluation(self, step: int | None = None) -> dict[str, float]:
        """All `eval/` metrics of a step; None: of the last one that has any."""
        names = [name for name in self.series if name.startswith("eval/")]
        if step is None:
            step = max((int(self.series[name].steps[-1]) for name in names), default=0)
        values = {name: self.at(name, step) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def changed_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that differ from their defaults, in the order of arguments.py."""
    defaults = default_arguments()
    names = [name for name in defaults if name in arguments]
    return {name: arguments[name] for name in names if arguments[name] != defaults[name]}


def default_arguments() -> dict[str, Any]:
    """The default of every argument, in the order of arguments.py."""
    return {field.name: getattr(_DEFAULTS, field.name) for field in dataclasses.fields(Arguments)}


_DEFAULTS = Arguments()


def read_recorded_run(wish: str, tracking_uri: str | None = None) -> RecordedRun:
    """The run that is meant by its output folder, its MLflow run id or its name there.

    Args:
        tracking_uri: MLflow's store; None: as for a new run.

    Raises:
        RecordedRunError: it is not there, or several runs have the name.
    """
    if os.path.isdir(wish):
        return read_folder(Path(wish))
    try:
        client, place = open_store(tracking_uri)
        run = client.get_run(wish) if RUN_ID.fullmatch(wish) else _find_by_name(client, wish)
        output = output_of_mlflow_run(run)
        return read_folder(output) if output is not None else _read_mlflow_run(client, run)
    except RecordedRunError:
        raise
    except ValueError as error:  # there is no store, or nothing of the run in it
        raise RecordedRunError(f"{wish} is no folder, and {error}") from None
    except Exception as error:  # whatever a server, its network or a database can come up with
        raise RecordedRunError(
            f"{wish} is no folder, and {place} has no such run, or cannot be asked:"
            f" {reason_of(error)}"
        ) from None


# ---------------------------------------------------------------------------------------- folders


def read_folder(folder: Path) -> RecordedRun:
    """A run by its output folder, of which nothing but train_log.jsonl need be there.

    Raises:
        RecordedRunError: it is no run's.
    """
    if not any((folder / name).is_file() for name in MARKS):
        advice = "name the output_dir of a run"
        raise RecordedRunError(f"{folder} holds neither {LOG} nor arguments.json: {advice}")
    try:
        arguments = _unescaped(arguments_of_folder(folder))
    except ValueError:
        arguments = {}
    result = _read_json(folder / "result.json")
    return RecordedRun(
        name=str(arguments.get("run_name") or folder.resolve().name),
        place=str(folder),
        arguments=arguments,
        provenance=_read_json(folder / "provenance.json"),
        ledger=_read_json(folder / "ledger.json"),
        result=result or None,
        status=_status_of(folder, result),
        series=read_series(folder / LOG),
    )


def read_series(log: Path) -> dict[str, Series]:
    """What a train_log.jsonl holds, by metric; empty where it is not there.

    Torn lines are passed over.
    """
    columns: Columns = defaultdict(lambda: ([], [], []))
    for line in log.read_bytes().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
            step, time = int(record.pop("step")), float(record.pop("time"))
            values = [(name, float(value)) for name, value in record.items()]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        for name, value in values:
            steps, times, logged = columns[name]
            steps.append(step)
            times.append(time)
            logged.append(value)
    return to_series(columns)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _status_of(folder: Path, result: Mapping[str, Any]) -> str:
    if result:
        return "stopped early" if result.get("stopped_early") else "finished"
    if _is_locked_by_living(folder / ".lock"):
        return "running"
    ending = _read_json(folder / "tracking.json").get("ending") or {}
    return STATUSES.get(str(ending.get("status")), "not finished")


def _is_locked_by_living(lock: Path) -> bool:
    """Whether the process that a .lock file names lives on this machine; it is not touched."""
    try:
        _, process, _, host, *_ = lock.read_text(encoding="utf-8").replace(",", " ").split()
        if host != socket.gethostname():
            return False
        os.kill(int(process), 0)
    except PermissionError:  # it is somebody else's
        return True
    except (OSError, ValueError):
        return False
    return True


def _unescaped(value: Any) -> Any:
    """What an argument file holds as `$${` is the text `${`."""
    if isinstance(value, dict):
        return {key: _unescaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unescaped(element) for element in value]
    return value.replace("$${", "${") if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------- MLflow


def _find_by_name(client: Any, name: str) -> Any:
    """The one run of this name in all experiments of a store."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quoted = name.replace("'", "\\'")
    found = client.search_runs(experiments, f"attributes.run_name = '{quoted}'", max_results=20)
    if not found:
        raise RecordedRunError(f"{name} is no folder, and no run in MLflow has this id or name")
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise RecordedRunError(
            f"{len(found)} runs in MLflow are called {name}: name one by id: {ids}"
        )
    return found[0]


def _read_mlflow_run(client: Any, run: Any) -> RecordedRun:
    """A run of which MLflow alone knows."""
    columns: Columns = {}
    for name in run.data.metrics:
        history = sorted(client.get_metric_history(run.info.run_id, name), key=_logged_at)
        columns[name] = (
            [point.step for point in history],
            [point.timestamp / 1000 for point in history],
            [point.value for point in history],
        )
    parameters = run.data.params
    return RecordedRun(
        name=str(run.info.run_name or run.info.run_id),
        place=str(run.info.run_id),
        arguments=_unescaped(arguments_of_mlflow_run(client, run)),
        provenance={name: _plain(parameters[name]) for name in parameters.keys() - KINDS.keys()},
        ledger={},
        result=None,
        status=STATUSES.get(run.info.status, str(run.info.status).lower()),
        series=to_series(columns),
    )


def _logged_at(point: Any) -> int:
    return int(point.timestamp)


def _plain(parameter: str) -> Any:
    """A parameter as it was before MLflow made a text of it."""
    try:
        return json.loads(parameter) if parameter.startswith(("{", "[")) else literal(parameter)
    except ValueError:
        return parameter


# ----------------------------------------------------------------------------------------- series


def to_series(
    columns: Mapping[str, tuple[list[int], list[float], list[float]]],
) -> dict[str, Series]:
    """Puts steps, tokens and training time beside each value.

    Args:
        columns: of each metric the steps, times (Unix seconds) and values, in the order in which
            they were logged. Of a step that is there twice, the later one counts.
    """
    arrays = {name: _once_a_step(*lists) for name, lists in columns.items() if lists[0]}
    clock_steps, clock = _clock((steps, times) for steps, times, _ in arrays.values())
    token_steps, _, tokens = arrays.get("train/tokens", (np.array([]), None, np.array([])))
    if not len(token_steps) or token_steps[0] > 0:  # evaluations before the first step
        token_steps, tokens = np.append(0, token_steps), np.append(0.0, tokens)
    knows_tokens = "train/tokens" in arrays
    return {
        name: Series(
            steps,
            np.interp(steps, token_steps, tokens) if knows_tokens else np.full(len(steps), np.nan),
            np.interp(steps, clock_steps, clock),
            values,
        )
        for name, (steps, _, values) in arrays.items()
    }


def _once_a_step(
    steps: list[int], times: list[float], values: list[float]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Sorted by step; of those that stand there twice the last."""
    as_array = np.asarray(steps, dtype=np.int64)
    order = np.argsort(as_array, kind="stable")
    ordered = as_array[order]
    kept = order[np.append(ordered[1:] != ordered[:-1], True)]
    return as_array[kept], np.asarray(times, float)[kept], np.asarray(values, float)[kept]


def _clock(
    logged: Iterable[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps of all metrics, and the seconds of training until each."""
    pairs = list(logged)
    if not pairs:
        return np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = np.concatenate([steps for steps, _ in pairs])
    times = np.concatenate([times for _, times in pairs])
    order = np.lexsort((times, steps))
    steps, first = np.unique(steps[order], return_index=True)
    gaps = np.clip(np.diff(times[order][first]), 0.0, None)
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    gaps[gaps > max(PAUSE_SECONDS, PAUSE_IN_GAPS * usual)] = usual
    return steps, np.append(0.0, np.cumsum(gaps))
