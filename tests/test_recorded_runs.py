"""Proves that a run is read back as it was logged, from its folder alone and from MLflow alike."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from llm_training.recorded_runs import (
    RecordedRunError,
    changed_arguments,
    default_arguments,
    read_folder,
    read_recorded_run,
)
from tests.argument_cases import run_python
from tests.recorded_run_files import (
    BEGAN,
    PROVENANCE,
    SECONDS_PER_STEP,
    STDERR,
    TOKENS_PER_STEP,
    log_lines,
    loss_at,
    write_log,
    write_run,
)


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_folder_gives_back_what_was_logged() -> None:
    run = read_recorded_run(str(write_run(Path("runs/a"), arguments={"learning_rate": 1e-3})))
    assert (run.name, run.place, run.status) == ("a", "runs/a", "finished")
    assert (run.step, run.tokens, run.seconds) == (100, 100 * TOKENS_PER_STEP, 200.0)
    assert run.last("train/loss") == loss_at(100, 3.0)
    assert run.lowest("eval/loss") == (100, loss_at(100, 3.0) + 0.1)
    assert run.at("eval/loss_stderr", 50) == STDERR
    assert run.at("eval/loss", 51) is None and run.at("nothing", 1) is None
    assert set(run.evaluation()) == {
        *("eval/loss", "eval/loss_stderr", "eval/perplexity"),
        *("eval/math/loss", "eval/math/loss_stderr"),
    }
    assert run.provenance == PROVENANCE and run.ledger["leakage"]["documents"] == 35


def test_tokens_and_time_stand_beside_every_value() -> None:
    """An evaluation logs neither: its tokens are those of training at its step."""
    lines = log_lines()
    lines.insert(4, {"step": 25, "time": BEGAN + 50, "eval/loss": 1.0})
    write_log(Path("a"), lines)
    series = read_folder(Path("a")).series["eval/loss"]
    assert series.steps.tolist() == [0, 25, 50, 100]
    assert series.tokens.tolist() == [TOKENS_PER_STEP * step for step in (0, 25, 50, 100)]
    assert series.seconds.tolist() == [SECONDS_PER_STEP * step for step in (0, 25, 50, 100)]
    assert read_folder(Path("a")).until(25) == (25 * TOKENS_PER_STEP, 50.0)


def test_where_tokens_were_not_logged_they_are_not_known() -> None:
    write_log(Path("a"), [{"step": 1, "time": 1.0, "train/loss": 2.0}])
    run = read_folder(Path("a"))
    assert math.isnan(run.series["train/loss"].tokens[0])
    assert run.tokens is None and run.until(1) == (None, 0.0)


def test_the_pause_between_a_stop_and_its_resume_is_no_training_time() -> None:
    lines = log_lines()
    for line in lines[7:]:
        line["time"] += 86400
    write_log(Path("a"), lines)
    assert read_folder(Path("a")).seconds == pytest.approx(200.0)


def test_a_step_that_is_there_twice_counts_once() -> None:
    lines = log_lines()
    write_log(Path("a"), [lines[1] | {"train/loss": 9.0}, *lines])
    series = read_folder(Path("a")).series["train/loss"]
    assert series.steps.tolist() == list(range(10, 101, 10))
    assert series.values[0] == loss_at(10, 3.0)


def test_torn_lines_are_passed_over_and_what_is_no_number_stays_one() -> None:
    write_log(Path("a"), [{"step": s, "time": s, "train/loss": v} for s, v in enumerate("123")])
    log = Path("a/train_log.jsonl")
    strange = [("NaN", 3), ("Infinity", 4)]
    lines = [json.dumps({"step": s, "time": s, "train/loss": v}) for v, s in strange]
    log.write_text(log.read_text() + "\n".join([*lines, "[1]", "{}", '{"step": 9, "ti']))
    run = read_folder(Path("a"))
    assert run.series["train/loss"].steps.tolist() == [0, 1, 2, 3, 4]
    assert run.last("train/loss") == math.inf
    assert run.series["train/loss"].finite.values.tolist() == [1, 2, 3]
    assert run.lowest("train/loss") == (0, 1.0)


@pytest.mark.parametrize("log", ["", "\n", "{"])
def test_an_empty_log_is_a_run_without_metrics(log: str) -> None:
    Path("a").mkdir()
    Path("a/train_log.jsonl").write_text(log)
    run = read_folder(Path("a"))
    assert (run.step, run.tokens, run.seconds, run.series) == (0, None, 0.0, {})
    assert run.evaluation() == {} and run.lowest("eval/loss") is None and run.last("x") is None


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({}, "not finished"),
        ({"result.json": '{"stopped_early": false}'}, "finished"),
        ({"result.json": '{"stopped_early": true}'}, "stopped early"),
        ({".lock": "process {pid} on {host}, since 2026-01-01"}, "running"),
        ({".lock": "process {pid} on elsewhere, since 2026-01-01"}, "not finished"),
        ({".lock": "process 999999999 on {host}, since 2026-01-01"}, "not finished"),
        ({".lock": "it has"}, "not finished"),
        ({"tracking.json": '{"ending": {"status": "FAILED"}}'}, "failed"),
        ({"tracking.json": '{"ending": null}'}, "not finished"),
    ],
)
def test_how_it_stands_is_said(files: dict[str, str], status: str) -> None:
    write_log(Path("a"), log_lines())
    for name, text in files.items():
        text = text.replace("{pid}", str(os.getpid())).replace("{host}", socket.gethostname())
        Path("a", name).write_text(text)
    assert read_folder(Path("a")).status == status


def test_arguments_are_told_from_their_defaults() -> None:
    write_run(Path("a"), arguments={"learning_rate": 1e-3, "seed": 42, "sample_prompt": ["$${x}"]})
    run = read_folder(Path("a"))
    assert run.arguments["sample_prompt"] == ["${x}"]
    named = {"run_name": "a", "output_dir": "a", "model_type": "gpt2", "max_steps": 100}
    more = {"learning_rate": 1e-3, "sample_prompt": ["${x}"]}
    assert changed_arguments(run.arguments) == named | more
    assert default_arguments()["seed"] == 42


def test_a_log_alone_is_enough() -> None:
    write_log(Path("a"), log_lines())
    run = read_recorded_run("a")
    assert (run.name, run.arguments, run.provenance, run.result) == ("a", {}, {}, None)
    assert run.step == 100


@pytest.mark.parametrize(
    ("wish", "phrases"),
    [
        (".", ["holds neither train_log.jsonl nor arguments.json", "output_dir"]),
        ("nowhere", ["nowhere is no folder", "mlflow.db", "is not there"]),
    ],
)
def test_a_run_that_is_not_there_is_told(wish: str, phrases: list[str]) -> None:
    with pytest.raises(RecordedRunError) as caught:
        read_recorded_run(wish)
    assert [phrase for phrase in phrases if phrase not in str(caught.value)] == []


def test_torch_is_not_imported() -> None:
    ended = run_python(
        "import llm_training.compare, llm_training.plots, llm_training.model_card\n"
        "print(sorted({'torch', 'mlflow', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert ended.stdout == "[]\n", ended.stderr


# ------------------------------------------------------------------------------------------ MLflow


def leave_mlflow_run(folder: Path, *, output_dir: str) -> str:
    """The run of a folder as MLflow has it."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    from llm_training.tracking.mlflow_store import resolve_store

    client = MlflowClient(resolve_store(None))
    experiment = client.get_experiment_by_name("it")
    at = str(Path("artifacts").absolute())
    number = experiment.experiment_id if experiment else client.create_experiment("it", at)
    run_id = str(client.create_run(number, run_name=folder.name).info.run_id)
    kept: dict[str, Any] = read_folder(folder).arguments | {"output_dir": output_dir}
    parameters = [
        Param(name, value if isinstance(value, str) else json.dumps(value))
        for name, value in (kept | PROVENANCE).items()
    ]
    metrics = [
        Metric(name, float(value), round(1000 * line["time"]), line["step"])
        for line in log_lines()
        for name, value in line.items()
        if name not in ("step", "time")
    ]
    client.log_batch(run_id, metrics=metrics, params=parameters)
    client.set_terminated(run_id, "KILLED")
    return run_id


