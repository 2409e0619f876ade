"""Proves that a run is in MLflow with all that belongs to it, once, and true.

MLflow is the real one on SQLite, in the process of the test, and the Accelerator is real.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from accelerate import Accelerator
from mlflow import MlflowClient

from llm_training.samples import Sample, append_samples
from llm_training.tracking import TrackingError
from llm_training.tracking.mlflow_store import artifact_location, resolve_store
from llm_training.tracking.record import UsedDataset
from tests.tracked_runs import (
    Start,
    kill,
    log_lines,
    log_loss,
    open_folder,
    started_here,
    stored_points,
    stored_run,
    wait_until_sent,
)


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_folder(tmp_path, empty_store, monkeypatch)


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with started_here(folder, monkeypatch) as start:
        yield start


def test_a_run_is_in_mlflow_with_all_that_belongs_to_it(folder: Path, start: Start) -> None:
    tracking = start(parameters={"learning_rate": 1e-3}, tags={"git": "abc"})
    tracking.log({"train/loss": 4.0}, 10)
    artifact = folder / "arguments.json"
    artifact.write_text("{}")
    tracking.finish("FINISHED", [artifact])

    run = stored_run(tracking.run_id)
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params == {"learning_rate": "0.001"}
    assert run.data.tags["git"] == "abc"
    assert stored_points(tracking.run_id, "train/loss") == [(10, 4.0)]
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "train_llm"
    # Beside the database, and nowhere else.
    uploaded = folder / "mlartifacts" / str(tracking.run_id) / "artifacts" / "arguments.json"
    assert uploaded.read_text() == "{}"
    left = {path.name for path in folder.iterdir()}
    assert left == {"arguments.json", "mlartifacts", "mlflow.db", "out"}


def test_an_old_mlruns_folder_is_not_picked_up(folder: Path, start: Start) -> None:
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    tracking = start()
    log_loss(tracking, 10)
    tracking.finish("FINISHED")
    assert mlflow.get_tracking_uri() == f"sqlite:///{folder}/mlflow.db"
    assert len(list((folder / "mlruns").rglob("*"))) == 2


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_the_true_one(start: Start, status: Any) -> None:
    tracking = start()
    tracking.finish(status)
    tracking.finish("FINISHED")  # a second call changes nothing,
    Accelerator(cpu=True).end_training()  # neither does Accelerate,
    mlflow.tracking.fluent._safe_end_run()  # nor MLflow's exit hook
    assert stored_run(tracking.run_id).info.status == status


def test_a_resumed_run_is_one_run_without_doubled_steps(folder: Path, start: Start) -> None:
    first = start()
    log_loss(first, 10, 20, 30)
    first.log({"eval/loss": 9.0}, 20)
    wait_until_sent(first)
    kill(first)  # after step 30; the checkpoint is of step 20

    second = start(resumed_step=20)
    second.log({"eval/loss": 9.0}, 20)  # the evaluation of the checkpoint's own step
    log_loss(second, 30, 40)
    second.log({"eval/loss": 8.0}, 30)  # same step, but not logged before the kill
    second.finish("FINISHED")

    assert second.run_id == first.run_id
    assert stored_points(first.run_id, "train/loss") == [(s, float(s)) for s in (10, 20, 30, 40)]
    assert stored_points(first.run_id, "eval/loss") == [(20, 9.0), (30, 8.0)]
    assert stored_run(first.run_id).info.status == "FINISHED"
    steps = [line["step"] for line in log_lines(folder) if "train/loss" in line]
    assert steps == [10, 20, 30, 40]


def test_a_run_that_was_ended_is_running_again_when_it_goes_on(start: Start) -> None:
    first = start()
    first.finish("KILLED", reason="SIGTERM")
    assert stored_run(first.run_id).info.status == "KILLED"
    second = start(resumed_step=10)
    assert second.run_id == first.run_id
    assert stored_run(first.run_id).info.status == "RUNNING"


def test_no_request_holds_more_than_a_server_takes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, sizes = MlflowClient.log_batch, []

    def note(*arguments: Any, **options: Any) -> None:
        sizes.append({name: len(options.get(name, ())) for name in ("params", "tags")})
        log_batch(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", note)
    many = {f"a{number}": str(number) for number in range(250)}
    start(parameters=many, tags=many).finish("KILLED")
    second = start(resumed_step=10, tags={name: "new" for name in many}, parameters=many)
    assert max(size["params"] for size in sizes) == 100
    assert max(size["tags"] for size in sizes) == 100
    data = stored_run(second.run_id).data
    assert {name: data.params[name] for name in many} == many
    assert {data.tags[name] for name in many} == {"new"}


def test_parameters_that_changed_at_a_resume_become_tags(start: Start) -> None:
    long = "x" * 7000
    first = start(parameters={"learning_rate": 0.1, "seed": 1, "long": long})
    kill(first)
    now = {"learning_rate": 0.2, "seed": 1, "long": long, "added": None}
    second = start(resumed_step=20, parameters=now)

    data = stored_run(first.run_id).data
    assert {name: data.params[name] for name in ("learning_rate", "seed", "added")} == {
        "learning_rate": "0.1",
        "seed": "1",
        "added": "null",
    }
    changes = {name: value for name, value in data.tags.items() if name.startswith("resume")}
    assert changes == {"resume.20.learning_rate": "0.1 -> 0.2"}
    assert second.run_id == first.run_id


def test_a_run_that_was_deleted_is_followed_by_a_new_one(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start()
    kill(first)
    MlflowClient().delete_run(str(first.run_id))
    second = start(resumed_step=20)
    assert second.run_id != first.run_id
    assert stored_run(second.run_id).data.tags["resumed_from_run"] == first.run_id
    assert f"{first.run_id} is gone" in capsys.readouterr().out


def test_a_run_that_another_store_has_never_seen_is_followed_by_a_new_one(
    folder: Path, start: Start, empty_store: Path
) -> None:
    first = start()
    kill(first)
    shutil.copy(empty_store, folder / "other.db")
    second = start(resumed_step=20, tracking_uri="sqlite:///other.db")
    assert stored_run(second.run_id).data.tags["resumed_from_run"] == first.run_id


def test_a_resumed_run_stays_in_its_experiment(start: Start) -> None:
    first = start(experiment_name="a/b")
    kill(first)
    second = start(resumed_step=20, experiment_name="c")
    assert second.run_id == first.run_id
    assert MlflowClient().get_experiment_by_name("c") is None


def test_what_is_not_finite_stays_out_of_mlflow(start: Start) -> None:
    tracking = start()
    tracking.log({"train/loss": math.inf, "train/grad_norm": math.nan, "perf/mfu": 0.5}, 10)
    wait_until_sent(tracking)
    assert set(stored_run(tracking.run_id).data.metrics) == {"perf/mfu"}


def test_many_and_long_parameters_arrive_and_a_cut_shows(start: Start) -> None:
    many = {f"parameter_{index}": index for index in range(230)}
    tracking = start(parameters={**many, "long": "x" * 10_000, "nested": {"n_layer": 6}})
    parameters = stored_run(tracking.run_id).data.params
    assert len(parameters) == 232
    assert len(parameters["long"]) == 6000
    assert parameters["long"].endswith("x... [cut]")
    assert parameters["nested"] == '{"n_layer": 6}'


def test_secrets_do_not_reach_a_tracker(start: Start) -> None:
    secrets = {"hf_token": "hf_abc", "deep": {"api_key": "k"}, "url": "http://me:pw@host/x"}
    tracking = start(parameters=secrets, tags={"remote": "https://ghp_1@github.com/a/b"})
    data = stored_run(tracking.run_id).data
    assert data.params == {
        "hf_token": "[redacted]",
        "deep": '{"api_key": "[redacted]"}',
        "url": "http://[redacted]@host/x",
    }
    assert data.tags["remote"] == "https://[redacted]@github.com/a/b"


def test_the_environment_decides_the_store_and_nothing_else(
    folder: Path, start: Start, empty_store: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copy(empty_store, folder / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    tracking = start()
    assert mlflow.get_tracking_uri() == f"sqlite:///{folder}/other.db"
    experiment = stored_run(tracking.run_id).info.experiment_id
    assert MlflowClient().get_experiment(experiment).name == "train_llm"
    assert "MLFLOW_EXPERIMENT_NAME is not used" in capsys.readouterr().out


def test_a_dead_server_is_given_up_soon_unless_the_user_says_otherwise(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    start()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"


@pytest.mark.parametrize("name", ['say "x"', "it's", "a/b", "/Shared/x", "100 % ü"])
def test_unusual_experiment_names_work(start: Start, name: str) -> None:
    first = start(experiment_name=name)
    experiment = stored_run(first.run_id).info.experiment_id
    assert MlflowClient().get_experiment(experiment).name == name
    first.finish("KILLED")
    assert start(experiment_name=name, resumed_step=1).run_id == first.run_id
    other = start(experiment_name=name, output_dir="other", sweep="rates")
    assert stored_run(other.run_id).info.experiment_id == experiment


def test_an_experiment_name_that_mlflow_does_not_take_is_refused(start: Start) -> None:
    with pytest.raises(TrackingError, match="maximum length of 500 characters"):
        start(experiment_name="x" * 501)


def test_a_deleted_experiment_is_refused_with_the_way_out(folder: Path, start: Start) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    number = client.create_experiment("old")
    client.delete_experiment(number)
    with pytest.raises(TrackingError, match=f"'old' was deleted.*--experiment-id {number}"):
        start(experiment_name="old")


def test_a_server_that_is_down_at_the_start_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        TrackingError, match=r"mlflow could not be started.*tracking_uri.*--tracking optional"
    ):
        start(tracking_uri="http://me:password@127.0.0.1:9")


def test_a_server_that_never_answers_is_an_error_at_the_start(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    refusal = pytest.raises(TrackingError, match=r"mlflow could not be started.*tracking_uri")
    with socket.create_server(("127.0.0.1", 0)) as silent, refusal:
        start(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert 1 < time.monotonic() - began < 10


def test_a_start_that_fails_after_mlflow_started_leaves_no_finished_run(
    folder: Path, start: Start
) -> None:
    with pytest.raises(TrackingError, match="could not be started"):
        start(parameters={"no(brackets)": 1})
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'train_llm'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


def test_stores_and_where_their_artifacts_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_store(None) == f"sqlite:///{folder}/mlflow.db"
    assert resolve_store("sqlite:////data/m.db") == "sqlite:////data/m.db"
    assert resolve_store("http://host:5000") == "http://host:5000"
    assert artifact_location("sqlite:////data/m.db") == "/data/mlartifacts"
    assert artifact_location("postgresql://host/db") == f"{folder}/mlartifacts"
    assert artifact_location("http://host:5000") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_store(None) == "http://host:5000"
    assert resolve_store("sqlite:////data/m.db") == "sqlite:////data/m.db"


# ------------------------------------------------------------------------------- what surrounds it


BOOKS = UsedDataset("books", "training", "f00d", "books/*.txt", {"num_tokens": 812})
HELD_OUT = UsedDataset("books", "validation", "f00d", "books/*.txt", {"num_tokens": 12})


def stored_tags(run_id: str | None) -> dict[str, str]:
    return dict(stored_run(run_id).data.tags)


def test_datasets_are_inputs_of_the_run_and_a_resume_adds_none(start: Start) -> None:
    kill(start(datasets=(BOOKS, HELD_OUT)))
    second = start(resumed_step=20, datasets=(BOOKS, HELD_OUT))
    inputs = stored_run(second.run_id).inputs.dataset_inputs
    found = {
        used.tags[0].value: (used.dataset.name, used.dataset.source_type, used.dataset.profile)
        for used in inputs
    }
    assert len(inputs) == 2
    assert found == {
        "training": ("books", "local", '{"num_tokens": 812}'),
        "validation": ("books", "local", '{"num_tokens": 12}'),
    }
    assert mlflow.data.get_source(inputs[0].dataset).uri == "books/*.txt"  # MLflow reads it


def test_other_data_at_a_resume_is_one_input_more(start: Start) -> None:
    kill(start(datasets=(BOOKS,)))
    second = start(resumed_step=20, datasets=(dataclasses.replace(BOOKS, fingerprint="beef"),))
    assert len(stored_run(second.run_id).inputs.dataset_inputs) == 2


def test_files_are_kept_in_their_folders_and_replaced(folder: Path, start: Start) -> None:
    out = folder / "out"
    step = out / "checkpoints" / "step-00000200"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (step.parent / "last").symlink_to(step.name)
    (out / "plots").mkdir()
    (out / "plots" / "loss.png").write_bytes(b"png")
    tracking = start()
    files = [out / "train_log.jsonl", step.parent / "last" / "manifest.json"]
    files += [out / "plots" / "loss.png"]
    log_loss(tracking, 10)
    tracking.flush(files)
    wait_for_artifact(tracking.run_id, "plots/loss.png")
    log_loss(tracking, 20)
    tracking.finish("FINISHED", files)

    kept = folder / "mlartifacts" / str(tracking.run_id) / "artifacts"
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    manifest = "checkpoints/step-00000200/manifest.json"
    assert names == {"train_log.jsonl", manifest, "plots/loss.png"}
    assert (kept / "train_log.jsonl").read_bytes() == (out / "train_log.jsonl").read_bytes()


def wait_for_artifact(run_id: str | None, name: str) -> None:
    give_up_at = time.monotonic() + 30
    while name not in {file.path for file in MlflowClient().list_artifacts(str(run_id), "plots")}:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_samples_are_a_table_in_mlflow(folder: Path, start: Start) -> None:
    tracking = start()
    samples = folder / "out" / "samples.jsonl"
    append_samples(samples, [Sample(200, 4096, "def ", "greedy", "f(x):")])
    tracking.finish("FINISHED", [samples.with_suffix(".json"), samples.with_suffix(".json")])
    run = stored_run(tracking.run_id)
    table = MlflowClient().load_table(run.info.experiment_id, "samples.json")
    assert table.to_dict("records") == [
        {"step": 200, "tokens": 4096, "prompt": "def ", "kind": "greedy", "text": "f(x):"}
    ]
    entries = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert entries == [{"path": "samples.json", "type": "table"}]


def test_why_a_run_ended_is_told_until_it_goes_on(start: Start) -> None:
    first = start()
    first.finish("FAILED", error="ValueError: --hf_token abc\nhttps://me:pw@host")
    tags = stored_tags(first.run_id)
    assert tags["error"] == "ValueError: --hf_token [redacted]\nhttps://[redacted]@host"
    second = start(resumed_step=20)
    assert "error" not in stored_tags(first.run_id)
    second.finish("KILLED", reason="SIGTERM")
    assert stored_tags(first.run_id)["stopped_by"] == "SIGTERM"
    third = start(resumed_step=20)
    third.finish("FINISHED")
    assert third.run_id == first.run_id
    assert not {"error", "stopped_by"} & stored_tags(first.run_id).keys()


def test_a_value_that_is_the_default_again_is_no_longer_marked(start: Start) -> None:
    kill(start(tags={"changed.seed": "1 (command line)", "changed.optim": "muon (run.json)"}))
    second = start(resumed_step=20, tags={"changed.optim": "muon (run.json)"})
    tags = stored_tags(second.run_id)
    marked = {name: text for name, text in tags.items() if name.startswith("changed.")}
    assert marked == {"changed.optim": "muon (run.json)"}


def test_the_description_has_the_best_result_and_how_to_run_it_again(start: Start) -> None:
    tracking = start()
    again = f"Again: `python train_llm.py --from_run {tracking.run_id}`"
    assert stored_tags(tracking.run_id)["mlflow.note.content"] == again
    for step, loss in ((0, 5.0), (10, 3.5), (20, math.nan), (30, 4.0)):
        tracking.log({"eval/loss": loss}, step)
    tracking.finish("FINISHED")
    text = stored_tags(tracking.run_id)["mlflow.note.content"]
    assert text == f"Best: eval/loss 3.5000 at step 10.\n\n{again}"


def test_a_token_in_the_git_remote_stays_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking.context.git_context import GitRunContext

    remote = {"mlflow.source.git.repoURL": "https://ghp_1@github.com/a/b"}
    monkeypatch.setattr(GitRunContext, "in_context", lambda self: True)
    monkeypatch.setattr(GitRunContext, "tags", lambda self: remote)
    tags = stored_tags(start().run_id)
    assert tags["mlflow.source.git.repoURL"] == "https://[redacted]@github.com/a/b"
    assert tags["mlflow.source.type"] == "LOCAL"


def test_steps_that_are_computed_again_are_told(start: Start) -> None:
    tracking = start()
    log_loss(tracking, 10, 20, 30)
    tracking.go_back(10)
    log_loss(tracking, 20)
    tracking.go_back(10)
    tracking.finish("FINISHED")
    tags = stored_tags(tracking.run_id)
    rewinds = {name: text for name, text in tags.items() if name.startswith("rewound")}
    assert rewinds == {
        "rewound.1": "steps 11-30 were computed again, from step 10 on",
        "rewound.2": "steps 11-20 were computed again, from step 10 on",
    }


def test_what_is_computed_otherwise_after_a_resume_is_in_the_curve_too(start: Start) -> None:
    """Steps that the store had at the resume are left out until the run goes back behind them."""
    first = start()
    log_loss(first, 10, 20, 30)
    wait_until_sent(first)
    kill(first)
    second = start(resumed_step=10)
    log_loss(second, 20, 30)
    second.go_back(10)
    second.log({"train/loss": 0.5}, 20)
    second.finish("FINISHED")
    points = stored_points(second.run_id, "train/loss")
    assert (20, 0.5) in points
    assert {step for step, _ in points} == {10, 20, 30}


def test_mlflow_does_not_watch_the_machine_itself(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    tracking = start()
    monitors = mlflow.tracking.fluent.run_id_to_system_metrics_monitor
    assert tracking.run_id not in monitors
