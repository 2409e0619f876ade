"""Sweeps in MLflow: runs filed under a parent that shows the best of them.

The parent is a run of the sweep's name that trains nothing. The first child makes it, the others
find it, and each writes the best of all children to it at its own end: whoever comes last has seen
all, so that no order of ends, and no two at once, leave a wrong one there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "sweep_parent"  # `true` on it; its name is in the tag `sweep`, as the children's
PARENT_RUN_ID = "mlflow.parentRunId"  # by which MLflow's pages know a child
RESULT_TAG = "sweep_result"  # a child's best value of the metric that decides
# Longer than a parent takes from its start time to the store: then the one that is the oldest is
# so for all who look.
SETTLE_SECONDS = 1.0
RUNS_AT_ONCE = 1000  # of a search


class Result(NamedTuple):
    """A run's best value of the metric that decides, and its step."""

    metric: str
    rises: bool  # whether higher is better
    value: float
    step: int


def find_or_make_parent(client: MlflowClient, experiment_id: str, sweep: str) -> str:
    """The id of the sweep's parent run; of several that were made at once, the oldest is kept."""
    parents = find_parents(client, experiment_id, sweep)
    if parents:
        return parents[0]
    made = client.create_run(
        experiment_id, run_name=sweep, tags={"sweep": sweep, PARENT_TAG: "true"}
    )
    own = str(made.info.run_id)
    client.update_run(own, status="FINISHED")  # it computes nothing that could end
    time.sleep(SETTLE_SECONDS)
    oldest = find_parents(client, experiment_id, sweep)[0]
    if oldest != own:
        client.delete_run(own)
    return oldest


def find_parents(client: MlflowClient, experiment_id: str, sweep: str) -> list[str]:
    """The ids of the sweep's parent runs that were not deleted, oldest first."""
    # The name is compared here: MLflow's filters have no way to write both kinds of quotes.
    found = _search(client, experiment_id, f"tags.{PARENT_TAG} = 'true'")
    parents = [run for run in found if run.data.tags.get("sweep") == sweep]
    parents.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    return [run.info.run_id for run in parents]


def best_result(client: MlflowClient, run_id: str, metric: str, *, rises: bool) -> Result | None:
    """The best that a run logged of a metric, at its first step; None if there was nothing."""
    history = client.get_metric_history(run_id, metric)
    points = [(point.value, point.step) for point in history if math.isfinite(point.value)]
    if not points:
        return None
    sign = -1 if rises else 1
    value, step = min(points, key=lambda point: (sign * point[0], point[1]))
    return Result(metric, rises, value, step)


def note_result(client: MlflowClient, child: Run, parent_id: str, result: Result) -> None:
    """Notes a child's result on it, and the best of all children on their parent."""
    client.set_tag(child.info.run_id, RESULT_TAG, repr(result.value))
    experiment_id = child.info.experiment_id
    children = _search(client, experiment_id, f"tags.`{PARENT_RUN_ID}` = '{parent_id}'")
    results = {run.info.run_id: _result_of(run) for run in children}
    ranked = [run for run in children if math.isfinite(results[run.info.run_id])]
    choose = max if result.rises else min
    best = choose(ranked, key=lambda run: results[run.info.run_id])
    now = {"best_run": best.info.run_id, "best_run_name": str(best.info.run_name)}
    parent = client.get_run(parent_id)
    for name, value in now.items():
        client.set_tag(parent_id, name, value)
    value = results[best.info.run_id]
    if parent.data.metrics.get(result.metric) != value:
        client.log_metric(parent_id, result.metric, value)  # of one step, the newest is shown


def _result_of(run: Run) -> float:
    return float(run.data.tags.get(RESULT_TAG, "nan"))


def _search(client: MlflowClient, experiment_id: str, wish: str) -> list[Run]:
    return list(_pages(client, experiment_id, wish))


def _pages(client: MlflowClient, experiment_id: str, wish: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment_id], wish, max_results=RUNS_AT_ONCE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
