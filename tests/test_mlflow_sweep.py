"""Proves that the runs of a sweep have one parent, which shows the best of them.

MLflow is the real one on SQLite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from llm_training.tracking import mlflow_sweep
from llm_training.tracking.mlflow_sweep import find_or_make_parent, find_parents
from tests.tracked_runs import Start, open_folder, started_here, stored_run


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mlflow_sweep, "SETTLE_SECONDS", 0.0)
    return open_folder(tmp_path, empty_store, monkeypatch)


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with started_here(folder, monkeypatch) as start:
        yield start


def parent_of(run_id: str | None) -> str:
    return str(stored_run(run_id).data.tags["mlflow.parentRunId"])


def train(start: Start, name: str, *values: float, metric: str = "eval/loss") -> str:
    """A run of the sweep "rates" with these results; returns its id."""
    parameters = {"metric_for_best_model": metric}
    tracking = start(
        None, parameters, output_dir=name, run_name=name, sweep="rates", experiment_name="it"
    )
    for step, value in enumerate(values):
        tracking.log({metric: value}, step)
    tracking.finish("FINISHED")
    return str(tracking.run_id)


def test_the_parent_shows_the_best_of_its_children(start: Start) -> None:
    runs = [train(start, name, 5.0, best, 4.9) for name, best in (("a", 4.0), ("b", 3.0))]
    runs.append(train(start, "c", 3.5))
    (parent,) = {parent_of(run) for run in runs}
    run = stored_run(parent)
    assert (run.info.run_name, run.info.status) == ("rates", "FINISHED")
    assert run.data.tags["best_run"] == runs[1]
    assert run.data.tags["best_run_name"] == "b"
    assert run.data.metrics == {"eval/loss": 3.0}
    assert run.data.tags["sweep"] == stored_run(runs[0]).data.tags["sweep"] == "rates"
    assert run.info.experiment_id == stored_run(runs[0]).info.experiment_id


def test_the_best_of_what_rises_is_the_highest(start: Start) -> None:
    for name, best in (("a", 0.4), ("b", 0.6), ("c", 0.5)):
        last = train(start, name, best, metric="eval/token_accuracy")
    parent = stored_run(parent_of(last))
    assert parent.data.tags["best_run_name"] == "b"
    assert parent.data.metrics == {"eval/token_accuracy": 0.6}


def test_a_run_without_a_result_leaves_the_parent_as_it_is(start: Start) -> None:
    train(start, "a", 4.0)
    last = train(start, "b")
    assert stored_run(parent_of(last)).data.tags["best_run_name"] == "a"


def test_a_deleted_parent_is_followed_by_a_new_one(start: Start) -> None:
    first = parent_of(train(start, "a", 4.0))
    MlflowClient().delete_run(first)
    second = parent_of(train(start, "b", 5.0))
    assert second != first
    assert stored_run(second).data.tags["best_run_name"] == "b"


def test_a_parent_that_is_deleted_meanwhile_is_followed_by_a_new_one(start: Start) -> None:
    tracking = start(None, output_dir="a", run_name="a", sweep="rates")
    first = parent_of(tracking.run_id)
    MlflowClient().delete_run(first)
    tracking.log({"eval/loss": 4.0}, 1)
    tracking.finish("FINISHED")
    assert parent_of(tracking.run_id) != first


def test_of_two_parents_made_at_once_the_older_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    look, others = mlflow_sweep.find_parents, list[str]()

    def look_too_early(client: MlflowClient, experiment_id: str, sweep: str) -> list[str]:
        found = look(client, experiment_id, sweep)
        if not others:  # another one begins between this look and what follows from it
            tags = {"sweep": sweep, "sweep_parent": "true"}
            others.append(client.create_run("0", start_time=1, tags=tags).info.run_id)
        return found

    monkeypatch.setattr(mlflow_sweep, "find_parents", look_too_early)
    assert find_or_make_parent(client, "0", "rates") == others[0]
    monkeypatch.undo()
    assert find_parents(client, "0", "rates") == others


@pytest.mark.parametrize("name", ["it's", 'say "x"', "a `b` \\ %", "ü/1"])
def test_any_name_is_found_again(folder: Path, name: str) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    other = find_or_make_parent(client, "0", "other")
    made = find_or_make_parent(client, "0", name)
    assert made != other
    assert find_or_make_parent(client, "0", name) == made
