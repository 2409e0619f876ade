"""The output folder: what lies where, and whose it is.

- `arguments.json`: every argument of the run, readable again as an argument file
- `arguments.yaml`: the same in sections, with where each value comes from
- `ledger.json`: what became of every document and every token
- `provenance.json`: data, sizes, hardware, versions and revision that it ran with
- `train_log.jsonl`: one object a line: step, train/loss, ...
- `samples.jsonl`: what the model made of the prompts, an object for each text; `samples.json`: the
  same as a table
- `tracking.json`: what a tracker is told of the run, so that it can be sent later
- `mlflow_run_id.txt`: the MLflow run that a resumed run continues, where MLflow is in use
- `checkpoints/`: `step-00000200`, `last`, `best`
- `final/`: the finished model, a plain Hugging Face folder with a model card
- `best/`: the model that was best by metric_for_best_model, a folder like `final/`
- `plots/`: loss, learning rate, gradient norm and throughput as PNG, drawn at the end
- `result.json`: how the run ended; its presence means that it did
- `skipped/`: a file for each step that was left out: its samples, text and gradient norms
- `.lock`: the process that trains here now; the file of a killed one stays, and locks nothing
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from arguments import Arguments
from llm_training.durable import flush, write_json
from llm_training.resolved_arguments import as_settings, as_yaml

CARD = "README.md"  # of the model in final/ and best/
PLOTS = "plots"
# How file systems say that they cannot lock.
CANNOT_LOCK = frozenset({errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS})
# These may differ between two starts of a run without being worth a word, or are told elsewhere.
NOT_WORTH_A_WORD = frozenset(
    {"resume_from_checkpoint", "allow_resume_change", "reset_optimizer", "num_threads"}
)


class OutputError(ValueError):
    """The output folder cannot take this run; nothing in it was touched."""


class OutputFolder:
    """The paths of a run below its `output_dir`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.arguments = self.path / "arguments.json"
        self.arguments_with_origins = self.path / "arguments.yaml"
        self.provenance = self.path / "provenance.json"
        self.ledger = self.path / "ledger.json"
        self.log = self.path / "train_log.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.result = self.path / "result.json"
        self.skipped = self.path / "skipped"
        self.locked_by = self.path / ".lock"

    @contextmanager
    def lock(self, say: Callable[[str], object] = print) -> Iterator[None]:
        """Keeps other runs out of the folder, which is made if need be; for rank 0, before `claim`.

        The system lets go of the lock when the process ends, however that ends.

        Args:
            say: told where the file system cannot lock; the run then goes on without.

        Raises:
            OutputError: another run holds it, or the folder cannot be written.
        """
        file = self._open_lock(say)
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}")
        file.flush()
        try:
            yield
        finally:
            # Before it is let go: otherwise it could be that of the next run.
            self.locked_by.unlink(missing_ok=True)
            file.close()

    def _open_lock(self, say: Callable[[str], object]) -> IO[str]:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = self.locked_by.open("a+", encoding="utf-8")
            except OSError as error:
                raise self._cannot_write(error) from error
            # A forked child has the file open too, and would hold the lock for as long as it lives.
            os.register_at_fork(after_in_child=file.close)
            try:
                self._lock_file(file, say)
                if os.path.samestat(os.fstat(file.fileno()), self.locked_by.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()  # its run has ended and removed it between the two calls

    def _lock_file(self, file: IO[str], say: Callable[[str], object]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OutputError(
                f"--output_dir {self.path} is in use by another run:"
                f" {file.read() or 'it has just begun'}. Wait for its end or stop it, or give"
                " another --output_dir or --run_name."
            ) from None
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise self._cannot_write(error) from error
            say(
                f"--output_dir {self.path} cannot be locked ({error.strerror}): see to it that no"
                " second run is started there."
            )

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(
            f"--output_dir {self.path} cannot be written: {error.strerror}."
            " Give a folder that this user may write to."
        )

    def claim(self, *, start_anew: bool) -> None:
        """Makes the folder, or makes sure that it is ours and can be written.

        Args:
            start_anew: whether a run that is already there is in the way.

        Raises:
            OutputError: it cannot be written, holds a run, or holds files that no run of ours left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write_probe.tmp"
            probe.write_bytes(b"x")
            flush(probe)
            os.replace(probe, self.path / ".write_probe")
            (self.path / ".write_probe").unlink()
        except OSError as error:
            raise self._cannot_write(error) from error
        self.refuse_what_is_not_ours(start_anew=start_anew)

    def refuse_what_is_not_ours(self, *, start_anew: bool) -> None:
        """The same, for what lies in the folder; nothing is written.

        Raises:
            OutputError: it holds a run that is in the way, or files that no run of ours left.
        """
        ours = (self.checkpoints, self.final, self.best, self.log, self.result)
        found = [path for path in ours if path.exists()]
        if self.arguments.exists():
            if found and start_anew:
                raise OutputError(
                    f"--output_dir {self.path} already holds a run, and resume_from_checkpoint is"
                    " none. Give another --output_dir or --run_name to start anew, or"
                    " --resume_from_checkpoint auto to go on."
                )
            return
        if found:
            raise OutputError(
                f"--output_dir {self.path} holds {found[0].name}, but no arguments.json of a run"
                " of ours: it belongs to something else. Give another --output_dir or --run_name."
            )

    def artifacts(self) -> list[Path]:
        """What a tracker keeps of a run, beside its numbers, however it ends."""
        files = [self.arguments, self.arguments_with_origins]
        files += [self.provenance, self.ledger, self.log]
        files += self.checkpoints.glob("last/manifest.json")
        samples = (self.samples, self.samples.with_suffix(".json"))  # where there were prompts
        files += [path for path in (*samples, self.final / CARD) if path.exists()]
        files += sorted((self.path / PLOTS).glob("*.png"))
        return files + sorted(self.skipped.glob("*.json"))

    def changed_arguments(self, arguments: Arguments) -> dict[str, tuple[Any, Any]]:
        """Arguments whose value is not that of the last start here: name to (old, new)."""
        try:
            old = json.loads(self.arguments.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {
            name: (old[name], new)
            for name, new in as_settings(arguments).items()
            if name in old and old[name] != new and name not in NOT_WORTH_A_WORD
        }

    def write_opening(
        self, arguments: Arguments, provenance: dict[str, Any], ledger: dict[str, Any]
    ) -> None:
        """Notes what the run is, and that it has not ended; before anything else is written."""
        self.result.unlink(missing_ok=True)
        write_json(self.arguments, as_settings(arguments))
        beside = self.arguments_with_origins.with_suffix(".tmp")
        beside.write_text(as_yaml(arguments), encoding="utf-8")
        os.replace(beside, self.arguments_with_origins)
        write_json(self.provenance, provenance)
        write_json(self.ledger, ledger)

    def write_result(self, result: dict[str, Any]) -> None:
        """Notes how the run ended."""
        write_json(self.result, result)

    def read_result(self) -> dict[str, Any] | None:
        """How the run ended, or None while it has not."""
        try:
            return dict(json.loads(self.result.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
