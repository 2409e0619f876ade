"""Proves that a tracking server which dies or hangs in mid-run loses nothing and changes nothing.

The server is MLflow's own, in processes of its own; the run is one of the script.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from llm_training.tracking import Tracking
from llm_training.tracking import steady_tracker as steady
from tests.mlflow_server import MLflowServer
from tests.small_runs import curve, open_place, read_log, train_small

STEPS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with trackers that are impatient."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(steady, "SEND_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(steady, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(steady, "LONGEST_PAUSE_SECONDS", 0.2)
    return open_place(tmp_path, monkeypatch)


def train(place: Path, name: str, **changes: Any) -> Path:
    # Many checkpoints: each of them asks the tracker for its files.
    changes |= {"max_steps": STEPS, "save_steps": 2, "log_system_metrics": False}
    return train_small(place, name, **changes)


def at_steps(
    monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[Tracking], None]]
) -> None:
    """Does something right before a step is logged."""
    log = Tracking.log

    def act_and_log(self: Tracking, metrics: dict[str, float], step: int) -> None:
        actions.pop(step, lambda tracking: None)(self)
        log(self, metrics, step)

    monkeypatch.setattr(Tracking, "log", act_and_log)


def wait_for_failures(tracking: Tracking) -> None:
    """Waits until the tracker has seen that its server does not answer."""
    (tracker,) = tracking._trackers
    give_up_at = time.monotonic() + 60
    while not tracker._num_failures:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def review_of(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["review"])


def require_same_points(folder: Path, store: str) -> None:
    """Every number of the log is in the store, once, with its time; and nothing else is."""
    client = MlflowClient(store)
    run = client.get_run((folder / "mlflow_run_id.txt").read_text().strip())
    logged = Counter(
        (name, line["step"], value, round(1000 * line["time"]))
        for line in read_log(folder)
        for name, value in line.items()
        if name not in ("step", "time") and math.isfinite(float(value))
    )
    stored = Counter(
        (name, point.step, point.value, point.timestamp)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
    assert stored == logged
    assert run.info.status == "FINISHED"


def test_a_server_that_is_killed_and_comes_back_has_every_point_once(
    place: Path,
    server: MLflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = train(place, "plain")
    while_down: list[int] = []

    def come_back(tracking: Tracking) -> None:
        wait_for_failures(tracking)
        while_down.append(tracking._trackers[0].num_unsent)
        server.start()

    at_steps(monkeypatch, {4: lambda tracking: server.kill(), 9: come_back})
    tried = train(place, "tried", report_to="mlflow", tracking_uri=server.uri)
    assert while_down[0] >= 5  # steps 4 to 8: the loop went on
    require_same_points(tried, server.store)
    page, run_id = review_of(tried), (tried / "mlflow_run_id.txt").read_text().strip()
    assert page.startswith(f"{server.uri}/#/experiments/") and f"/runs/{run_id}?" in page
    assert curve(tried) == curve(plain)
    assert capsys.readouterr().out.count("warning: mlflow failed (") == 1


def test_a_server_that_hangs_is_not_waited_for(
    place: Path, server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(place, "plain")
    while_hanging: list[float] = []
    finish = Tracking.finish

    def go_on_and_finish(self: Tracking, *arguments: Any, **options: Any) -> None:
        wait_for_failures(self)
        while_hanging.extend(line["step"] for line in read_log(place / "tried"))
        server.signal(signal.SIGCONT)
        finish(self, *arguments, **options)

    monkeypatch.setattr(Tracking, "finish", go_on_and_finish)
    at_steps(monkeypatch, {4: lambda tracking: server.signal(signal.SIGSTOP)})
    tried = train(place, "tried", report_to="mlflow", tracking_uri=server.uri)
    assert while_hanging == [*range(1, STEPS + 1)]
    require_same_points(tried, server.store)
    assert curve(tried) == curve(plain)
