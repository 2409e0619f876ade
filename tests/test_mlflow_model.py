"""Proves that a finished model is in MLflow as one that opens, speaks and has a version.

MLflow is the real one on SQLite, the model a tiny GPT-2, and no hub may be called.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from transformers import GPT2Config, GPT2LMHeadModel

from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.tracking import Tracking, mlflow_model
from llm_training.tracking.__main__ import main
from tests.tracked_runs import (
    Start,
    log_loss,
    open_folder,
    started_here,
    stored_points,
    stored_run,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("model") / "final"
    torch.manual_seed(0)
    tokenizer = train_tokenizer("byte", ["abc"], 300)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=300, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\nA tiny model.\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model in out/final, from which no other machine is reached."""
    folder = open_folder(tmp_path, empty_store, monkeypatch)
    shutil.copytree(model, folder / "out" / "final")

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"{address} was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with started_here(folder, monkeypatch) as start:
        yield start


def finished_run(start: Start, **settings: Any) -> Tracking:
    tracking = start(**settings)
    log_loss(tracking, 10, 20)
    return tracking


def test_a_registered_model_opens_and_speaks(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = finished_run(start, experiment_name="it")
    tracking.log_model(folder / "out" / "final", "tiny words")
    tracking.finish("FINISHED")
    said, heard = capsys.readouterr()
    assert "Logging the model to MLflow ..." in said
    assert "registered as tiny words, version 1" in said
    assert "warning" not in said
    assert "egistered model" not in heard  # MLflow's own lines

    (version,) = MlflowClient().search_model_versions("name = 'tiny words'")
    logged = MlflowClient().get_logged_model(version.source.removeprefix("models:/"))
    run = stored_run(tracking.run_id)
    assert version.run_id == run.info.run_id
    versions = json.loads(logged.tags["mlflow.modelVersions"])
    assert [(one["name"], int(one["version"])) for one in versions] == [("tiny words", 1)]
    assert (logged.source_run_id, logged.experiment_id) == (run.info.run_id, run.info.experiment_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    kept = folder / "mlartifacts" / "models" / logged.model_id / "artifacts"
    assert "A tiny model." in (kept / "model_card.md").read_text()
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("train/loss", 20.0)]
    # What MLflow copies from the run to the model doubles nothing.
    assert stored_points(tracking.run_id, "train/loss") == [(10, 10.0), (20, 20.0)]
    assert run.info.status == "FINISHED"
    assert not (folder / "mlruns").exists()

    uri = "models:/tiny words/1"
    signature = mlflow.models.get_model_info(uri).signature
    assert [column["type"] for column in signature.inputs.to_dict()] == ["string"]
    assert [column["type"] for column in signature.outputs.to_dict()] == ["string"]
    (text,) = mlflow.pyfunc.load_model(uri).predict(["ab"])  # no longer than its 16 positions
    assert text.startswith("ab")
    pipeline = mlflow.transformers.load_model(uri)
    expected = GPT2LMHeadModel.from_pretrained(folder / "out" / "final").state_dict()
    opened = pipeline.model.state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in expected.items())


def test_a_model_without_a_tokenizer_is_kept_as_plain_files(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "out" / "final").glob("tokenizer*"):
        path.unlink()
    tracking = finished_run(start)
    tracking.log_model(folder / "out" / "final", "words")
    said = capsys.readouterr().out
    assert "as plain files" in said
    assert "it has no tokenizer" in said
    names = {file.path for file in MlflowClient().list_artifacts(str(tracking.run_id), "final")}
    assert "final/model.safetensors" in names
    assert MlflowClient().search_registered_models() == []


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no config.json" in mlflow_model.why_not_a_model(tmp_path)


def test_a_failure_names_the_command_which_then_works(
    folder: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("http://me:pw@host is down")

    tracking = finished_run(start)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", fail)
        tracking.log_model(folder / "out" / "final", "words")
    tracking.finish("FINISHED")
    said = capsys.readouterr().out
    assert "warning: the model was not logged" in said
    assert "http://[redacted]@host is down" in said
    command = f"log_model '{folder}/out' --register_model words"
    assert f"Do it later: python -m llm_training.tracking {command}" in said
    assert stored_run(tracking.run_id).info.status == "FINISHED"

    assert main(["log_model", str(folder / "out"), "--register_model", "words"]) == 0
    assert "registered as words, version 1" in capsys.readouterr().out
    assert stored_run(tracking.run_id).info.status == "FINISHED"


def test_a_store_that_hangs_is_left_after_a_while(
    folder: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_open = threading.Event()

    def hang(*arguments: Any) -> mlflow_model.Logged:
        is_open.wait()
        return mlflow_model.Logged("")

    monkeypatch.setattr(mlflow_model, "log_model", hang)
    monkeypatch.setattr(mlflow_model, "MODEL_SECONDS", 0.1)
    finished_run(start).log_model(folder / "out" / "final", None)
    assert "has not taken the model within 0 s. Do it later: " in capsys.readouterr().out
    is_open.set()


def test_without_mlflow_it_is_said_that_nothing_is_logged(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(report_to=["none"]).log_model(folder / "out" / "final", "words")
    assert "do nothing without mlflow in report_to" in capsys.readouterr().out


def test_the_command_refuses_what_is_no_finished_run(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["log_model", str(folder / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    finished_run(start).finish("FINISHED")
    shutil.rmtree(folder / "out" / "final")
    assert main(["log_model", str(folder / "out")]) == 1
    assert "final is not there" in capsys.readouterr().err
