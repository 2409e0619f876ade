"""Runs a program several times under one launcher, each time on all of its processes.

Every process of the launcher is a parent: it joins no process group, but starts a child for each
phase, with its own environment, so that the children are the ranks of a run. The parents agree
through small files in a folder that all of them see. Rank 0's parent makes that folder and gives
the orders. Nothing slow is imported here.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import Arguments
from llm_training.durable import write_json
from llm_training.resolved_arguments import as_settings

SCRIPT = Path(__file__).resolve().parents[1] / "train_llm.py"
SHOWN_LINES = 20
MARKER = "of_parent_processes"  # a folder without it is not ours
POLL_SECONDS = 0.1
MEETING_SECONDS = 120.0  # launchers start their processes at about the same time
PATIENCE_SECONDS = 30.0  # for a child whose peers have failed, as torchrun has it


class ParentError(RuntimeError):
    """The parents do not agree, or a phase failed; the message says what to do."""


@dataclass(frozen=True)
class Parents:
    """The parents, as one of them sees them.

    Attributes:
        folder: seen by all; it must not hold anything else.
        rank: of this process.
        num_processes: on all machines.
        timeout_seconds: that a child may wait for the others before it ends by itself.
    """

    folder: Path
    rank: int
    num_processes: int
    timeout_seconds: float

    def meet(self) -> None:
        """Waits for the others; the folder is new then. Every parent must call this.

        Raises:
            ParentError: they do not all see the folder, or it holds something else.
        """
        if self.rank == 0:
            self._make_folder()
            self._wait_for_others()
        else:
            self._show_up()

    def order(self, phase: int, **more: Any) -> dict[str, Any]:
        """What all do in a phase: the port where the children meet, and when it began.

        Rank 0's parent decides, the others wait for it; every parent must call this.

        Args:
            more: what else rank 0 has to say; of the others it is not heard.

        Returns:
            `port`, `since` in Unix seconds by the clock of rank 0, and what more it said.

        Raises:
            ParentError: rank 0's parent is silent.
        """
        path = self.folder / f"order-{phase}.json"
        if self.rank == 0:
            write_json(path, {"port": free_port(), "since": time.time()} | more)
        return self._wait_for(path, "rank 0 gives no more orders: its own words tell why.")

    def run_child(
        self,
        phase: int,
        port: int,
        command: Sequence[str],
        is_due: Callable[[], bool] | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Runs this rank's child to its end; every parent must call this.

        It is ended with SIGKILL as soon as `is_due()`, or some time after another rank's has
        failed, for which it may wait in vain. What it says goes to the file `words`.
        """
        is_over = False
        with open(self.words(phase, self.rank), "wb") as words:
            child = subprocess.Popen(
                command, stdout=words, stderr=subprocess.STDOUT, env=_child_environment(port)
            )
        try:
            while child.poll() is None and not is_over and not self._is_left_alone(phase):
                time.sleep(poll_seconds)
                is_over = is_due is not None and is_due()
        finally:
            child.kill()
            code = child.wait()
        if code != 0:
            self._failure(phase).touch()
        # It may have come to its end in the very moment in which it was due.
        was_killed = is_over and code == -signal.SIGKILL
        write_json(self._report(phase, self.rank), {"code": code, "was_killed": was_killed})

    def reports(self, phase: int) -> list[dict[str, Any]]:
        """How each rank's child ended: `code` and `was_killed`, whether that was due.

        Raises:
            ParentError: one does not end.
        """
        return [
            self._wait_for(self._report(phase, rank), f"rank {rank} does not end its phase {phase}")
            for rank in range(self.num_processes)
        ]

    def part(self, phase: int) -> None:
        """Ends a phase without a child; rank 0 may remove the folder then. Every parent calls it.

        Raises:
            ParentError: one does not come.
        """
        write_json(self._report(phase, self.rank), {})
        if self.rank == 0:
            self.reports(phase)

    def words(self, phase: int, rank: int) -> Path:
        """The file with all that the child of a rank said."""
        return self.folder / f"phase-{phase}-rank-{rank}.txt"

    def last_words(self, phase: int, rank: int) -> str:
        """The last lines of them."""
        text = self.words(phase, rank).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.rstrip().splitlines()[-SHOWN_LINES:])

    def _report(self, phase: int, rank: int) -> Path:
        return self.folder / f"ended-{phase}-rank-{rank}.json"

    def _failure(self, phase: int) -> Path:
        return self.folder / f"failed-{phase}"

    def _is_left_alone(self, phase: int) -> bool:
        try:
            failed_at = self._failure(phase).stat().st_mtime
        except FileNotFoundError:
            return False
        return time.time() - failed_at > PATIENCE_SECONDS

    def _wait_for(self, path: Path, problem: str) -> dict[str, Any]:
        """What rank 0 orders or another reports; both come once all children have ended."""
        give_up = time.monotonic() + self.timeout_seconds + 2 * PATIENCE_SECONDS
        while (found := _read_json(path)) is None:
            if time.monotonic() > give_up:
                raise ParentError(problem)
            time.sleep(POLL_SECONDS)
        return found

    # ------------------------------------------------------------------------------ the meeting

    def _make_folder(self) -> None:
        if self.folder.exists():
            if not (self.folder / MARKER).exists():
                raise ParentError(f"{self.folder} is in the way; move it elsewhere.")
            old = self.folder.with_name(f"{self.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.folder, old)  # gone in one instant, whoever looks into it
            shutil.rmtree(old)
        self.folder.mkdir(parents=True)
        (self.folder / MARKER).touch()

    def _wait_for_others(self) -> None:
        give_up = time.monotonic() + MEETING_SECONDS
        others = range(1, self.num_processes)
        while True:
            found = {str(rank): _read_json(self._greeting(rank)) for rank in others}
            if all(found.values()):
                break
            if time.monotonic() > give_up:
                missing = ", ".join(rank for rank, greeting in found.items() if not greeting)
                raise ParentError(self._not_shared(f"rank {missing}"))
            time.sleep(POLL_SECONDS)
        write_json(self._present, found)

    def _show_up(self) -> None:
        """Says that this parent is there, until rank 0's has seen it.

        The mark tells this launch from an earlier one, whose folder may be there still.
        """
        greeting = {"mark": secrets.token_hex(8)}
        give_up = time.monotonic() + MEETING_SECONDS
        while (_read_json(self._present) or {}).get(str(self.rank)) != greeting:
            if time.monotonic() > give_up:
                raise ParentError(self._not_shared(f"rank {self.rank}"))
            if (self.folder / MARKER).exists() and _read_json(self._own_greeting) != greeting:
                try:
                    write_json(self._own_greeting, greeting)
                except FileNotFoundError:
                    continue  # an old folder, removed in this moment
            time.sleep(POLL_SECONDS)

    @property
    def _present(self) -> Path:
        return self.folder / "present.json"

    @property
    def _own_greeting(self) -> Path:
        return self._greeting(self.rank)

    def _greeting(self, rank: int) -> Path:
        return self.folder / f"here-rank-{rank}.json"

    def _not_shared(self, who: str) -> str:
        return (
            f"{who} and rank 0 do not meet in {self.folder}. Give an --output_dir on storage that"
            " all machines share."
        )


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an exception does, so that its child ends with it."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def short_run_settings(arguments: Arguments, output_dir: Path, num_steps: int) -> dict[str, Any]:
    """The user's arguments as a child takes them: for so many steps, logged in full, for nobody."""
    warmup_steps = min(arguments.warmup_steps, num_steps - 1)
    decay_steps = arguments.lr_decay_steps
    return as_settings(arguments) | {
        "output_dir": str(output_dir),
        "max_steps": num_steps,
        "max_train_hours": None,
        "warmup_steps": warmup_steps,
        "lr_decay_steps": decay_steps and min(decay_steps, num_steps - warmup_steps),
        "save_best": False,
        "save_before_timeout": None,
        "resume_from_checkpoint": "auto",
        "reset_optimizer": False,
        "allow_resume_change": [],
        "eval_only": False,
        "early_stopping_patience": None,
        "early_stopping_min_delta_unit": "absolute",
        "sample_prompt": [],
        "sample_validation_prompts": 0,
        "sample_steps": None,
        "logging_steps": 1,
        "report_to": ["none"],
        "verify_resume": None,  # the children train
        "find_batch_size": False,
        "push_to_hub": False,
        "hub_model_id": None,
        "hub_private_repo": True,
    }


def _child_environment(port: int) -> dict[str, str]:
    """This process's environment, but with a meeting place of the phase's own.

    In the launcher's store the ranks would find what those of an earlier phase left there.
    """
    environment = dict(os.environ)
    if "RANK" in environment:
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        environment["MASTER_PORT"] = str(port)
    return environment


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
