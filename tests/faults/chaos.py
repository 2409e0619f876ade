"""Kills runs with SIGKILL again and again, and compares what they come to with one never killed.

    python -m tests.faults.chaos --kills 200 --seed 1 [--backends single ddp fsdp zero2 ...]

Half of the kills come at a random moment of the run, to all ranks at once. The other half come from
within, at a random one of the calls with which a rank opens, makes, renames or removes something in
the folder of checkpoints: every phase of a save, its retention and the links. Everything is drawn
from the seed. A killed run is started again with the same command; when it ends, its losses,
gradient norms, rates, samples, weights, optimizer and random state must be those of the
uninterrupted run, bit for bit, and a new one begins until there were enough kills. `async_...` is
the same with --async_save.

All libraries are loaded once; the ranks of each start are forks of that one process.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is loaded

import deepspeed  # noqa: E402, F401  (loaded before the forks, as are the others)

import train_llm  # noqa: E402
from llm_training.argument_parsing import read_arguments  # noqa: E402
from llm_training.checkpoint_comparison import compare_checkpoints  # noqa: E402
from llm_training.checkpointing import list_checkpoints  # noqa: E402
from llm_training.launch_settings import read_launch_settings  # noqa: E402
from llm_training.ranks import leave  # noqa: E402
from tests.distributed.launching import environment_of, free_port  # noqa: E402

# Processes of each.
BACKENDS = {"single": 1, "ddp": 2, "fsdp": 2, "zero2": 2, "async_single": 1, "async_fsdp": 2}
FILE_CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")
PATIENCE_SECONDS = 120.0
SETTINGS: dict[str, Any] = {
    "model_type": "gpt2",
    "config_overrides": {"n_layer": 1, "n_embd": 32, "n_head": 2},
    "tokenizer_name": "byte",
    "block_size": 32,
    "global_batch_size": 4,
    "dropout": 0.1,  # the random state must come back too
    "max_steps": 12,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "eval_steps": 4,
    "eval_max_batches": 1,
    "save_steps": 2,
    "save_total_limit": 1,
    "save_best": True,
    "logging_steps": 1,
    "report_to": ["none"],
    "device": "cpu",
    "num_threads": 1,
    "mixed_precision": "fp32",
    "seed": 7,
}


@dataclass(frozen=True)
class Kill:
    """When a run is killed: `seconds` after its start, or at a call to a file by one rank."""

    seconds: float | None = None
    rank: int = 0
    call: int = 0

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        return f"at file call {self.call} of rank {self.rank}"


@dataclass
class Report:
    """What came of one backend.

    Attributes:
        kills: runs that were ended by a kill.
        at_file_calls: how many of them were by a call to a file.
        resumed_from: how often a start continued from each step.
        runs: runs that went to their end and were compared; tensors: in their last checkpoints.
        differences: what differed from the uninterrupted run; empty where the promise holds.
    """

    kills: int = 0
    at_file_calls: int = 0
    resumed_from: dict[int, int] = field(default_factory=dict)
    runs: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)


class Attempts:
    """Starts of one run under one backend.

    Args:
        folder: of everything that is written; `run` in it is the run's output.
        text: folder of the training text.
    """

    def __init__(self, backend: str, folder: Path, text: Path):
        self.num_ranks = BACKENDS[backend]
        self.folder = folder
        self.output = folder / "run"
        folder.mkdir(parents=True)
        own: dict[str, Any] = {"train_file": str(text)}
        own |= {
            "cache_dir": str(folder.parent / "token_cache"),
            "async_save": backend[:6] == "async_",
        }
        (folder / "run.json").write_text(json.dumps(SETTINGS | own))
        self.words = [str(folder / "run.json"), "--output_dir", str(self.output)]
        config = backend.removeprefix("async_")
        self.environment = {} if config == "single" else environment_of(config, self.num_ranks)

    def start(self, kill: Kill | None = None) -> bool:
        """Starts the run, or goes on with it; whether it came to its end.

        Raises:
            RuntimeError: it ended in another way than well or by `kill`, or not at all.
        """
        port = free_port()
        began = time.monotonic()
        pids = {self._fork(rank, port, kill): rank for rank in range(self.num_ranks)}
        codes: dict[int, int] = {}
        is_killed = False
        try:
            while len(codes) < self.num_ranks:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid:
                    codes[pids[pid]] = os.waitstatus_to_exitcode(status)
                due = kill is not None and kill.seconds is not None
                if due and time.monotonic() - began >= kill.seconds:
                    is_killed = is_killed or _kill_all(pids, codes)
                if -signal.SIGKILL in codes.values():  # by itself, at a call to a file
                    is_killed = is_killed or _kill_all(pids, codes) or True
                if time.monotonic() - began > PATIENCE_SECONDS:
                    raise RuntimeError(f"no end after {PATIENCE_SECONDS:g} s\n{self.said()}")
                time.sleep(0.005)
        finally:
            _kill_all(pids, codes)
        if set(codes.values()) == {0}:
            return True
        if not is_killed:
            raise RuntimeError(f"ended with exit codes {codes}\n{self.said()}")
        return False

    def _fork(self, rank: int, port: int, kill: Kill | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            atexit._clear()  # the folder of all this is removed by the first process alone
            said = os.open(self.folder / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            self._become_rank(rank, port, kill)
        except SystemExit as error:
            os._exit(int(error.code or 0))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    def _become_rank(self, rank: int, port: int, kill: Kill | None) -> NoReturn:
        os.environ.update(self.environment)
        if self.num_ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(self.num_ranks),
                LOCAL_WORLD_SIZE=str(self.num_ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        count = FileCalls(self.output / "checkpoints")
        if kill is not None and kill.seconds is None and kill.rank == rank:
            count.kill_at = kill.call
        sys.addaudithook(count)
        ranks = read_launch_settings().data_parallel_size
        code = train_llm.main(read_arguments(self.words, num_processes=ranks))
        (self.folder / f"calls-{rank}.txt").write_text(str(count.calls))
        leave(code)

    def file_calls(self, rank: int) -> int:
        """How many calls to files of checkpoints the last start made that came to its end."""
        return int((self.folder / f"calls-{rank}.txt").read_text())

    def said(self) -> str:
        """What the ranks of the last start have printed."""
        files = sorted(self.folder.glob("said-*.txt"))
        return "\n".join(f"-- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def newest_step(self) -> int:
        """The step of the newest checkpoint that a start may continue from; 0: none."""
        folders = list_checkpoints(self.output / "checkpoints")
        whole = [path for path in folders if (path / "manifest.json").exists()]
        return int(whole[0].name.removeprefix("step-")) if whole else 0


class FileCalls:
    """Counts calls to files below a folder, and kills this process at one of them."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self.calls = 0
        self.kill_at = -1

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_CALLS:
            return
        if any(self.folder in os.fspath(a) for a in args[:2] if isinstance(a, str | os.PathLike)):
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def _kill_all(pids: dict[int, int], codes: dict[int, int]) -> bool:
    """Kills the ranks that have not ended; whether there were any."""
    left = [pid for pid, rank in pids.items() if rank not in codes]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for pid in left:
        _, status = os.waitpid(pid, 0)
        codes[pids[pid]] = os.waitstatus_to_exitcode(status)
    return bool(left)


