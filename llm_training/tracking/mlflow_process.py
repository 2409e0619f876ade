"""MLflow's side of a run in a process of its own, whose work no step of the training waits for.

In a thread MLflow would hold Python's lock for most of a sending, and the loop with it. Here a
thread waits for answers, which holds nothing. The process is asked one thing at a time, as pickles
through its standard input.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from llm_training.tracking.errors import QuotedError, TrackingError, first_line
from llm_training.tracking.mlflow_run import MLflowRun
from llm_training.tracking.mlflow_store import (
    IGNORED_ENVIRONMENT,
    import_mlflow,
    prepare_environment,
)
from llm_training.tracking.record import RunRecord
from llm_training.tracking.tracked_run import Ending, Point

if TYPE_CHECKING:
    from arguments import Arguments

# What ends or stops a training is said to all of its processes; how this one ends, the run decides.
LEFT_TO_THE_RUN = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
STOP_SECONDS = 5.0
LAST_SECONDS = 5.0  # to tell the end of a run that was killed; less than a new start takes


class MLflowProcess:
    """An `MLflowRun` in a process of its own; a `TrackedRun`.

    The process is there while the run is started. Should it end before its time, the next call
    starts it anew, and goes on with the run. Should the training end without a word (SIGKILL, no
    memory), the process says so to MLflow, unless it is busy: then the next start does.

    Attributes:
        uri: of the store; absolute where it is a SQLite file.
        run_id: MLflow's id of the run; None until it is started.
        page: of the run on a server; the server's first page until then.
    """

    name = MLflowRun.name
    points_at_once = MLflowRun.points_at_once

    def __init__(
        self,
        arguments: Arguments,
        output_dir: Path,
        record: RunRecord,
        say: Callable[[str], None],
    ) -> None:
        """Prepares the environment and starts nothing; the arguments are those of `Tracking`.

        Raises:
            TrackingError: MLflow is missing.
        """
        self.uri = prepare_environment(arguments.tracking_uri, say)
        self.run_id: str | None = None
        self.page = self.uri
        self._setup = (replace(arguments, tracking_uri=self.uri), output_dir.absolute(), record)
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._rewinds: list[tuple[int, int]] = []
        self._num_noted = 0  # of the rewinds, by the process
        self._num_told = 0  # of them, to MLflow

    def start(self) -> None:
        """Starts the process, and has it begin the run or go on with it.

        Raises:
            TrackingError: a mistake in the settings.
            QuotedError: the store cannot be reached.
        """
        self._stop()
        self._process, self._num_noted = _take(), 0
        try:
            self.run_id, self.page = self._ask("start", *self._setup)
        except Exception:
            self._stop()
            raise

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Leaves out what the store had at the start, and NaN and infinity."""
        return list(self._ask_run("missing", points))

    def send(self, points: Sequence[Point]) -> None:
        """Sends them in as few transactions as MLflow allows."""
        self._ask_run("send", points)
        self._num_told = self._num_noted

    def upload(self, path: Path) -> None:
        """Keeps a copy of a file, in the folder that it has below the output folder."""
        self._ask_run("upload", path.absolute())

    def note_rewind(self, first: int, last: int) -> None:
        """Has it told that the run went back from step `last` behind step `first`; on any thread.

        MLflow takes no point back: those of both passes are in the curves.
        """
        self._rewinds.append((first, last))

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        """Notes how it went, uploads the artifacts, tells the status, and ends the process."""
        errors = self._ask_run("close", ending, [path.absolute() for path in artifacts])
        self._stop()
        return list(errors)

    def _ask_run(self, method: str, *arguments: Any) -> Any:
        """The answer of a run that is started, here once more if need be."""
        if self._process is None or self._process.poll() is not None:
            self._say(f"warning: {self._how_it_ended()}; it is started again")
            self.start()
        for first, last in self._rewinds[self._num_noted :]:
            self._ask("note_rewind", first, last, self._num_noted < self._num_told)
            self._num_noted += 1
        return self._ask(method, *arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            _put(process.stdin, (method, arguments))
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "said":
                    self._say(value)
                elif kind == "done":
                    return value
                else:
                    raise TrackingError(value) if kind == "refused" else QuotedError(value)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            process.kill()
            process.wait()
            raise QuotedError(self._how_it_ended()) from error

    def _how_it_ended(self) -> str:
        code = None if self._process is None else self._process.poll()
        if code is None:
            return "MLflow's process has ended"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"MLflow's process has ended ({how})"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):
            process.stdin.close()  # at which it ends
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


