"""Proves that the tests' launcher starts what it is told, shows what failed, and cleans up."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.distributed.launching import ROOT, LaunchFailed, clean_environment, free_port, launch

pytestmark = pytest.mark.distributed

REPORT = """
import os, sys
rank = os.environ.get("RANK", "0")
names = ["WORLD_SIZE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "ACCELERATE_USE_FSDP", "MARK"]
words = [os.getcwd(), *sys.argv[1:], *(str(os.environ.get(name)) for name in names)]
open(f"{os.path.dirname(__file__)}/rank{rank}", "w").write(" ".join(words))
import llm_training  # the root of the project is on the path
"""
HANG = """
import os, time
open(f"{os.path.dirname(__file__)}/pid{os.environ.get('RANK', '0')}", "w").write(str(os.getpid()))
print("about to hang", flush=True)
time.sleep(600)
"""
HANG_SECONDS = 45
FAIL = "import sys; print('to stdout'); sys.exit('no such thing')"


@pytest.fixture(scope="module", autouse=True)
def hanging(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Future[None]]:
    """A launch that hangs and is killed, beside the other tests: it is all waiting."""
    folder = tmp_path_factory.mktemp("hanging")
    ended: Future[None] = Future()

    def run() -> None:
        try:
            launch("ddp", script(folder, HANG), timeout=HANG_SECONDS)
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return folder, ended


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_two_processes_get_their_words_and_a_clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as an Accelerator of this process leaves it
    monkeypatch.setenv("WORLD_SIZE", "7")
    launch("ddp", script(tmp_path, REPORT), "--word", env={"MARK": "m"})
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == f"{ROOT} --word 2 1 1 None m"
    assert not (tmp_path / "rank2").exists()


def test_number_of_processes_launcher_words_and_folder_can_be_given(tmp_path):
    launch(
        "ddp",
        script(tmp_path, REPORT),
        num_processes=1,
        launcher_args=["--use_fsdp"],
        cwd=tmp_path,
    )
    assert (tmp_path / "rank0").read_text() == f"{tmp_path} 1 1 1 true None"


def test_a_failure_shows_command_code_and_output(tmp_path):
    path = script(tmp_path, FAIL)
    with pytest.raises(LaunchFailed) as failure:
        launch("single", path, "--word")
    text = str(failure.value)
    assert f"{path} --word" in text and "exit code 1" in text
    assert "to stdout" in text and "no such thing" in text
    ended = launch("single", path, check=False)
    assert (
        ended.returncode == 1 and ended.stdout == "to stdout\n" and "no such thing" in ended.stderr
    )


def test_ports_are_free_and_paths_are_kept(monkeypatch):
    assert 1024 <= free_port() <= 65535
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert clean_environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/elsewhere"


def test_what_hangs_is_killed_with_all_its_processes(hanging):
    folder, ended = hanging
    with pytest.raises(LaunchFailed, match=r"(?s)longer than 45 s.*about to hang"):
        ended.result(timeout=HANG_SECONDS + 55)
    pids = [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert not any(psutil.pid_exists(pid) for pid in pids)
