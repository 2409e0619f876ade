"""What MLflow gets of a run beside its numbers: tags, datasets, and where a file is put.

The run's page shows the datasets above the parameters, the description as Markdown, and what is
under `mlflow.loggedArtifacts` as a table.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llm_training.tracking.mlflow_sweep import Result
from llm_training.tracking.record import RunRecord, UsedDataset
from llm_training.tracking.redaction import redact, redact_text
from llm_training.tracking.tracked_run import Ending

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

MAX_TEXT_LENGTH = 6000  # MLflow's limit in characters for parameters; tags may be longer
CUT_MARK = "... [cut]"
MAX_NAME_LENGTH = 500  # of a dataset
MAX_SOURCE_LENGTH = 65_535
MAX_DIGEST_LENGTH = 36

DESCRIPTION_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
CHANGED_TAG = "changed."  # in front of an argument's name
# How an earlier start ended, where it did not come to its end.
ERROR_TAG, STOPPED_TAG = "error", "stopped_by"
TABLES = frozenset({"samples.json"})  # files in MLflow's form of a table


def context_tags() -> dict[str, str]:
    """What MLflow would note by itself of a new run, without secrets.

    User, script, git commit, branch and remote; the last is often written with a token.
    """
    from mlflow.tracking.context.registry import resolve_tags

    return {
        name: redact_text(str(value))
        for name, value in redact(resolve_tags()).items()
        if value is not None
    }


def dataset_inputs(record: RunRecord) -> list[DatasetInput]:
    """The datasets as MLflow takes them; the same ones again add nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    return [
        DatasetInput(
            Dataset(
                name=used.name[:MAX_NAME_LENGTH],
                digest=_digest(used),
                source_type=used.source_type,
                source=_source(used),
                profile=json.dumps(used.profile),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, used.context)],
        )
        for used in record.datasets
    ]


def _digest(used: UsedDataset) -> str:
    """Another one for each context: MLflow keeps one of those with the same name and digest."""
    content = f"{used.fingerprint} {used.context}"
    return hashlib.sha256(content.encode()).hexdigest()[:MAX_DIGEST_LENGTH]


def _source(used: UsedDataset) -> str:
    """JSON as MLflow's own classes of sources read it."""
    key = "path" if used.source_type == "hugging_face" else "uri"
    room = MAX_SOURCE_LENGTH // 6  # a character may become six in JSON
    return json.dumps({key: cut(used.source, room)})


def artifact_folder(path: Path, output_dir: Path) -> str | None:
    """The folder of a file among the artifacts: as in the output folder; None: the root.

    Links are followed, so that what `checkpoints/last` points to is kept under its step's name.
    """
    try:
        inside = path.resolve().relative_to(output_dir.resolve()).parent
    except ValueError:  # it lies elsewhere
        return None
    folder = str(PurePosixPath(*inside.parts))
    return None if folder == "." else folder


def with_table(tables: str | None, file: str) -> str:
    """The tag of tables with this file in it."""
    known = json.loads(tables or "[]")
    entry = {"path": file, "type": "table"}
    return json.dumps(known if entry in known else [*known, entry])


def ending_tags(ending: Ending) -> dict[str, str]:
    """Why the run did not come to its end; nothing if it did."""
    tags = {ERROR_TAG: ending.error, STOPPED_TAG: ending.reason}
    return {name: cut(redact_text(text)) for name, text in tags.items() if text}


def outdated_tags(stored: dict[str, str], record: RunRecord) -> list[str]:
    """The tags of an earlier start that are not true of this one."""
    return [
        name
        for name in stored
        if name in (ERROR_TAG, STOPPED_TAG)
        or (name.startswith(CHANGED_TAG) and name not in record.tags)
    ]


def description(record: RunRecord, run_id: str, best: Result | None) -> str:
    """The text on top of the run's page, in Markdown."""
    parts = [record.description] if record.description else []
    if best:
        parts.append(f"Best: {best.metric} {best.value:.4f} at step {best.step:,}.")
    parts.append(f"Again: `python train_llm.py --from_run {run_id}`")
    return cut("\n\n".join(parts))


def cut(text: str, room: int = MAX_TEXT_LENGTH) -> str:
    """The text as long as it may be, and that it was cut."""
    return text if len(text) <= room else text[: room - len(CUT_MARK)] + CUT_MARK