_early: list[subprocess.Popen[bytes]] = []  # that no run has taken yet


def start_early(arguments: Arguments) -> None:
    """Starts the process that a run of these arguments will need, if it will need one.

    It imports MLflow, which takes seconds, while the training imports torch. Without a run it ends
    with this process.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    is_tracked = "mlflow" in arguments.report_to and not (arguments.dry_run or arguments.eval_only)
    if is_main_process and is_tracked:
        with suppress(OSError):  # then there will be time to say so
            _early.append(_spawn())


def _take() -> subprocess.Popen[bytes]:
    process = _early.pop() if _early else None
    return _spawn() if process is None or process.poll() is not None else process


def _spawn() -> subprocess.Popen[bytes]:
    """A process that serves, finds modules as this one does, and bears its script's name."""
    # Not multiprocessing: that would import the launched script, and torch with it.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *sys.argv[:1]],
        env={name: text for name, text in os.environ.items() if name not in IGNORED_ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C and Ctrl-Z are for the training
    )


def _put(stream: BinaryIO | Any, content: Any) -> None:
    stream.write(pickle.dumps(content, pickle.HIGHEST_PROTOCOL))
    stream.flush()


# ------------------------------------------------------------------------------ the other process


def serve() -> None:
    """Answers requests from the standard input until it ends: the whole life of the process."""
    for number in LEFT_TO_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    del sys.argv[:1]  # leaves the script that trains, which MLflow notes as the run's source
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _Server(sys.stdin.buffer, answers).serve()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to be done, and threads of MLflow's are not to be waited for


class _Server:
    """One run, and who asks for it."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._queue: SimpleQueue[tuple[str, tuple[Any, ...]] | None] = SimpleQueue()
        self._doing: str | None = None
        self._run: MLflowRun | None = None
        self._is_closed = False
        self._output_dir = Path()

    def serve(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        with suppress(ImportError):  # whoever asks for a run is told
            import_mlflow()
        while (request := self._queue.get()) is not None:
            answer = self._do(*request)
            self._doing = None
            self._answer(*answer)
        if self._run is not None and self._run.run_id is not None and not self._is_closed:
            self._tell_the_end()

    def _read(self) -> None:
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                method, arguments = pickle.load(self._requests)
                self._doing = method
                self._queue.put((method, arguments))
        if self._doing is None and self._run is None:  # there was none
            os._exit(0)
        # The training is gone. What is half sent is left to its next start, which might else
        # meet it in the store.
        if self._doing not in (None, "close"):
            os._exit(1)
        self._queue.put(None)
        time.sleep(LAST_SECONDS)
        os._exit(1)

    def _do(self, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        try:
            if method == "start":
                return "done", self._start(*arguments)
            value = getattr(self._run, method)(*arguments)
            if method == "close":
                self._is_closed = True
                value = [QuotedError(first_line(error)) for error in value]
        except TrackingError as error:
            return "refused", str(error)
        except Exception as error:  # of whatever library
            return "failed", first_line(error)
        return "done", value

    def _start(self, arguments: Arguments, output_dir: Path, record: RunRecord) -> tuple[Any, str]:
        self._output_dir = output_dir
        say = partial(self._answer, "said")
        self._run = MLflowRun(arguments, output_dir, record, say)
        self._run.start()
        return self._run.run_id, self._run.page

    def _answer(self, kind: str, value: Any) -> None:
        with suppress(OSError):  # nobody is there to hear it
            _put(self._answers, (kind, value))

    def _tell_the_end(self) -> None:
        """Of a run that ended without a word: how, as its folder has it."""
        from llm_training.tracking.note import RunNote
        from llm_training.tracking.sync import UNKNOWN_ENDING, ending_of

        try:
            ending = ending_of(RunNote.read(self._output_dir), self._output_dir)
        except TrackingError:  # it had not come so far
            ending = UNKNOWN_ENDING
        assert self._run is not None
        self._run.close(ending, ())  # what fails is left to the next start, or to `sync`
