"""The arguments of an earlier run, to run it again: by its folder, a checkpoint or MLflow.

Torch is not imported, and MLflow only where its run id is given.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from arguments import KINDS
from llm_training.argument_files import literal, plain, read_file
from llm_training.resolved_arguments import escaped

ARGUMENTS = "arguments.json"
MANIFEST = "manifest.json"  # as checkpoint_files names it, which takes seconds to import
RUN_ID_FILE = "mlflow_run_id.txt"  # as mlflow_run does
RUN_ID = re.compile(r"[0-9a-f]{32}")
CUT_OFF = ("... [cut]", "[redacted]")  # how values end that were not kept as they were
# A run that is run again has its own; and these say how arguments are read, not what they are.
LEFT_BEHIND = ("run_name", "output_dir", "from_run", "show_arguments")
ALL_SIZES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
)


class EarlierRun(NamedTuple):
    """A run that is run again.

    Attributes:
        name: how it was asked for.
        settings: its resolved arguments, as an argument file holds them.
    """

    name: str
    settings: dict[str, Any]

    @property
    def output_dir(self) -> str:
        return str(self.settings.get("output_dir") or "runs/run")

    @property
    def next_name(self) -> str:
        """NAME-again, or after that NAME-again-2, ...: the same at each start, and on each rank."""
        name = str(self.settings.get("run_name") or Path(self.output_dir).name)
        again = re.fullmatch(r"(.+)-again(?:-([0-9]{1,9}))?", name)
        return f"{again[1]}-again-{int(again[2] or 1) + 1}" if again else f"{name}-again"

    def settings_below(self, values: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
        """What it leaves to a run with other `values`, or on another number of processes.

        Its batch sizes are all resolved, and would contradict another one: the rows of a step are
        kept, and what splits them is derived anew.

        Raises:
            ValueError: its seed was drawn, and nobody knows it any more.
        """
        if self.settings.get("seed", 0) is None and "seed" not in values:
            advice = "give --seed, or --seed null to draw another"
            raise ValueError(f"{self.name} drew its seed, and no checkpoint tells it: {advice}")
        per_device, accumulation, total = (self.settings.get(name) for name in ALL_SIZES)
        kept = {name: value for name, value in self.settings.items() if name not in LEFT_BEHIND}
        if ALL_SIZES[1] in values:
            kept.pop(ALL_SIZES[0], None)
        elif any(name in values for name in ALL_SIZES) or (
            isinstance(per_device, int)
            and isinstance(accumulation, int)
            and per_device * accumulation * num_processes != total
        ):
            kept.pop(ALL_SIZES[1], None)
        return kept


def read_earlier_run(wish: str, tracking_uri: str | None) -> EarlierRun:
    """The run that is meant by its output folder, one of its checkpoints or its MLflow run id.

    Args:
        tracking_uri: MLflow's store; None: as for a new run.

    Raises:
        ValueError: it is not there, or its arguments are not.
    """
    if os.path.isdir(wish):
        settings = arguments_of_folder(Path(wish))
    elif RUN_ID.fullmatch(wish):
        settings = _of_mlflow_run(wish, tracking_uri)
    else:
        raise ValueError(
            f"{wish} is no folder, and no run id of MLflow (32 of 0-9 and a-f): name the output_dir"
            " of a run, or a checkpoint in it"
        )
    for name, value in settings.items():
        if isinstance(value, str) and value.endswith(CUT_OFF):
            raise ValueError(f"{name} was not kept whole: name the output_dir of the run")
    return EarlierRun(wish, settings)


def arguments_of_folder(folder: Path) -> dict[str, Any]:
    """The arguments in an output folder, or in a checkpoint or its output folder.

    They are as an argument file holds them; a drawn seed is the one that a checkpoint tells.

    Raises:
        ValueError: they are not there, or cannot be read.
    """
    is_checkpoint = (folder / MANIFEST).is_file()
    output = folder.resolve().parents[1] if is_checkpoint else folder
    manifest = _read_manifest(folder if is_checkpoint else folder / "checkpoints" / "last")
    kept = manifest.get("run", {}).get("arguments") if is_checkpoint else None
    settings = dict(kept) if kept else _of_file(output / ARGUMENTS)
    if settings.get("seed", 0) is None:  # it was drawn, and would be another one now
        settings["seed"] = manifest.get("identity", {}).get("seed")
    return settings


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        advice = "name the output_dir of a run, or a checkpoint in it"
        raise ValueError(f"{path.parent} holds no {ARGUMENTS}: {advice}")
    try:
        return dict(plain(read_file(str(path))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _of_mlflow_run(run_id: str, tracking_uri: str | None) -> dict[str, Any]:
    """The arguments in a run's output folder, else those that MLflow keeps of it."""
    client, place = open_store(tracking_uri)
    try:
        return arguments_of_mlflow_run(client, client.get_run(run_id))
    except Exception as error:  # whatever a server, its network or a database can come up with
        raise ValueError(
            f"{place} has no such run, or cannot be asked: {reason_of(error)}"
        ) from None


