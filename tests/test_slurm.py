"""Proves what slurm.sh does on a cluster: stand-ins for Slurm's commands write down their words.

The stand-in for srun starts what it is given once for each node, at the same time, with the number
of the node in the environment; it hands signals on, as srun does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "accelerate_configs" / "slurm.sh"
FSDP = "accelerate_configs/multi_node_fsdp.yaml"
ZERO3 = "accelerate_configs/multi_node_zero3.yaml"

SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$RECORD/scontrol"
[[ $1 != show ]] || printf '%s\\n' node-a7 node-b2
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
code=0
for process in $first $second; do
    until wait $process; do
        last=$?
        kill -0 $process 2>/dev/null || { code=$last; break; }
    done
done
exit $code
"""
ACCELERATE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/accelerate$SLURM_NODEID"
[[ ${FAILS_ON:-} != "$SLURM_NODEID" ]] || exit 3
if [[ -n ${HANGS:-} ]]; then
    sleep 90 & training=$!
    trap 'kill $training; touch "$RECORD/ended$SLURM_NODEID"; exit 143' TERM
    touch "$RECORD/started$SLURM_NODEID"
    wait $training
fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes with four GPUs each."""
    commands, record = tmp_path / "bin", tmp_path / "record"
    commands.mkdir()
    record.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("accelerate", ACCELERATE)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "RECORD": str(record),
        "SLURM_JOB_ID": "4070123",
        "SLURM_JOB_NODELIST": "node-[a7,b2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "16",
    }


def run(cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=60)


def recorded(cluster: dict[str, str], name: str) -> list[str]:
    return (Path(cluster["RECORD"]) / name).read_text().splitlines()


def test_each_node_gets_one_launcher_with_its_own_rank(cluster: dict[str, str]) -> None:
    done = run(cluster, "my run.json", FSDP, "--max_steps", "7", "--run_name", "two words")
    assert done.returncode == 0, done.stderr
    for node in ("0", "1"):
        assert recorded(cluster, f"accelerate{node}") == [
            *("launch", "--machine_rank", node, "--config_file", FSDP),
            *("--num_machines", "2", "--num_processes", "8"),
            *("--main_process_ip", "node-a7", "--main_process_port", "20123"),
            *("--deepspeed_multinode_launcher", "standard"),
            *("train_llm.py", "my run.json", "--max_steps", "7", "--run_name", "two words"),
        ]
    assert recorded(cluster, "scontrol") == ["show hostnames node-[a7,b2]"]


def test_srun_starts_one_task_on_each_node_and_ends_all_if_one_fails(
    cluster: dict[str, str],
) -> None:
    assert run(cluster, "run.json", FSDP).returncode == 0
    options = [word for word in recorded(cluster, "srun") if word.startswith("--")][:4]
    assert options == [
        *("--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpus-per-task=16"),
    ]
    del cluster["SLURM_CPUS_PER_TASK"]
    assert run(cluster, "run.json", FSDP).returncode == 0
    assert not any("cpus" in word for word in recorded(cluster, "srun"))


@pytest.mark.parametrize("config", [FSDP, ZERO3])
def test_accelerate_takes_every_word(config: str, cluster: dict[str, str]) -> None:
    cluster["SLURM_JOB_NUM_NODES"], cluster["SLURM_GPUS_ON_NODE"] = "2", "6"
    assert run(cluster, "run.json", config).returncode == 0
    words = recorded(cluster, "accelerate1")[1:]
    words[words.index(config)] = str(ROOT / config)
    taken, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (taken.num_machines, taken.num_processes, taken.machine_rank) == (2, 12, 1)
    assert (taken.main_process_ip, taken.main_process_port) == ("node-a7", 20123)
    assert taken.rdzv_backend == "static"
    assert taken.deepspeed_multinode_launcher == "standard"
    assert taken.training_script_args == ["run.json"]


def test_the_port_is_the_jobs_own_and_one_that_may_be_used(cluster: dict[str, str]) -> None:
    ports = []
    for job in ("1", "19999", "20000", "4294967294"):
        cluster["SLURM_JOB_ID"] = job
        assert run(cluster, "run.json", FSDP).returncode == 0
        words = recorded(cluster, "accelerate0")
        ports.append(int(words[words.index("--main_process_port") + 1]))
    assert ports == [10001, 29999, 10000, 17294]


def test_a_failure_on_one_node_is_the_exit_code_and_not_queued_again(
    cluster: dict[str, str],
) -> None:
    cluster["FAILS_ON"] = "1"
    assert run(cluster, "run.json", FSDP).returncode == 3
    assert recorded(cluster, "scontrol") == ["show hostnames node-[a7,b2]"]


def test_when_the_time_is_up_the_training_ends_and_the_job_is_queued_again(
    cluster: dict[str, str],
) -> None:
    cluster["HANGS"] = "yes"
    command = ["bash", str(SCRIPT), "run.json", FSDP]
    job = subprocess.Popen(
        command, env=cluster, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    record = Path(cluster["RECORD"])
    try:
        ends = time.monotonic() + 60
        while len(list(record.glob("started*"))) < 2:
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert not list(record.glob("ended*"))
        job.send_signal(signal.SIGUSR1)  # #SBATCH --signal=B:USR1@120
        said, _ = job.communicate(timeout=60)
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)  # with the stand-ins below it
        job.wait()
        raise
    assert job.returncode == 0
    assert "queueing the job again" in said
    # Each launcher heard it, and was waited for before the job was queued.
    assert sorted(path.name for path in record.glob("ended*")) == ["ended0", "ended1"]
    assert recorded(cluster, "scontrol") == ["show hostnames node-[a7,b2]", "requeue 4070123"]


def test_what_is_missing_is_said(cluster: dict[str, str]) -> None:
    assert run(cluster, "run.json").returncode == 2
    assert "usage: sbatch" in run(cluster, "run.json").stderr
    del cluster["SLURM_GPUS_ON_NODE"]
    missing = run(cluster, "run.json", FSDP)
    assert missing.returncode == 1 and "--gpus-per-node" in missing.stderr
    assert list(Path(cluster["RECORD"]).iterdir()) == []


def test_slurm_is_asked_for_what_the_script_relies_on() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    directives = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    needed = "--ntasks-per-node=1", "--signal=B:USR1@120", "--requeue", "--open-mode=append"
    assert set(needed) <= set(directives)
    # Slurm reads no directive behind the first command.
    head, _, rest = text.partition("\nset -euo pipefail\n")
    assert head.count("#SBATCH ") == len(directives) and "#SBATCH " not in rest
    assert os.access(SCRIPT, os.X_OK) or sys.platform == "win32"
