"""The finished model in MLflow: logged with its signature, and registered where that is asked for.

MLflow is given the folder as it is. It loads no weights, and calls no hub: the card comes with the
folder, and an absolute path is no name of a repository.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_training.tracking.errors import first_line

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from mlflow.models import ModelSignature

NEW_TOKENS = 128  # that it makes of a text, where nothing else is asked for
MODEL_NAME = "model"  # of the logged model, beside those of other runs
REQUIREMENTS = ("transformers", "torch", "accelerate")  # to open it elsewhere
# For a model of many gigabytes; shorter than the half hour for which other processes wait.
MODEL_SECONDS = 1500.0
NO_CARD = "---\nlibrary_name: transformers\n---\n"
REQUEST_SECONDS = "600"  # for one file: the store may have to pass it on


class Logged(NamedTuple):
    """A model that MLflow has.

    Attributes:
        uri: by which `mlflow.transformers.load_model` opens it; of plain files, their place.
        version: in the registry; None where it was not to be registered, or could not be.
        reason: why it is there as plain files alone; empty where it is a model.
    """

    uri: str
    version: str | None = None
    reason: str = ""

    def line(self, registered_name: str | None) -> str:
        """What became of it, for the console."""
        if self.reason:
            return f"Model logged to MLflow as plain files, {self.uri}: {self.reason}"
        if self.version is None:
            return f"Model logged to MLflow: {self.uri}"
        return f"Model logged to MLflow: {self.uri}, registered as {registered_name}" + (
            f", version {self.version}"
        )


def log_model_in_time(
    folder: Path,
    store: str,
    run_id: str | None,
    step: int,
    registered_name: str | None,
    say: Callable[[str], None],
    remedy: str,
) -> None:
    """Logs a finished model, and waits no longer than MODEL_SECONDS; a failure is only told.

    Args:
        folder: the model, a plain Hugging Face folder.
        store: MLflow's URI.
        run_id: of the run that made it; None: MLflow has not answered yet.
        step: after which the model is as it is; its metrics become the model's.
        registered_name: in MLflow's registry; None: do not register it.
        say: told how it goes.
        remedy: the command that does it later.
    """
    if run_id is None:
        say(f"warning: the model was not logged: MLflow has no run yet. {remedy}")
        return
    say("Logging the model to MLflow ...")
    outcome: list[str] = []

    def work() -> None:
        try:
            logged = log_model(folder, store, run_id, step, registered_name)
        except Exception as error:  # of whatever library: the training is done
            outcome.append(f"warning: the model was not logged ({first_line(error)}). {remedy}")
        else:
            outcome.append(logged.line(registered_name))

    # A daemon: one that hangs does not keep the process from ending.
    worker = threading.Thread(target=work, name="model to mlflow", daemon=True)
    worker.start()
    worker.join(MODEL_SECONDS)
    late = f"warning: MLflow has not taken the model within {MODEL_SECONDS:.0f} s. {remedy}"
    say(outcome[0] if outcome else late)


def log_model(
    folder: Path, store: str, run_id: str, step: int, registered_name: str | None
) -> Logged:
    """Logs a finished model as one of its run, registers it, and waits until that is done.

    What MLflow's form for models of transformers cannot hold is kept as plain files of the run. The
    other arguments are those of `log_model_in_time`.

    Raises:
        mlflow.exceptions.MlflowException: the store, or the name, cannot be used.
    """
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(store)
    client = MlflowClient(store)
    run = client.get_run(run_id)
    with _patient_and_quiet():
        if reason := why_not_a_model(folder):
            client.log_artifacts(run_id, str(folder), folder.name)
            return Logged(f"{run.info.artifact_uri}/{folder.name}", reason=reason)
        # Made here, so that it is in the experiment of its run.
        made = client.create_logged_model(run.info.experiment_id, MODEL_NAME, run_id)
        uri = _hand_over(folder, run_id, made.model_id, step)
    if registered_name is None:
        return Logged(uri)
    with _patient_and_quiet():  # anew: to log a model turns MLflow's lines on again
        return Logged(uri, str(mlflow.register_model(uri, registered_name).version))


def _hand_over(folder: Path, run_id: str, model_id: str, step: int) -> str:
    """Has MLflow copy the folder into a model that was made for it; returns the model's URI."""
    from mlflow import transformers

    with _tasks_with_classes():
        info = transformers.log_model(
            str(folder.absolute()),
            task="text-generation",
            signature=_text_to_text(folder),
            model_card=_card_of(folder),
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
            run_id=run_id,
            model_id=model_id,
            step=step,
        )
    return str(info.model_uri)


def why_not_a_model(folder: Path) -> str:
    """What keeps a folder from being logged as a model of transformers; empty: nothing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it has no config.json, as an adapter alone has none"
    if not config.get("architectures"):
        return "its config.json names no architecture"
    if "auto_map" in config:
        return "it needs Python code of its own, which MLflow would have to run"
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return "it has no tokenizer, without which MLflow's models take no text"
    return ""


def _text_to_text(folder: Path) -> ModelSignature:
    """Text in, text out, and no longer than the model has positions."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from transformers import AutoConfig

    positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    num_tokens = min(NEW_TOKENS, (positions or NEW_TOKENS) // 2)
    return ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "long", num_tokens)]),
    )


@contextmanager
def _tasks_with_classes() -> Iterator[None]:
    """Lets MLflow read a pipeline's class, of which transformers keeps the name alone."""
    import transformers
    from transformers import pipelines

    def check_task(task: str) -> tuple[str, dict[str, Any], Any]:
        name, details, options = look_up(task)
        kind = details["impl"]
        if isinstance(kind, str):
            details = {**details, "impl": getattr(transformers, kind.rpartition(".")[2])}
        return name, details, options

    look_up = pipelines.check_task
    pipelines.check_task = check_task
    try:
        yield
    finally:
        pipelines.check_task = look_up


def _card_of(folder: Path) -> ModelCard:
    """The folder's own card; without one MLflow would look for it on a hub."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    return ModelCard(path.read_text(encoding="utf-8") if path.exists() else NO_CARD)


def _version(package: str) -> str:
    """The version without a mark of the build, which no registry has."""
    return importlib.metadata.version(package).partition("+")[0]


@contextmanager
def _patient_and_quiet() -> Iterator[None]:
    """More time for a request, and none of MLflow's lines on what it does.

    The number of a version stands in our own line; that a local folder has no licence on a hub
    needs no word.
    """
    from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

    names = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": REQUEST_SECONDS,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {name: os.environ.get(name) for name in names}
    logger = logging.getLogger("mlflow")
    level = logger.level
    os.environ.update(names)
    logger.setLevel(logging.ERROR)
    MLFLOW_LOGGING_STREAM.enabled = False
    try:
        yield
    finally:
        MLFLOW_LOGGING_STREAM.enabled = True
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
