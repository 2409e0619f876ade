"""The output folder: what lies where, and whose it is.

- `arguments.json`: every argument of the run, readable again as an argument file
- `ledger.json`: what became of every document and every token
- `provenance.json`: data, sizes, hardware, versions and revision that it ran with
- `train_log.jsonl`: one object a line: step, train/loss, ...
- `mlflow_run_id.txt`: the MLflow run that a resumed run continues, where MLflow is in use
- `checkpoints/`: `step-00000200`, `last`, `best`
- `final/`: the finished model, a plain Hugging Face folder
- `best/`: the model with the lowest validation loss, a folder like `final/`
- `result.json`: how the run ended; its presence means that it did
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from arguments import Arguments, describe
from llm_training.durable import write_json

# These may differ between two starts of a run without being worth a word.
NOT_WORTH_A_WORD = frozenset({"resume_from_checkpoint", "num_threads"})


class OutputError(ValueError):
    """The output folder cannot take this run; nothing in it was touched."""


class OutputFolder:
    """The paths of a run below its `output_dir`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.arguments = self.path / "arguments.json"
        self.provenance = self.path / "provenance.json"
        self.ledger = self.path / "ledger.json"
        self.log = self.path / "train_log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.result = self.path / "result.json"

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
            os.replace(probe, self.path / ".write_probe")
            (self.path / ".write_probe").unlink()
        except OSError as error:
            raise OutputError(
                f"--output_dir {self.path} cannot be written: {error.strerror}."
                " Give a folder that this user may write to."
            ) from error
        if self.arguments.exists():
            if start_anew:
                raise OutputError(
                    f"--output_dir {self.path} already holds a run, and resume_from_checkpoint is"
                    " none. Give another --output_dir or --run_name to start anew, or"
                    " --resume_from_checkpoint auto to go on."
                )
            return
        ours = (self.checkpoints, self.final, self.best, self.log, self.result)
        foreign = [path for path in ours if path.exists()]
        if foreign:
            raise OutputError(
                f"--output_dir {self.path} holds {foreign[0].name}, but no arguments.json of a run"
                " of ours: it belongs to something else. Give another --output_dir or --run_name."
            )

    def changed_arguments(self, arguments: Arguments) -> dict[str, tuple[Any, Any]]:
        """Arguments whose value is not that of the last start here: name to (old, new)."""
        try:
            old = json.loads(self.arguments.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {
            name: (old[name], new)
            for name, new in describe(arguments).items()
            if name in old and old[name] != new and name not in NOT_WORTH_A_WORD
        }

    def write_opening(
        self, arguments: Arguments, provenance: dict[str, Any], ledger: dict[str, Any]
    ) -> None:
        """Notes what the run is, and that it has not ended."""
        self.result.unlink(missing_ok=True)
        write_json(self.arguments, describe(arguments))
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
