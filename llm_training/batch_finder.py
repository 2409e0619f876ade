"""Finds the micro-batch that fits the device and is fastest, for the same global batch.

Started by `train_llm.py run.json --find_batch_size`, by itself or under any launcher. Each trial is
a run of train_llm.py itself in a process of its own, for a full device leaves nothing behind then:
whole steps of the user's own rows and model, an evaluation, a checkpoint and a model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from arguments import Arguments
from llm_training.durable import write_json
from llm_training.outputs import OutputFolder
from llm_training.parent_processes import (
    SCRIPT,
    ParentError,
    Parents,
    ended_by_signals,
    short_run_settings,
)
from llm_training.throughput import format_count

NUM_STEPS = 3  # the second with evaluation and save behind it; the last one meets all there is
USED_SHARE = 0.9  # of the memory, by what is proposed
NEARLY = 0.98  # of the best speed counts as the best
FIRST_SIZE = 8
MEMORY_POLL_SECONDS = 0.05
# Of the memory that is free now, on a machine where the processes compute on the CPU.
RESERVE_SHARE, RESERVE_BYTES = 0.05, 2**29
# How a child says that memory was too small: train_llm.py, torch, Python.
OUT_OF_MEMORY = ("device has no memory left", "can't allocate memory", "MemoryError")
# How one says that it failed for another one's sake (`ranks.explain_broken_exchange`).
PEER_GONE = ("another process ended", "no answer from the others", "did not find each other")
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Trial:
    """What came of one micro-batch.

    Attributes:
        size: rows of the micro-batch.
        memory_ratio: most of the memory that it held, as a share; above 1 where it did not fit.
        memory_bytes: the same in bytes; None where nothing tells.
        tokens_per_second: of all processes; 0 where it did not fit.
    """

    size: int
    memory_ratio: float
    memory_bytes: float | None = None
    tokens_per_second: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether it leaves the margin that a long run needs."""
        return self.memory_ratio <= USED_SHARE

    def line(self) -> str:
        """The trial for a person."""
        memory = "" if self.memory_bytes is None else f" | {self.memory_bytes / 2**30:.2f} GiB"
        if not self.tokens_per_second:
            return f"Trial    {self.size} rows | do not fit"
        share = f" = {self.memory_ratio:.0%} of the memory" if memory else ""
        margin = "" if self.fits else f", more than {USED_SHARE:.0%}"
        speed = f"{format_count(self.tokens_per_second)} tokens/s"
        return f"Trial    {self.size} rows | {speed}{memory}{share}{margin}"


# ------------------------------------------------------------------------------------ the search


def search(rows: int, try_size: Callable[[int], Trial]) -> list[Trial]:
    """Tries the micro-batches that divide `rows` without a remainder, until the best is known.

    It doubles from a small one, halves where that does not fit, and looks between the largest that
    fits and the smallest that does not. It goes on upwards until two in a row are slower than the
    best, and downwards while that is faster.

    Args:
        rows: of one process in one step.
        try_size: runs a trial.

    Returns:
        All trials, in their order.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    trials: dict[int, Trial] = {}

    def attempt(size: int) -> Trial:
        if size not in trials:
            trials[size] = try_size(size)
        return trials[size]

    first = size = max(size for size in sizes if size <= FIRST_SIZE)
    while not attempt(size).fits and size > 1:
        size = max(other for other in sizes if other <= size // 2)
    if size == first:
        _go_up(sizes, size, trials, attempt)
    _look_between(sizes, trials, attempt)
    _go_down(sizes, trials, attempt)
    return list(trials.values())


def propose(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that fits, and of those about as fast the one that needs least memory."""
    fitting = [trial for trial in trials if trial.fits]
    fastest = max((trial.tokens_per_second for trial in fitting), default=0.0)
    nearly = [trial for trial in fitting if trial.tokens_per_second >= NEARLY * fastest]
    return min(nearly, key=lambda trial: trial.size, default=None)


