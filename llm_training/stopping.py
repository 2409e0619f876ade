"""How a run is asked to stop, how all ranks come to do so at the same step, and what it ends with.

SIGTERM, SIGINT and SIGUSR1 are only noted while they arrive. The loop sends what each rank has
noted along an exchange that it makes anyway, and every rank decides from the sums alone:

    *sums, = sum_over_ranks(accelerator, loss, *votes(noted))
    decision = decide(sums[1:])
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What ends a run before its time; where several come together, the first one here is named.
STOPS = {
    "SIGTERM": "by SIGTERM",
    "SIGINT": "by SIGINT",
    "SIGUSR1": "by SIGUSR1",
    "deadline": "by --save_before_timeout",
    "STOP": "by the file STOP",
}
# What a run is asked to do once, and goes on: the names of `control_files` but STOP.
ORDERS = ("SAVE", "EVAL", "SAMPLE", "DECAY")
# A deadline asks to be started again, as SIGTERM does. Whoever leaves STOP wants an end that is no
# failure.
EXIT_CODES = {"deadline": 128 + signal.SIGTERM, "STOP": 0}

GRACE_SECONDS = 25.0  # a launcher kills what is still there after 30
# Before training there is nothing to save; only what was met, as SIGTERM came, is still to be told.
START_GRACE_SECONDS = 5.0
# Only Accelerate's launcher sets the first; the second is there wherever processes are several.
LAUNCHER_SIGNS = ("ACCELERATE_DYNAMO_MODE", "RANK")
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
IMPORTED_AT = time.monotonic()


class Stopped(Exception):
    """The run was asked to end before its time, and did so in good order.

    Attributes:
        reason: one of `STOPS`.
        signal: the number of the signal; 0: it was none.
    """

    def __init__(self, reason: str, when: str) -> None:
        """Args: when: "at step 120", "before training began"."""
        super().__init__(f"stopped {STOPS[reason]} {when}; the same command continues the run.")
        self.reason = reason
        self.signal = int(getattr(signal, reason, 0))

    @property
    def exit_code(self) -> int:
        """Of the process: 128 + the signal, as a shell has it; 143 at a deadline, 0 after STOP."""
        return EXIT_CODES.get(self.reason, 128 + self.signal)


@dataclass(frozen=True)
class Decision:
    """What all ranks do next: `stop` with this reason, if any, and the `orders` to carry out."""

    stop: str | None
    orders: frozenset[str]


def votes(noted: Collection[str]) -> list[float]:
    """What this rank adds to the sums over ranks: a 1 for everything in `noted`, else 0."""
    return [float(name in noted) for name in (*STOPS, *ORDERS)]


def decide(sums: Sequence[float]) -> Decision:
    """What to do, from the `votes` of all ranks summed; the same wherever the sums are the same.

    Sums may be divided by the number of ranks that share rows: one vote of many still counts.
    """
    asked = [name for name, total in zip((*STOPS, *ORDERS), sums, strict=True) if total > 0]
    stop = next((name for name in asked if name in STOPS), None)
    return Decision(stop, frozenset(asked) - STOPS.keys())


class StopRequest:
    """Notes, inside its `with` block, that this process is asked to stop; for the main thread.

    The first signal counts, but a second SIGINT ends the process at once: what it saves is whole or
    not there at every moment. And SIGTERM gives it some seconds only: it may come because another
    rank died, and this one waits for that rank in an exchange. A thread watches over both, since
    Python hears no signal on the main thread while that waits outside of Python.

    Attributes:
        grace_seconds: after SIGTERM the process ends by force; None: never, for a process that
            waits for no other. It may change until SIGTERM comes.
    """

    def __init__(
        self,
        *,
        deadline_seconds: float | None = None,
        grace_seconds: float | None = GRACE_SECONDS,
    ) -> None:
        """Sets the limits.

        Args:
            deadline_seconds: after the start of the process the run is asked to stop; None: never.
            grace_seconds: see above.
        """
        self._signal = 0
        self.grace_seconds = grace_seconds
        left = None if deadline_seconds is None else deadline_seconds - seconds_since_start()
        self._deadline = None if left is None else time.monotonic() + left
        self._before: dict[int, Any] = {}

    @property
    def signal(self) -> int:
        """The number of the first signal; 0: none came."""
        return self._signal

    @property
    def reason(self) -> str | None:
        """Why this rank would stop, one of `STOPS`; None: it would not."""
        if self._signal:
            return signal.Signals(self._signal).name
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return "deadline" if is_late else None

    def votes(self, orders: Collection[str] = ()) -> list[float]:
        """The `votes` of this rank, with what `ControlFiles.take` found."""
        return votes({*orders, *filter(None, [self.reason])})

    def check(self, when: str = "before training began") -> None:
        """Passes where nothing was asked; for places where ranks need not stop together.

        Raises:
            Stopped: otherwise.
        """
        if (reason := self.reason) is not None:
            raise Stopped(reason, when)

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, name="stopping", daemon=True)
        self._watcher.start()
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # A forked child has the handlers and the socket too: what ends it must not end this one,
        # even where it comes before the child has put them aside.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
            after_in_child=self._begin_as_child,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        self._sender.send(bytes(1))  # no signal has this number: the watcher is done
        self._watcher.join()
        self._sender.close()
        self._receiver.close()

    def _restore(self) -> None:
        """Lets signals do what they did before; nothing once that has happened."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _begin_as_child(self) -> None:
        self._restore()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def _watch(self) -> None:
        """Ends the process where the main thread does not."""
        interrupts, grace, end_at = 0, 0.0, None
        while True:
            self._receiver.settimeout(None if end_at is None else max(1e-3, end_at - _now()))
            try:
                number = self._receiver.recv(1)[0]
            except TimeoutError:
                end_now(signal.SIGTERM, f"not done {grace:g} s after SIGTERM; ended.")
            if number == 0:
                return
            if number == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    end_now(signal.SIGINT, "interrupted twice; ended at once.")
                if os.environ.get("RANK", "0") == "0":
                    tell("stopping as soon as all is saved; interrupt once more to end at once.")
            if number == signal.SIGTERM and end_at is None and self.grace_seconds is not None:
                grace = self.grace_seconds
                end_at = _now() + grace


def end_now(number: int, message: str) -> NoReturn:
    """Ends the process as if the signal `number` had, after a last word; cleans up nothing."""
    tell(message)
    os._exit(128 + number)


def tell(message: str) -> None:
    """Writes a line to stderr without its lock, which the main thread may hold."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    os.write(2, f"train_llm.py: {rank}{message}\n".encode())


def _now() -> float:
    return time.monotonic()


def seconds_since_start() -> float:
    """How long this process has been there; without /proc, since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - IMPORTED_AT
    # The 22nd of the file, and so the 20th behind the name: in ticks after the machine started.
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def end_with_launcher() -> None:
    """Lets this process get SIGTERM when its launcher ends, however that ends: no orphan trains on.

    Call it early. Without a launcher, and on other systems than Linux, nothing is changed: who
    starts a run in the background of a shell may leave the shell.
    """
    if sys.platform != "linux" or not any(sign in os.environ for sign in LAUNCHER_SIGNS):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != launcher:  # it ended before the system could be asked
        os.kill(os.getpid(), signal.SIGTERM)
