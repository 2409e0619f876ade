"""Where MLflow stores runs: the store, its environment, the experiment and the artifact folder.

None of it depends on what lies in the working folder by chance, and nobody is called whom the user
did not name. MLflow takes 1.4 s to import, hence inside functions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_training.imports import no_garbage_collection
from llm_training.tracking.errors import TrackingError
from llm_training.tracking.redaction import redact_url
from llm_training.tracking.single_point_runs import require_package

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A dead server must cost the start and the end of a run seconds, where MLflow's own defaults make
# it four minutes; and a training machine calls nobody that its user did not name.
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# These would go before the arguments that describe the run, so they are taken away from MLflow.
# MLFLOW_TRACKING_URI is not among them: it decides where tracking_uri is null.
IGNORED_ENVIRONMENT = (
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TAGS",
    "MLFLOW_NESTED_RUN",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",  # log_system_metrics: the same numbers in our log too
)


def prepare_environment(tracking_uri: str | None, say: Callable[[str], None]) -> str:
    """Sees to it that the arguments decide; returns the store's URI, and imports nothing.

    Raises:
        TrackingError: MLflow is missing.
    """
    require_package("mlflow")
    set_defaults()
    for name in IGNORED_ENVIRONMENT:
        if os.environ.pop(name, None) is not None:
            say(f"warning: the environment's {name} is not used; the arguments decide")
    return resolve_store(tracking_uri)


def prepare_mlflow(tracking_uri: str | None, say: Callable[[str], None]) -> str:
    """Imports MLflow so that the arguments decide; returns the store's URI and reaches nobody.

    Raises:
        TrackingError: MLflow is missing.
    """
    uri = prepare_environment(tracking_uri, say)
    import_mlflow()
    import mlflow

    mlflow.set_tracking_uri(uri)
    return uri


def import_mlflow() -> None:
    """Imports what a run on a database needs.

    Raises:
        ImportError: MLflow is missing.
    """
    set_defaults()  # MLflow goes by them at once
    with no_garbage_collection():
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking.context.registry  # noqa: F401

    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # each new table else


def set_defaults() -> None:
    """Gives MLflow our defaults, where the environment does not decide."""
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def resolve_store(tracking_uri: str | None) -> str:
    """The store's URI: the argument, else MLFLOW_TRACKING_URI, else mlflow.db in this folder.

    The path of a SQLite file becomes absolute, so that the review command works from anywhere.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def artifact_location(uri: str) -> str | None:
    """Where a new experiment's artifacts go; None: the server decides.

    A database without a server would put them in ./mlruns: here it is mlartifacts/, beside the
    SQLite file or in the working folder.
    """
    if uri.startswith("sqlite:///"):
        return str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    if uri.startswith(("postgresql", "mysql", "mssql")):
        return str(Path("mlartifacts").absolute())
    return None


def ensure_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Makes the experiment if it is not there; its id.

    Raises:
        TrackingError: the name cannot be used.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=artifact_location(uri))
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment_name: {name!r} was deleted in MLflow, which keeps the name. Choose another"
            f" name, or restore it: MLFLOW_TRACKING_URI={redact_url(uri)}"
            f" mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    return str(experiment.experiment_id)


def page_of(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run on a server, in MLflow's view for training."""
    run = f"experiments/{experiment_id}/runs/{run_id}"
    return f"{uri.rstrip('/')}/#/{run}?workflowType=machine_learning"