def _go_up(
    sizes: Sequence[int], size: int, trials: dict[int, Trial], attempt: Callable[[int], Trial]
) -> None:
    slower = 0
    while trials[size].fits and slower < 2:
        best = max(trial.tokens_per_second for trial in trials.values() if trial.fits)
        slower = slower + 1 if trials[size].tokens_per_second < best else 0
        larger = [other for other in sizes if other >= 2 * size]
        if slower == 2 or not larger:
            return
        size = larger[0]
        attempt(size)


def _look_between(
    sizes: Sequence[int], trials: dict[int, Trial], attempt: Callable[[int], Trial]
) -> None:
    while True:
        fitting = [size for size, trial in trials.items() if trial.fits]
        others = [size for size, trial in trials.items() if not trial.fits]
        if not fitting or not others:
            return
        between = [size for size in sizes if max(fitting) < size < min(others)]
        if not between:
            return
        attempt(between[len(between) // 2])


def _go_down(
    sizes: Sequence[int], trials: dict[int, Trial], attempt: Callable[[int], Trial]
) -> None:
    while True:
        best, smallest = propose(list(trials.values())), min(trials)
        smaller = [size for size in sizes if size <= smallest // 2]
        if best is None or best.size != smallest or not smaller:
            return
        attempt(smaller[-1])


# ------------------------------------------------------------------------------------ the trials


def find_batch_size(arguments: Arguments) -> int:
    """Tries micro-batches and proposes one; every process of a launcher calls this.

    Args:
        arguments: of the run, with its batch sizes resolved; its output_dir is not touched, its
            token cache is used.

    Returns:
        The exit code: 0 with a proposal; 1 where not one row fits, or a trial fails otherwise.
    """
    output_dir = Path(os.path.abspath(str(arguments.output_dir)))
    folder = output_dir.with_name(f"{output_dir.name}.find_batch_size")
    rank = int(os.environ.get("RANK") or 0)
    size = int(os.environ.get("WORLD_SIZE") or 1)
    parents = Parents(folder, rank, size, timeout_seconds=arguments.ddp_timeout)
    try:
        with ended_by_signals():
            parents.meet()
            trials = _lead(parents, arguments) if rank == 0 else _follow(parents)
    except ParentError as error:
        print(f"find_batch_size: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"find_batch_size: interrupted; {folder} can be removed.", file=sys.stderr)
        return 128 + signal.SIGINT
    if rank:
        return 0
    shutil.rmtree(folder)
    return _tell(arguments, propose(trials))


def trial_settings(arguments: Arguments, output_dir: Path, size: int) -> dict[str, Any]:
    """The arguments of a trial: those of the user, for a few steps with all that a run does."""
    assert arguments.global_batch_size is not None
    evaluates = arguments.eval_steps is not None
    return short_run_settings(arguments, output_dir, NUM_STEPS) | {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": rows_of_process(arguments) // size,
        "save_steps": 2,
        "save_total_limit": 1,
        "async_save": False,
        "eval_steps": 2 if evaluates else None,
        "eval_max_batches": 1 if evaluates else arguments.eval_max_batches,
        "leakage_report": False,
        "replica_check_steps": None,
    }


def rows_of_process(arguments: Arguments) -> int:
    """Rows that one process computes in one step, however they are split."""
    size, accumulation = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    assert size is not None and accumulation is not None, "batch sizes are resolved"
    return size * accumulation


def _lead(parents: Parents, arguments: Arguments) -> list[Trial]:
    """Rank 0: decides what is tried, and hears what came of it."""
    limit, number = memory_limit(), 0

    def try_size(size: int) -> Trial:
        nonlocal number
        number += 1
        run = OutputFolder(parents.folder / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        settings = parents.folder / f"run-{number}.json"
        write_json(settings, trial_settings(arguments, run.path, size))
        order = parents.order(number, settings=str(settings), limit=limit)
        peak = _run_child(parents, number, order)
        trial = _read_trial(parents, number, size, run, peak, limit)
        print(trial.line(), flush=True)
        return trial

    rows = rows_of_process(arguments)
    print(f"Finding  a micro-batch for {rows} rows of each process in a step", flush=True)
    trials = search(rows, try_size)
    parents.order(number + 1, settings=None)
    parents.part(number + 1)
    return trials


def _follow(parents: Parents) -> list[Trial]:
    """The other ranks: run their child of each trial."""
    number = 1
    while (order := parents.order(number))["settings"] is not None:
        _run_child(parents, number, order)
        number += 1
    parents.part(number)
    return []


def _run_child(parents: Parents, number: int, order: dict[str, Any]) -> int:
    """One trial of this rank; returns the most bytes of the machine's memory that its child had."""
    this, peak = psutil.Process(), 0
    children: list[psutil.Process] = []

    def is_too_large() -> bool:
        nonlocal peak, children
        children = children or this.children()  # which asks for all processes of the machine
        peak = max([peak, *map(memory_of, children)])
        return bool(peak > order["limit"])

    command = [sys.executable, str(SCRIPT), order["settings"]]
    parents.run_child(number, order["port"], command, is_too_large, MEMORY_POLL_SECONDS)
    return peak


def _read_trial(
    parents: Parents, number: int, size: int, run: OutputFolder, peak: int, limit: int
) -> Trial:
    """What rank 0 knows of a trial that is over.

    Raises:
        ParentError: it failed, and not for want of memory.
    """
    reports = parents.reports(number)
    failed = [rank for rank, report in enumerate(reports) if report["code"] != 0]
    if failed:
        codes = {rank: reports[rank]["code"] for rank in failed}
        words = {rank: parents.last_words(number, rank) for rank in failed}
        guilty = guilty_rank(codes, words)
        if guilty is None:
            return Trial(size, math.inf)
        raise ParentError(
            f"the trial of {size} rows failed; rank {guilty} ended with exit code {codes[guilty]}."
            f" What the ranks said is in {parents.folder}/phase-{number}-*; the last of it:\n"
            + words[guilty]
        )
    lines = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]

    def largest(name: str) -> float:
        # The first step also makes what the others find.
        return max((line[name] for line in lines if line["step"] > 1 and name in line), default=0.0)

    speed, ratio = largest("perf/tokens_per_second"), largest("perf/memory_ratio")
    if ratio:  # of a GPU
        return Trial(size, ratio, largest("perf/memory_bytes"), speed)
    return Trial(size, peak / limit, peak, speed)


def guilty_rank(codes: Mapping[int, int], words: Mapping[int, str]) -> int | None:
    """Whose failure must be told; None: memory was too small for the trial.

    Args:
        codes, words: exit code and last words of the ranks that failed. One that was killed was
            too large for this script or for the kernel, or was waiting for another one.
    """
    if any(sign in said for said in words.values() for sign in OUT_OF_MEMORY):
        return None
    speaking = [rank for rank, code in codes.items() if code != -signal.SIGKILL]
    blamed = [rank for rank in speaking if not any(sign in words[rank] for sign in PEER_GONE)]
    if blamed or len(speaking) == len(codes):
        return (blamed or speaking)[0]
    return None


def memory_of(process: psutil.Process) -> int:
    """The most bytes of the machine's memory that a process has had; those of now without /proc."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        return int(process.memory_info().rss)
    except (OSError, psutil.Error):  # it has just ended
        return 0


def memory_limit() -> int:
    """Bytes of the machine's memory that one process may have: what is free, but for a reserve."""
    free = psutil.virtual_memory().available
    try:  # of a container, whose limit may be below what the machine has
        most = (CONTROL_GROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="utf-8"))
        free = free if most == "max" else min(free, int(most) - used)
    except (OSError, ValueError):
        pass
    free -= max(RESERVE_BYTES, int(RESERVE_SHARE * free))
    return max(1, free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _tell(arguments: Arguments, best: Trial | None) -> int:
    if best is None:
        print(
            "find_batch_size: not one row fits. What helps: --gradient_checkpointing true, a"
            " smaller --block_size, more devices with accelerate_configs/fsdp.yaml.",
            file=sys.stderr,
        )
        return 1
    accumulation = rows_of_process(arguments) // best.size
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    print(f"Fits     {best.size} rows x {accumulation} accumulated, the same global batch of")
    print(f"         {arguments.global_batch_size} rows and the same curve. Flags, or file:")
    print(f"--{names[0]} {best.size} --{names[1]} {accumulation}")
    print(f'"{names[0]}": {best.size}, "{names[1]}": {accumulation}', flush=True)
    return 0
