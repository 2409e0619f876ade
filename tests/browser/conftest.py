"""Two finished runs in one MLflow store, its real server, and a real Chromium that opens them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.distributed.launching import INHERITED_NAMES, INHERITED_PREFIXES, ROOT, free_port

if TYPE_CHECKING:
    from tests.browser.pages import Pages

PROGRAMS = ("chromium", "chromedriver")
INSTALL = "apt-get install -y --no-install-recommends chromium chromium-driver"
START_SECONDS = 60.0
STEPS = 60
# The name of each run, and what it has of its own.
RUNS = {"slow": 1e-3, "fast": 4e-3}


@dataclass(frozen=True)
class Review:
    """Where the runs can be looked at.

    Attributes:
        url: of the server.
        run_ids: by name of the run.
        experiment_id: of both.
        tags: that the first one's page must show.
    """

    url: str
    run_ids: dict[str, str]
    experiment_id: str
    tags: dict[str, str]


@pytest.fixture(scope="session")
def programs() -> tuple[str, str]:
    """Chromium and its driver; without them the tests are left out, but fail in CI."""
    found = [shutil.which(name) for name in PROGRAMS]
    if not all(found):
        reason = f"{' and '.join(PROGRAMS)} are needed to open pages: {INSTALL}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return str(found[0]), str(found[1])


@pytest.fixture(scope="session")
def store(
    programs: tuple[str, str], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which both runs were trained, as a person would."""
    place = tmp_path_factory.mktemp("review")
    shutil.copytree(text_folder, place / "text")
    for name, rate in RUNS.items():
        words = [str(ROOT / "train_llm.py"), str(ROOT / "train_configs" / "quick_test.json")]
        words += ["--run_name", name, "--learning_rate", str(rate), "--max_steps", str(STEPS)]
        words += ["--train_file", "text/*.py", "--eval_steps", "20", "--sample_steps", "30"]
        words += ["--sample_max_new_tokens", "40", "--save_steps", "null", "--device", "cpu"]
        words += ["--num_threads", "1", "--report_to", "mlflow"]
        subprocess.run(
            [sys.executable, *words], cwd=place, env=clean_environment(), check=True, timeout=120
        )
    return place


@pytest.fixture(scope="session")
def review(store: Path) -> Iterator[Review]:
    """The server on that store, ended with all of its processes."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("train_llm")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    tags = runs["slow"].data.tags.items()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///mlflow.db", "--host", "127.0.0.1"]
    with open(store / "server.log", "wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=store,
            env=clean_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_server(server, url, store / "server.log")
        yield Review(
            url,
            {name: runs[name].info.run_id for name in RUNS},
            experiment.experiment_id,
            {name: value for name, value in tags if not name.startswith("mlflow.")},
        )
    finally:
        end(server)


@pytest.fixture(scope="session")
def pages(programs: tuple[str, str], review: Review) -> Iterator[Pages]:
    """The browser; what it shows is kept in test-artifacts/."""
    from tests.browser.pages import Pages

    browser, driver = programs
    opened = Pages(browser, driver, review.url, ROOT / "test-artifacts")
    try:
        yield opened
    finally:
        opened.close()


def clean_environment() -> dict[str, str]:
    """No leftovers of a launcher or of another test's store; nothing is asked outside."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(INHERITED_PREFIXES) and name not in INHERITED_NAMES
    }
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}


def wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < give_up_at:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"MLflow's server does not answer:\n{log.read_text()[-3000:]}", pytrace=False)


def end(server: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
