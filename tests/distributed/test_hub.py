"""Proves that of several processes one alone publishes, and that the others do not wait for it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, launch
from tests.hub_server import LATE_SECONDS, READER, WRITER, Fault, HubServer
from tests.small_runs import SETTINGS, TEXT

pytestmark = pytest.mark.distributed


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def start(server: HubServer, folder: Path, token: str, check: bool = True) -> tuple[str, str]:
    """Trains on two processes, for whose exchanges 10 seconds are allowed; stdout and stderr."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = SETTINGS | {
        "train_file": str(folder / "text.txt"),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "token_cache"),
        "ddp_timeout": 10,
        "push_to_hub": True,
        "hub_model_id": "mine",
    }
    (folder / "run.json").write_text(json.dumps(settings))
    env = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nothing listens there: no way to anywhere else
    }
    words = [str(folder / "run.json")]
    ended = launch("ddp", ROOT / "train_llm.py", *words, env=env, check=check, timeout=150)
    assert check == (ended.returncode == 0)
    return ended.stdout, ended.stderr


def test_one_process_uploads_for_longer_than_an_exchange_may_take(
    server: HubServer, tmp_path: Path
) -> None:
    assert LATE_SECONDS > 10
    server.faults = [Fault("PUT /store", "late", times=1)]
    out, err = start(server, tmp_path, WRITER)
    files = dict(server.repositories["me/mine"].files)
    del files[".gitattributes"]
    final = (tmp_path / "run" / "final").iterdir()
    assert files == {path.name: path.read_bytes() for path in final}
    for request in ("whoami", "PUT /store", "commit/main"):
        assert len(server.paths(request)) == 1, request
    assert out.count("Hub      ") == 2 and "WARNING" not in out and WRITER not in out + err


def test_a_login_that_may_not_write_ends_all_with_one_report(
    server: HubServer, tmp_path: Path
) -> None:
    began = time.monotonic()
    _, err = start(server, tmp_path, READER, check=False)
    assert time.monotonic() - began < 75
    words = [line for line in err.splitlines() if line.startswith("train_llm.py: ")]
    assert words[0].startswith("train_llm.py: The token of me may read on the hub but not write")
    assert sum("The token of me" in word for word in words) == 1
    assert "Traceback (most recent call last):\n  File" not in err.partition("train_llm.py: ")[0]
    assert server.repositories == {} and not (tmp_path / "run" / "arguments.json").exists()
