"""tracking.json: what a tracker is to know of a run, kept beside its log for as long as it lasts.

With it and train_log.jsonl a run can be sent to a tracker that was not there when it was trained.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training.durable import write_json
from llm_training.tracking.errors import TrackingError
from llm_training.tracking.record import RunRecord, UsedDataset
from llm_training.tracking.tracked_run import Ending

FILE_NAME = "tracking.json"


@dataclass
class RunNote:
    """A run's record, where it was to be stored, and how it ended.

    Attributes:
        record: what a tracker notes when the run begins there.
        experiment_name: that it is filed under.
        run_name: of the run.
        store: MLflow's URI without logins; None: MLflow was not asked for.
        run_id: MLflow's, once it is known.
        started: when it was started first, in Unix seconds.
        ending: how it ended; None: it is training, or ended without a word.
        ended: when, in Unix seconds.
    """

    record: RunRecord
    experiment_name: str
    run_name: str | None
    store: str | None
    run_id: str | None = None
    started: float = dataclasses.field(default_factory=lambda: round(time.time(), 3))
    ending: Ending | None = None
    ended: float | None = None

    def write(self, folder: Path) -> None:
        """Writes tracking.json; there is the old one or the new one at every moment."""
        content = dataclasses.asdict(self)
        content["ending"] = self.ending._asdict() if self.ending else None
        write_json(folder / FILE_NAME, content)

    @classmethod
    def read(cls, folder: Path) -> RunNote:
        """What `write` wrote.

        Raises:
            TrackingError: it is not there or cannot be read.
        """
        path = folder / FILE_NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            record = content.pop("record")
            datasets = tuple(UsedDataset(**dataset) for dataset in record.pop("datasets"))
            ending = content.pop("ending")
            return cls(
                record=RunRecord(**record, datasets=datasets),
                ending=Ending(**ending) if ending else None,
                **content,
            )
        except FileNotFoundError:
            raise TrackingError(
                f"{folder} has no {FILE_NAME}. Give the output_dir of a run that was trained."
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrackingError(f"{path} cannot be read: {error!r}.") from error


def is_untold(folder: Path) -> bool:
    """Whether a tracker was begun for the run in a folder, and not told how it ended."""
    try:
        note = RunNote.read(folder)
    except TrackingError:
        return False
    return note.store is not None and note.ending is None


def first_start(folder: Path) -> float | None:
    """When the run in a folder was started first, in Unix seconds; None where that is not noted."""
    try:
        return RunNote.read(folder).started
    except TrackingError:
        return None
