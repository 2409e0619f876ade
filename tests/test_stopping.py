"""Signals are noted, ranks decide alike, and no process stays that nobody waits for."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from llm_training import stopping
from llm_training.stopping import (
    LAUNCHER_SIGNS,
    ORDERS,
    SIGNALS,
    STOPS,
    Stopped,
    StopRequest,
    decide,
    end_with_launcher,
    seconds_since_start,
    votes,
)
from tests.distributed.launching import clean_environment

# A lock that its own holder waits for: outside of Python, and deaf to signals, as an exchange is.
WAIT_IN_AN_EXCHANGE = """
mutex = ctypes.create_string_buffer(128)
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""
WAIT_IN_PYTHON = """
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""
WAITS = {"in Python": WAIT_IN_PYTHON, "in an exchange": WAIT_IN_AN_EXCHANGE}
START = "import ctypes, os, signal, sys, time\nfrom llm_training import stopping\n"


@contextmanager
def started(code: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code` and has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + code],
        env=clean_environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def requested(*options: str, then: str) -> str:
    """Code that waits inside a `StopRequest`."""
    body = "\n".join(f"    {line}" for line in then.strip().splitlines())
    return f"with stopping.StopRequest({', '.join(options)}) as request:\n{body}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as request:
        assert (request.signal, request.reason, sum(request.votes())) == (0, None, 0)
        request.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.signal, request.reason) == (number, number.name)
        assert decide(request.votes()).stop == number.name
        with pytest.raises(Stopped, match=f"^stopped by {number.name} before training began; "):
            request.check()
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_watcher_ends_with_the_block() -> None:
    with StopRequest():
        assert "stopping" in [thread.name for thread in threading.enumerate()]
    assert "stopping" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("reason", "number", "code", "how"),
    [
        ("SIGTERM", 15, 143, "by SIGTERM"),
        ("SIGINT", 2, 130, "by SIGINT"),
        ("SIGUSR1", 10, 138, "by SIGUSR1"),
        ("deadline", 0, 143, "by --save_before_timeout"),
        ("STOP", 0, 0, "by the file STOP"),
    ],
)
def test_how_a_stopped_run_ends(reason: str, number: int, code: int, how: str) -> None:
    stopped = Stopped(reason, "at step 120")
    assert (stopped.reason, stopped.signal, stopped.exit_code) == (reason, number, code)
    assert str(stopped) == f"stopped {how} at step 120; the same command continues the run."


class TestDecision:
    """The sums over ranks are all that counts."""

    def test_no_vote_is_no_decision(self):
        decision = decide([0.0] * len(votes(())))
        assert (decision.stop, decision.orders) == (None, frozenset())

    @pytest.mark.parametrize("name", [*STOPS, *ORDERS])
    @pytest.mark.parametrize("num_ranks", [1, 3])
    def test_one_vote_of_any_rank_counts(self, name, num_ranks):
        sums = over_ranks([votes([name]), *[votes(())] * (num_ranks - 1)])
        decision = decide(sums)
        assert decision.stop == (name if name in STOPS else None)
        assert decision.orders == ({name} if name in ORDERS else set())

    @pytest.mark.parametrize("pair", itertools.combinations(STOPS, 2))
    def test_two_reasons_are_one_whichever_rank_has_which(self, pair):
        ways = [[votes(pair), votes(())], [votes(pair[:1]), votes(pair[1:])]]
        ways += [way[::-1] for way in ways]
        assert {decide(over_ranks(way)).stop for way in ways} == {pair[0]}

    def test_orders_come_beside_a_stop(self):
        decision = decide(over_ranks([votes(["SAVE", "SIGINT"]), votes(["EVAL", "SIGINT"])]))
        assert decision.stop == "SIGINT"
        assert decision.orders == {"SAVE", "EVAL"}

    def test_a_vote_divided_among_ranks_that_share_rows_counts(self):
        assert decide([total / 8 for total in votes(["SIGUSR1"])]).stop == "SIGUSR1"

    def test_sums_of_something_else_are_no_votes(self):
        with pytest.raises(ValueError, match="zip"):
            decide([1.0, 2.0])

    def test_a_request_votes_for_its_signal_and_its_orders(self):
        with StopRequest() as request:
            assert decide(request.votes({"SAVE", "STOP"})) == stopping.Decision(
                "STOP", frozenset({"SAVE"})
            )
            os.kill(os.getpid(), signal.SIGTERM)
            assert decide(request.votes({"DECAY"})) == stopping.Decision(
                "SIGTERM", frozenset({"DECAY"})
            )


def over_ranks(of_ranks: list[list[float]]) -> list[float]:
    return [sum(values) for values in zip(*of_ranks, strict=True)]


class TestDeadline:
    """Counted from the start of the process."""

    def test_the_age_of_this_process(self):
        # Not by the clock of the day: Linux tells its own start in whole seconds of that.
        started = psutil.Process().create_time() - psutil.boot_time()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        assert seconds_since_start() == pytest.approx(age, abs=0.5)

    def test_without_proc_it_counts_from_the_import(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise FileNotFoundError

        monkeypatch.setattr(Path, "read_text", refuse)
        expected = time.monotonic() - stopping.IMPORTED_AT
        assert seconds_since_start() == pytest.approx(expected, abs=0.1)

    def test_it_asks_to_stop_when_it_has_come_and_not_before(self):
        request = StopRequest(deadline_seconds=seconds_since_start() + 0.3)
        assert request.reason is None
        time.sleep(0.35)
        assert (request.reason, request.signal) == ("deadline", 0)
        with pytest.raises(Stopped, match="by --save_before_timeout at step 3"):
            request.check("at step 3")

    def test_a_signal_tells_more_than_a_deadline(self):
        with StopRequest(deadline_seconds=0) as request:
            assert request.reason == "deadline"
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.reason == "SIGUSR1"


class TestForce:
    """What happens where the main thread does not end the process."""

    @pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
    def test_a_second_interrupt_ends_at_once(self, wait):
        with started(requested(then=wait)) as process:
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.7)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
            said = process.stderr.read()
            assert "once more to end at once" in said and "interrupted twice" in said

    @pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
    def test_sigterm_leaves_some_seconds(self, wait):
        with started(requested("grace_seconds=2", then=wait), RANK="1") as process:
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            time.sleep(1.5)
            process.send_signal(signal.SIGTERM)  # of another sender: it does not begin anew
            assert process.wait(5) == 143
            assert 1.9 < time.monotonic() - begin < 3.3
            assert process.stderr.read() == (
                "train_llm.py: rank 1: not done 2 s after SIGTERM; ended.\n"
            )

    def test_sigterm_after_another_signal_leaves_as_many(self):
        with started(requested("grace_seconds=0.5", then=WAIT_IN_AN_EXCHANGE)) as process:
            process.send_signal(signal.SIGUSR1)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 143

    def test_the_limit_in_force_when_sigterm_comes_counts(self):
        change = "request.grace_seconds = 0.5\n" + WAIT_IN_PYTHON
        with started(requested("grace_seconds=60", then=change)) as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 143
            assert "not done 0.5 s after SIGTERM" in process.stderr.read()

    def test_without_a_limit_it_takes_its_time(self):
        with started(requested("grace_seconds=None", then=WAIT_IN_PYTHON)) as process:
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)

    def test_who_ends_in_time_ends_as_it_likes(self):
        body = (
            'print("ready", flush=True)\n'
            "while not request.signal:\n    time.sleep(0.01)\n"
            "time.sleep(0.3)\nsys.exit(7)"
        )
        with started(requested("grace_seconds=5", then=body)) as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait(3) == 7

    def test_a_signal_to_a_forked_child_is_its_own(self):
        body = """
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    time.sleep(5)
                    os._exit(0)
                os.kill(child, signal.SIGTERM)  # mostly before it has taken a step
                assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
            time.sleep(0.5)
            assert request.signal == 0
            print("ready", flush=True)
            time.sleep(60)"""
        body = "\n".join(line.removeprefix(" " * 12) for line in body.strip("\n").splitlines())
        with started(requested("grace_seconds=0.2", then=body)) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)  # the watcher has heard nothing either
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 143


CHILD = "stopping.end_with_launcher()" + WAIT_IN_PYTHON
LAUNCHER = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {START + CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
os.write(2, str(child.pid).encode() + bytes([10]))
{WAIT_IN_PYTHON}
"""


