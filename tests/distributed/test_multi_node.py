"""Two machines train what one process trains: network namespaces stand in for the machines.

Each has a network of its own, and a cable (a veth pair) to the other: nothing but the addresses on
it leads from one to the other, as between real machines. They share the disk, as a cluster would.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import train_llm
from llm_training.argument_parsing import read_arguments
from tests.distributed.launching import ROOT, clean_environment, describe_failure, kill_tree

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 240


@dataclass(frozen=True)
class Machine:
    """A network namespace, what its end of the cable is called, and its address there."""

    namespace: str
    interface: str
    address: str


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two of them, joined by a cable, and gone afterwards, however the test ends."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is missing: apt-get install iproute2")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    token = secrets.token_hex(4)  # names of interfaces have 15 characters at most
    made = [Machine(f"llm-{token}-{n}", f"llm{token}{n}", f"10.77.0.{n + 1}") for n in (0, 1)]
    try:
        for machine in made:
            if (added := ip("netns", "add", machine.namespace)).returncode:
                pytest.skip(f"this system gives no network namespaces: {added.stderr.strip()}")
        first, second = (machine.interface for machine in made)
        if (added := ip("link", "add", first, "type", "veth", "peer", second)).returncode:
            pytest.skip(f"this system joins no namespaces by veth: {added.stderr.strip()}")
        for machine in made:
            inside = "-n", machine.namespace
            for words in (
                ("link", "set", machine.interface, "netns", machine.namespace),
                (*inside, "address", "add", f"{machine.address}/24", "dev", machine.interface),
                (*inside, "link", "set", machine.interface, "up"),
                (*inside, "link", "set", "lo", "up"),
            ):
                done = ip(*words)
                assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
        yield made
    finally:
        ip("link", "delete", made[0].interface)  # where it has not been handed over yet
        for machine in made:
            ip("netns", "delete", machine.namespace)


@pytest.fixture
def run_file(text_folder: Path, tmp_path: Path) -> Path:
    settings = {
        "model_type": "llama",
        "config_overrides": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "train_file": str(text_folder),
        "tokenizer_name": "byte",
        "block_size": 32,
        "global_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "eval_steps": 3,
        "eval_max_batches": 2,
        "save_steps": 3,
        "mixed_precision": "fp32",
        "report_to": ["none"],
        "num_threads": 1,
        "cache_dir": str(tmp_path / "token_cache"),
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    return path


def launch_on(machine: Machine, rank: int, head: Machine, config: str, *args: str) -> list[str]:
    """The words that a person would type on that machine, in its namespace."""
    inside = ["ip", "netns", "exec", machine.namespace, sys.executable]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config]
    options = ["--num_processes", "2", "--machine_rank", str(rank)]
    options += ["--main_process_ip", head.address]
    return [*inside, *launcher, *options, "train_llm.py", *args, "--device", "cpu"]


def launch_on_all(machines: list[Machine], logs: Path, config: str, *args: str) -> list[str]:
    """Launches on every machine at once; returns what each said on stdout.

    Raises:
        AssertionError: one failed, or did not end in time; none is left running.
    """
    commands, running, ends = [], [], time.monotonic() + SECONDS
    try:
        for rank, machine in enumerate(machines):
            commands.append(launch_on(machine, rank, machines[0], config, *args))
            # Else gloo takes the address of the machine's name, which is often the loopback's.
            environment = clean_environment() | {"GLOO_SOCKET_IFNAME": machine.interface}
            with (logs / f"out{rank}").open("w") as out, (logs / f"err{rank}").open("w") as err:
                running.append(
                    subprocess.Popen(
                        commands[rank], cwd=ROOT, env=environment, stdout=out, stderr=err
                    )
                )
        # If one fails, the other would wait for it.
        while any(process.poll() is None for process in running):
            if time.monotonic() > ends or any(process.poll() for process in running):
                break
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
    said = [(logs / f"out{rank}").read_text(errors="replace") for rank in range(len(machines))]
    for rank, process in enumerate(running):
        problem = f"machine {rank} ended with {process.returncode}, at most {SECONDS} s after"
        errors = (logs / f"err{rank}").read_text(errors="replace")
        assert process.returncode == 0, describe_failure(
            commands[rank], problem, said[rank], errors
        )
    return said


def losses(folder: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    names = "train/loss", "train/grad_norm", "eval/loss"
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


@pytest.mark.parametrize("config", ["multi_node_fsdp", "multi_node_zero3"])
def test_two_machines_train_the_curve_of_one_process(
    config: str, machines: list[Machine], run_file: Path, tmp_path: Path
) -> None:
    alone = [str(run_file), "--device", "cpu", "--output_dir", str(tmp_path / "alone")]
    assert train_llm.main(read_arguments(alone)) == 0
    together = [str(run_file), "--output_dir", str(tmp_path / "together")]
    said = launch_on_all(machines, tmp_path, f"accelerate_configs/{config}.yaml", *together)

    assert "2 processes" in said[0]
    expected = losses(tmp_path / "alone")
    assert losses(tmp_path / "together") == pytest.approx(expected, rel=0, abs=1e-5)
    assert len(expected) == 6 * 2 + 3