def torment(backend: str, kills: int, draw: random.Random, folder: Path, text: Path) -> Report:
    """Kills runs of one backend until there were `kills`, and compares every run that ends."""
    report = Report()
    whole = Attempts(backend, folder / f"{backend}-whole", text)
    assert whole.start()  # also makes the tokens
    shutil.rmtree(whole.output)
    began = time.monotonic()
    assert whole.start()
    seconds = time.monotonic() - began
    attempts = Attempts(backend, folder / f"{backend}-killed", text)
    while report.kills < kills:
        kill = Kill(seconds=draw.uniform(0.02, seconds))
        if 2 * report.at_file_calls <= report.kills:
            # With --async_save one rank makes all of them.
            rank = draw.choice([r for r in range(whole.num_ranks) if whole.file_calls(r)])
            kill = Kill(rank=rank, call=draw.randint(1, whole.file_calls(rank)))
        is_finished = run_once(attempts, report, kill)
        if is_finished:
            compare(whole.output, attempts.output, report)
            shutil.rmtree(attempts.output)
    while not run_once(attempts, report, None):
        pass
    compare(whole.output, attempts.output, report)
    return report


def run_once(attempts: Attempts, report: Report, kill: Kill | None) -> bool:
    """One start; whether the run came to its end."""
    step = attempts.newest_step()
    report.resumed_from[step] = report.resumed_from.get(step, 0) + 1
    is_finished = attempts.start(kill)
    if not is_finished:
        report.kills += 1
        report.at_file_calls += kill is not None and kill.seconds is None
    return is_finished


def compare(expected: Path, found: Path, report: Report) -> None:
    """Notes what the files of two finished runs do not share."""
    report.runs += 1
    if log_of(expected) != log_of(found):
        report.differences.append(f"{found}: {first_difference(log_of(expected), log_of(found))}")
    last = f"checkpoints/step-{SETTINGS['max_steps']:08d}"
    compared = compare_checkpoints(expected / last, found / last)
    report.tensors += compared.num_tensors
    report.differences += [f"{found / last}: {line}" for line in compared.differences]
    model = "final/model.safetensors"
    if (expected / model).read_bytes() != (found / model).read_bytes():
        report.differences.append(f"{found / model}: other weights")


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log of a run without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and "perf/" not in name}
        for line in lines
    ]


def first_difference(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """The first line of two logs that is not the same, as text."""
    for mine, theirs in zip(expected, found, strict=False):
        if mine != theirs:
            return f"{theirs} in place of {mine}"
    return f"{len(found)} lines in place of {len(expected)}"


def sample_text(folder: Path) -> Path:
    """Some small files of Python's own library."""
    folder.mkdir()
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in [path for path in library if 3_000 < path.stat().st_size < 13_000][:20]:
        shutil.copy(path, folder)
    return folder


def main() -> int:
    """Prints a line for each backend; the exit code is 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all backends")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    bad = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = sample_text(folder / "text")
        for i, backend in enumerate(options.backends):
            kills = options.kills * (i + 1) // len(options.backends)
            kills -= options.kills * i // len(options.backends)
            began = time.monotonic()
            report = torment(backend, kills, draw, folder, text)
            bad = bad or bool(report.differences)
            print(
                f"{backend}: {report.kills} kills, {report.at_file_calls} of them within a save;"
                f" {report.runs} runs came to their end after starts from steps"
                f" {dict(sorted(report.resumed_from.items()))}; {len(report.differences)}"
                f" differences in their logs and {report.tensors} tensors;"
                f" {time.monotonic() - began:.0f} s",
                flush=True,
            )
            print("".join(f"  {line}\n" for line in report.differences), end="", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
