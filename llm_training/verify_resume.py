"""Proves on the user's own configuration and backend that a killed run goes on bit for bit.

Started by `train_llm.py run.json --verify_resume 5`, by itself or under any launcher. Every process
of the launcher becomes a parent (`parent_processes`) and starts train_llm.py anew for each phase:
once without a stop, and once killed twice on the way. Then rank 0 compares what the two runs left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arguments import Arguments
from llm_training.durable import write_json
from llm_training.outputs import OutputFolder
from llm_training.parent_processes import (
    POLL_SECONDS,
    SCRIPT,
    ParentError,
    Parents,
    ended_by_signals,
    short_run_settings,
)

WHOLE, KILLED = "uninterrupted", "killed"  # the two runs, which should not differ
KILL_POLL_SECONDS = 0.005  # a step of a small model takes little longer
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Phase:
    """A start of train_llm.py: of which run, and the step behind which it is killed, if any."""

    run: str
    kill_step: int | None
    title: str


@dataclass(frozen=True)
class Trial:
    """What is verified, and where.

    Attributes:
        folder: of everything, removed after a proof.
        num_steps: N; each of the two runs has 2N steps and a checkpoint after N.
    """

    folder: Path
    num_steps: int

    @property
    def phases(self) -> tuple[Phase, ...]:
        half, total = self.num_steps, 2 * self.num_steps
        return (
            Phase(WHOLE, None, f"{total} steps without a stop"),
            Phase(KILLED, half, f"anew, killed once the checkpoint of step {half} is written"),
            Phase(KILLED, half + 1, f"continued, killed behind step {half + 1}, which is lost"),
            Phase(KILLED, None, f"continued from step {half} to step {total}"),
        )

    def run(self, name: str) -> OutputFolder:
        """The output folder of one of the two runs."""
        return OutputFolder(self.folder / name)

    def checkpoint(self, name: str, step: int) -> Path:
        """Where a run keeps its checkpoint of that step."""
        return self.run(name).checkpoints / f"step-{step:08d}"

    def has_reached(self, phase: Phase, since: float) -> bool:
        """Whether the step behind which a phase is killed is over, computed after `since`.

        Args:
            since: Unix seconds.
        """
        assert phase.kill_step is not None
        if phase.kill_step == self.num_steps:
            return (self.checkpoint(phase.run, phase.kill_step) / "manifest.json").exists()
        try:
            lines = self.run(phase.run).log.read_bytes().splitlines()
            last = json.loads(lines[-1])
        except (FileNotFoundError, IndexError, ValueError):  # none yet, or half of one
            return False
        return bool(last["step"] >= phase.kill_step and last["time"] >= since)


def verify_resume(arguments: Arguments) -> int:
    """Trains 2N steps twice, once killed on the way, and compares; every process calls this.

    Args:
        arguments: of the run, with N in `verify_resume`; its output_dir is not touched, its token
            cache is used.

    Returns:
        The exit code: 0 where all is equal, bit for bit; 1 where it is not, or cannot be told.
    """
    assert arguments.verify_resume is not None
    output_dir = Path(os.path.abspath(str(arguments.output_dir)))
    folder = output_dir.with_name(f"{output_dir.name}.verify_resume")
    trial = Trial(folder, arguments.verify_resume)
    rank = int(os.environ.get("RANK") or 0)
    size = int(os.environ.get("WORLD_SIZE") or 1)
    parents = Parents(folder, rank, size, timeout_seconds=arguments.ddp_timeout)
    try:
        with ended_by_signals():
            parents.meet()
            for number in range(1, len(trial.phases) + 1):
                _run_phase(trial, parents, arguments, number)
        if rank:
            return 0
        is_proven = _tell_verdict(trial)
    except ParentError as error:
        print(f"verify_resume: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"verify_resume: interrupted; {folder} can be removed.", file=sys.stderr)
        return 128 + signal.SIGINT
    if is_proven:
        shutil.rmtree(folder)
        return 0
    print(f"Both runs are kept in {folder}, and what they said.", flush=True)
    return 1


def trial_settings(arguments: Arguments, output_dir: Path, num_steps: int) -> dict[str, Any]:
    """The arguments of both runs: those of the user, but short, with a checkpoint half-way."""
    evaluates = arguments.eval_steps is not None
    warmup_steps = min(arguments.warmup_steps, num_steps)
    decay_steps = arguments.lr_decay_steps
    return short_run_settings(arguments, output_dir, 2 * num_steps) | {
        "seed": Arguments().seed if arguments.seed is None else arguments.seed,
        "warmup_steps": warmup_steps,
        "lr_decay_steps": decay_steps and min(decay_steps, 2 * num_steps - warmup_steps),
        "save_steps": num_steps,
        "save_total_limit": 2,
        "eval_steps": num_steps if evaluates else None,
        "eval_max_batches": 1 if evaluates else arguments.eval_max_batches,
    }


def _run_phase(trial: Trial, parents: Parents, arguments: Arguments, number: int) -> None:
    """One phase; every parent must call this.

    Raises:
        ParentError: it did not go as it should; on rank 0, and soon after on the others.
    """
    phase = trial.phases[number - 1]
    settings = trial.folder / f"{phase.run}.json"
    if parents.rank == 0:
        print(f"Phase {number} of {len(trial.phases)}: {phase.title}", flush=True)
        run = trial.run(phase.run).path
        write_json(settings, trial_settings(arguments, run, trial.num_steps))
    order = parents.order(number)
    is_due, pause = None, POLL_SECONDS
    if phase.kill_step is not None:
        is_due, pause = partial(trial.has_reached, phase, order["since"]), KILL_POLL_SECONDS
    command = [sys.executable, str(SCRIPT), str(settings)]
    parents.run_child(number, order["port"], command, is_due, pause)
    if parents.rank == 0:
        _check_phase(trial, parents, number, phase)


def _check_phase(trial: Trial, parents: Parents, number: int, phase: Phase) -> None:
    reports = parents.reports(number)
    codes = [report["code"] for report in reports]
    if phase.kill_step is not None:
        if trial.checkpoint(phase.run, 2 * trial.num_steps).exists():
            raise ParentError(
                f"{trial.num_steps} steps are over before a kill can meet them. Give a larger"
                " --verify_resume."
            )
        # Where one is killed, the others may end by themselves.
        if any(report["was_killed"] for report in reports):
            return
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if failed or phase.kill_step is not None:
        rank = failed[0] if failed else 0
        raise ParentError(
            f"phase {number} failed; rank {rank} ended with exit code {codes[rank]}. What the ranks"
            f" said is in {trial.folder}/phase-{number}-*; the last of it:\n"
            + parents.last_words(number, rank)
        )


# ------------------------------------------------------------------------------------ the verdict


def _tell_verdict(trial: Trial) -> bool:
    """Compares what the two runs left; tells what came of it."""
    from llm_training.checkpoint_comparison import compare_checkpoints  # torch, only now

    total = 2 * trial.num_steps
    print(f"Comparing the logs and the checkpoints of step {total}", flush=True)
    logs = [read_log(trial.run(name).log) for name in (WHOLE, KILLED)]
    checkpoints = [trial.checkpoint(name, total) for name in (WHOLE, KILLED)]
    in_log = log_difference(*logs)
    num_tensors, in_checkpoint = compare_checkpoints(*checkpoints)
    if in_log is None and not in_checkpoint:
        names = dict.fromkeys(name for line in logs[0] for name in line if name != "step")
        print(f"Proven: {total} of {total} steps are equal, bit for bit, in {', '.join(names)}.")
        print(
            f"Samples, weights, optimizer and random state after step {total}: {num_tensors}"
            " tensors and all other values are equal, bit for bit."
        )
        return True
    print("NOT proven: the killed run is another one than the uninterrupted run.")
    if in_log is None:
        print(f"All {total} steps are equal in the log, but not what they left:")
    else:
        step, text = in_log
        print(f"The first step that differs is {step}: {text}")
        if step <= trial.num_steps:
            print(
                f"No run was killed before step {trial.num_steps}: under this configuration, two"
                " equal runs differ. Nothing can be told of the way back until they do not."
            )
    for line in in_checkpoint[:SHOWN_DIFFERENCES]:
        print(f"Checkpoint of step {total}: {line}")
    if len(in_checkpoint) > SHOWN_DIFFERENCES:
        print(f"and {len(in_checkpoint) - SHOWN_DIFFERENCES} more differences in it")
    return False


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without what is of the clock: times and speeds."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and "perf/" not in name}
        for line in lines
    ]


def log_difference(
    one: list[dict[str, Any]], other: list[dict[str, Any]]
) -> tuple[int, str] | None:
    """The first step in which two logs differ, and how; None where they do not."""
    for line, twin in zip(one, other, strict=False):
        names = [name for name in {**line, **twin} if line.get(name) != twin.get(name)]
        if names:
            name = names[0]
            text = f"{name} is {line.get(name)} uninterrupted and {twin.get(name)} killed"
            return line["step"], text + _largest_difference(one, other, name)
    if len(one) != len(other):
        last = min(one, other, key=len)[-1]["step"]
        return last + 1, f"the logs have {len(one)} lines uninterrupted and {len(other)} killed"
    return None


def _largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> str:
    differences = [
        (abs(float(line[name]) - float(twin[name])), line["step"])
        for line, twin in zip(one, other, strict=False)
        if name in line and name in twin
    ]
    if not differences:
        return ""
    largest, step = max(differences)
    return f"; the largest difference of it is {largest:.3g}, at step {step}"