def open_store(tracking_uri: str | None) -> tuple[Any, str]:
    """A client of MLflow's store, and what messages call the store.

    Args:
        tracking_uri: None: as for a new run.

    Raises:
        ValueError: it is a file that is not there.
    """
    from llm_training.tracking.mlflow_store import ENVIRONMENT_DEFAULTS, resolve_store
    from llm_training.tracking.redaction import redact_url

    uri = resolve_store(tracking_uri)
    place = f"the store {redact_url(uri)} (tracking_uri)"
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        raise ValueError(f"{place} is not there, so that no run can be looked up: correct it")
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for name, value in (ENVIRONMENT_DEFAULTS | quiet).items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # 1.4 s

    return MlflowClient(uri), place


def reason_of(error: Exception) -> str:
    """The first line of what MLflow says, which may quote its URI, without logins."""
    from llm_training.tracking.redaction import redact_url

    return (redact_url(str(error)).splitlines() or [type(error).__name__])[0]


def arguments_of_mlflow_run(client: Any, run: Any) -> dict[str, Any]:
    """The arguments in a run's output folder, else those that MLflow keeps of it.

    Args:
        client: a `mlflow.MlflowClient`.
        run: a `mlflow.entities.Run`.

    Raises:
        ValueError: there are none.
    """
    output = output_of_mlflow_run(run)
    if output is not None:  # it knows a drawn seed, too
        return arguments_of_folder(output)
    return _of_artifact(client, run.info.run_id) or _of_parameters(run.data.params)


def output_of_mlflow_run(run: Any) -> Path | None:
    """The output folder of a run, where it is on this machine and still that run's."""
    output = Path(run.data.params.get("output_dir", ""))
    return output if _run_id_of(output) == run.info.run_id else None


def _of_artifact(client: Any, run_id: str) -> dict[str, Any] | None:
    """The arguments.json of a run that has ended; None where there is none."""
    if ARGUMENTS not in [artifact.path for artifact in client.list_artifacts(run_id)]:
        return None
    with TemporaryDirectory() as folder:
        return _of_file(Path(client.download_artifacts(run_id, ARGUMENTS, folder)))


def _run_id_of(output: Path) -> str | None:
    try:
        return (output / RUN_ID_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _of_parameters(parameters: Mapping[str, str]) -> dict[str, Any]:
    """The arguments among MLflow's parameters, which are texts."""
    settings: dict[str, Any] = {}
    for name in KINDS.keys() & parameters.keys():
        text, kind = parameters[name], KINDS[name]
        if kind.choices and kind.type is str and text not in (*kind.choices, "null"):
            continue  # device is noted as what it was found to be
        if kind.type is str:
            settings[name] = None if text == "null" and kind.nullable else escaped(text)
        elif kind.type in (list, dict):
            settings[name] = escaped(json.loads(text))
        else:
            settings[name] = literal(text)
    if not settings:
        raise ValueError("MLflow has no parameters of it: name the output_dir of the run")
    return settings