class TestLauncher:
    """A process that was launched goes with its launcher."""

    @pytest.mark.parametrize("sign", LAUNCHER_SIGNS)
    def test_it_ends_when_its_launcher_is_killed(self, sign):
        with started(LAUNCHER, **{sign: "0"}) as launcher:
            child = psutil.Process(int(launcher.stderr.readline()))
            assert is_alive(child)
            launcher.kill()
            launcher.wait()
            give_up = time.monotonic() + 5
            while is_alive(child) and time.monotonic() < give_up:
                time.sleep(0.05)
            assert not is_alive(child)

    def test_without_a_launcher_it_stays(self):
        with started(LAUNCHER) as starter:
            child = psutil.Process(int(starter.stderr.readline()))
            starter.kill()
            starter.wait()
            time.sleep(1)
            assert is_alive(child)
            child.kill()

    def test_accelerates_launcher_of_one_process_is_known_by_its_sign(self):
        arguments = launch_command_parser().parse_args(["--num_processes", "1", "script.py"])
        arguments.num_machines, arguments.mixed_precision = 1, "no"
        arguments.dynamo_backend, arguments.use_cpu = "no", True
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        assert LAUNCHER_SIGNS[0] in environment
        assert "RANK" not in environment

    def test_a_launcher_that_is_gone_already_counts(self, monkeypatch):
        asked, sent, parents = [], [], iter([4321, 1])

        class Library:
            def prctl(self, *words):
                asked.append(words)

        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
        monkeypatch.setattr(os, "getppid", lambda: next(parents))
        monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
        end_with_launcher()
        assert asked == [(1, 15, 0, 0, 0)]
        assert sent == [(os.getpid(), signal.SIGTERM)]


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait as a zombie for whoever inherited it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
