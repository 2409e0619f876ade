"""A real MLflow server in processes of its own, to be killed, to hang and to come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class MLflowServer:
    """`mlflow server` on a free port of this machine, with a SQLite store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.store = f"sqlite:///{folder}/server.db"
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, on the same port and store each time, and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        settings = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )
        give_up_at = time.monotonic() + 90
        while not self._answers():
            assert time.monotonic() < give_up_at, (self._folder / "server.log").read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Sends a signal to all of its processes."""
        assert self._process
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it as kill -9 does; once is enough, twice does no harm."""
        if self._process:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
