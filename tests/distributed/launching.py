"""Starts scripts under `accelerate launch` as a person would, and never leaves a process behind."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
# What an outer launcher, or an Accelerator of this very process, leaves in the environment.
INHERITED_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "DEEPSPEED_")
INHERITED_NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "MLFLOW_TRACKING_URI"),
)
SHOWN_CHARACTERS = 6000


class LaunchFailed(AssertionError):
    """The launch ended badly or not at all; the message has its command and its last output."""


def launch(
    config: str,
    script: Path,
    *args: str,
    timeout: float = 300,
    env: dict[str, str] | None = None,
    num_processes: int | None = None,
    launcher_args: Sequence[str] = (),
    cwd: Path = ROOT,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch --config_file accelerate_configs/CONFIG.yaml SCRIPT ARGS...`.

    Args:
        config: a file of `accelerate_configs/` without its ending, or the path of a YAML file.
        script: what is launched.
        args: words behind the script; on a machine without a GPU, `--device cpu` belongs there.
        timeout: seconds until every process of the launch is killed.
        env: added to a clean environment of one thread, no hub and no leftovers of a launcher.
        num_processes: in place of the file's.
        launcher_args: further words for `accelerate launch`, before the script.
        cwd: the working directory; the shipped YAML files name DeepSpeed's relative to the root.
        check: whether an exit code other than 0 raises.

    Returns:
        The ended launch, with exit code, stdout and stderr as text.

    Raises:
        LaunchFailed: it took longer than `timeout`, or failed while `check` is on.
    """
    path = Path(config) if config.endswith(".yaml") else ROOT / f"accelerate_configs/{config}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    words += ["--main_process_port", str(free_port())]
    words += ["--num_processes", str(num_processes)] if num_processes is not None else []
    command = [*words, *launcher_args, str(script), *args]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=clean_environment() | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, stderr = process.communicate()
        problem = f"took longer than {timeout:g} s and was killed"
        raise LaunchFailed(describe_failure(command, problem, stdout, stderr)) from None
    except BaseException:
        kill_tree(process.pid)
        raise
    if check and process.returncode != 0:
        problem = f"ended with exit code {process.returncode}"
        raise LaunchFailed(describe_failure(command, problem, stdout, stderr))
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@functools.cache
def environment_of(
    config: str, num_processes: int, launcher_args: tuple[str, ...] = ()
) -> dict[str, str]:
    """What `accelerate launch` with a shipped YAML file would put into its processes' environment.

    The launcher itself runs, up to the moment in which it would start them. So processes that are
    there already can take the place of those of one backend after the other.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    words = ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")]
    words += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    words += [*launcher_args, "script.py"]
    found: dict[str, str] = {}
    with mock.patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(words))
    kept = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {variable: value for variable, value in found.items() if variable.startswith(kept)}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's words, for quiet and small processes."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in INHERITED_NAMES and not name.startswith(INHERITED_PREFIXES)
    }
    # A script's own folder is on Python's path, the root of the project is not.
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | ours | {"PYTHONPATH": os.pathsep.join(paths)}


def kill_tree(pid: int) -> None:
    """Kills a process of ours and all below it: torchrun puts its workers in other groups."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def describe_failure(command: Sequence[str], problem: str, stdout: str, stderr: str) -> str:
    """What a person needs to see of a launch that failed."""
    parts = [f"{' '.join(command)}\n{problem}."]
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        parts.append(f"---- end of {name} ----\n{text[-SHOWN_CHARACTERS:].rstrip()}")
    return "\n".join(parts)