def test_mlflow_gives_the_same_run_as_its_folder(empty_store: Path) -> None:
    shutil.copy(empty_store, "mlflow.db")
    folder = write_run(Path("runs/a"), arguments={"learning_rate": 1e-3})
    run_id = leave_mlflow_run(folder, output_dir="gone")
    there, here = read_recorded_run(run_id), read_folder(folder)
    assert (there.name, there.place, there.status) == ("a", run_id, "killed")
    assert there.series.keys() == here.series.keys()
    for name, series in here.series.items():
        for mine, other in zip(series, there.series[name], strict=True):
            assert mine.tolist() == pytest.approx(other.tolist())
    assert there.arguments == here.arguments | {"output_dir": "gone"}
    assert there.provenance == PROVENANCE

    by_name = read_recorded_run("a", "sqlite:///mlflow.db")
    assert by_name.place == run_id
    again = leave_mlflow_run(folder, output_dir="gone")
    with pytest.raises(RecordedRunError, match=f"2 runs in MLflow are called a.*{run_id}"):
        read_recorded_run("a")
    for missing in ("b's", "0" * 32):
        with pytest.raises(RecordedRunError, match="is no folder"):
            read_recorded_run(missing)
    # A folder that is still there tells more than the store.
    (folder / "mlflow_run_id.txt").write_text(leave_mlflow_run(folder, output_dir="runs/a"))
    found = read_recorded_run((folder / "mlflow_run_id.txt").read_text())
    assert (found.place, found.status, found.ledger) == ("runs/a", "finished", here.ledger)
    assert again != run_id
