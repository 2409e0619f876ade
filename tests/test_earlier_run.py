"""Proves that an earlier run is run again with the arguments that it had, and in its own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments, describe
from llm_training.argument_parsing import parse_arguments, read_arguments
from llm_training.earlier_run import EarlierRun, reason_of
from llm_training.outputs import OutputFolder
from tests.argument_cases import open_clean_place, problems_of, the_problem_of, write, write_good

NAMES = ("run_name", "output_dir")


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


def leave_run(path: str = "runs/first", num_processes: int = 1, **changes: Any) -> Arguments:
    """The output folder of a run, with one checkpoint; returns its arguments."""
    name = Path(path).name
    good = write_good(f"{name}.json", output_dir=path, sample_prompt="$${x}", **changes)
    arguments = read_arguments([good, "--weight_decay", "0.5"], num_processes)
    output = OutputFolder(path)
    checkpoint = output.checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    output.write_opening(arguments, {}, {})
    write(f"{checkpoint}/manifest.json", json.dumps({"identity": {"seed": 99}, "run": {}}))
    (output.checkpoints / "last").symlink_to("step-00000001")
    return arguments


def but_for_names(arguments: Arguments) -> dict[str, Any]:
    return {name: value for name, value in describe(arguments).items() if name not in NAMES}


@pytest.mark.parametrize("place", ["", "/", "/checkpoints/last", "/checkpoints/step-00000001"])
def test_a_run_is_run_again_in_a_folder_of_its_own(place: str) -> None:
    first = leave_run()
    again = read_arguments(["--from_run", f"runs/first{place}"], 1)
    assert but_for_names(again) == but_for_names(first)
    assert (again.run_name, again.output_dir) == ("first-again", "runs/first-again")
    assert again.origins["weight_decay"] == f"run runs/first{place}"
    assert again.origins["run_name"] == f"derived from run runs/first{place}"
    assert again.from_run is None


def test_a_checkpoint_with_arguments_of_its_own_goes_before_its_folder() -> None:
    first = leave_run()
    manifest = {"run": {"arguments": describe(first) | {"seed": 5, "sample_prompt": "$${y}"}}}
    write("runs/first/checkpoints/last/manifest.json", json.dumps(manifest))
    again = read_arguments(["--from_run", "runs/first/checkpoints/last"], 1)
    assert (again.seed, again.sample_prompt, again.weight_decay) == (5, ["${y}"], 0.5)


def test_files_go_before_the_earlier_run_and_flags_before_files() -> None:
    leave_run(save_steps=1, max_steps=1, logging_steps=1)
    file = write("more.yaml", "save_steps: 2\nmax_steps: 2\n")
    again = read_arguments([file, "--from_run", "runs/first", "--max_steps", "3"], 1)
    assert (again.logging_steps, again.save_steps, again.max_steps) == (1, 2, 3)
    assert again.run_name == "first-again"
    write("more.yaml", "from_run: runs/first\nsave_steps: null\n")
    assert read_arguments([file], 1).save_steps is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--run_name mine", ("mine", "elsewhere/mine")),
        ("--output_dir a/b", ("b", "a/b")),
        ("--run_name mine --output_dir a/b", ("mine", "a/b")),
        ("", ("first-again", "elsewhere/first-again")),
    ],
)
def test_names_may_be_given(flags: str, expected: tuple[str, str]) -> None:
    leave_run("elsewhere/first")
    again = read_arguments(["--from_run", "elsewhere/first", *flags.split()], 1)
    assert (again.run_name, again.output_dir) == expected


@pytest.mark.parametrize(
    ("name", "next_name"),
    [
        ("a", "a-again"),
        ("a-again", "a-again-2"),
        ("a-again-2", "a-again-3"),
        ("a-again-x", "a-again-x-again"),
        ("again", "again-again"),
    ],
)
def test_the_same_command_names_the_same_run(name: str, next_name: str) -> None:
    """Neither a kill nor another rank that has made the folder already may change it."""
    assert EarlierRun("x", {"run_name": name}).next_name == next_name
    leave_run("runs/b")
    leave_run("runs/b-again")
    assert read_arguments(["--from_run", "runs/b"], 1).run_name == "b-again"


@pytest.mark.parametrize(
    ("flags", "num_processes", "sizes"),
    [
        ("", 1, (4, 3, 12)),
        ("", 3, (4, 1, 12)),
        ("--global_batch_size 24", 1, (4, 6, 24)),
        ("--per_device_train_batch_size 6", 1, (6, 2, 12)),
        ("--gradient_accumulation_steps 1", 1, (12, 1, 12)),
    ],
)
def test_rows_in_a_step_stay_and_are_split_anew(
    flags: str, num_processes: int, sizes: tuple[int, int, int]
) -> None:
    leave_run(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    again = read_arguments(["--from_run", "runs/first", *flags.split()], num_processes)
    assert (
        again.per_device_train_batch_size,
        again.gradient_accumulation_steps,
        again.global_batch_size,
    ) == sizes


def test_a_seed_that_was_drawn_is_that_of_the_checkpoint() -> None:
    leave_run(seed=None)
    assert read_arguments(["--from_run", "runs/first"], 1).seed == 99
    assert read_arguments(["--from_run", "runs/first/checkpoints/last"], 1).seed == 99
    assert read_arguments(["--from_run", "runs/first", "--seed", "null"], 1).seed is None
    Path("runs/first/checkpoints/last/manifest.json").unlink()
    problem = the_problem_of("--from_run", "runs/first")
    assert "runs/first drew its seed, and no checkpoint tells it: give --seed" in problem
    assert read_arguments(["--from_run", "runs/first", "--seed", "1"], 1).seed == 1


@pytest.mark.parametrize(
    ("wish", "phrases"),
    [
        ("nowhere", ["from_run (command line)", "nowhere is no folder", "no run id of MLflow"]),
        (".", ["holds no arguments.json", "output_dir of a run"]),
        ("torn", ["torn/arguments.json cannot be read", "not valid JSON"]),
        ("list", ["list/arguments.json cannot be read"]),
        ("kept", ["run_name was not kept whole"]),
        ("f" * 32, ["/mlflow.db (tracking_uri) is not there"]),
    ],
)
def test_a_run_that_cannot_be_run_again(wish: str, phrases: list[str]) -> None:
    texts = {"torn": "{", "list": "[1]", "kept": '{"run_name": "[redacted]"}'}
    for folder, text in texts.items():
        Path(folder).mkdir()
        write(f"{folder}/arguments.json", text)
    problem = the_problem_of("--from_run", wish)
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


def test_an_argument_that_is_gone_is_told() -> None:
    leave_run()
    path = Path("runs/first/arguments.json")
    path.write_text(path.read_text().replace('"save_steps"', '"save_stebs"'))
    (problem,) = problems_of("--from_run", "runs/first")
    assert problem.startswith("save_stebs (run runs/first): no such argument; did you mean save_s")


def test_which_run_is_run_again_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    leave_run()
    parse_arguments(["--from_run", "runs/first"])
    said = capsys.readouterr().out
    assert said == "Again    runs/first, now as first-again in runs/first-again\n"


# ------------------------------------------------------------------------------------------ MLflow


def leave_mlflow_run(arguments: Arguments, *artifacts: Path) -> str:
    """The same run in MLflow, with parameters as a run notes them."""
    from mlflow import MlflowClient

    from llm_training.tracking.mlflow_store import resolve_store
    from llm_training.tracking.record import simple_value

    client = MlflowClient(resolve_store(None))
    experiment = client.create_experiment("it", artifact_location=str(Path("artifacts").absolute()))
    run_id = str(client.create_run(experiment).info.run_id)
    facts = {"device_name": "NVIDIA H100 80GB HBM3", "backend": "single"}
    for name, value in (describe(arguments) | facts).items():
        client.log_param(run_id, name, str(simple_value(value)))
    for path in artifacts:
        client.log_artifact(run_id, str(path))
    return run_id


def test_a_run_is_found_by_its_mlflow_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = leave_run(config_overrides={"a": 1e-5, "b": "no"}, exclude_files=["é*"], dropout=0.25)
    run_id = leave_mlflow_run(first, Path("runs/first/arguments.json"))
    again = read_arguments(["--from_run", run_id], 1)
    assert but_for_names(again) == but_for_names(first)
    assert again.run_name == "first-again"
    assert again.origins["dropout"] == f"run {run_id}"
    found = read_arguments(["--from_run", run_id, "--tracking_uri", "sqlite:///mlflow.db"], 1)
    assert found.dropout == 0.25
    problem = the_problem_of("--from_run", "0" * 32)
    assert "mlflow.db (tracking_uri) has no such run" in problem


def test_a_run_that_was_killed_is_found_by_its_folder_or_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLflow gets the files of a run at its end."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = leave_run(config_overrides={"a": 1e-5, "b": "no"}, device="cpu", save_steps=None)
    run_id = leave_mlflow_run(first)
    again = but_for_names(read_arguments(["--from_run", run_id], 1))
    assert again == but_for_names(first)
    write("runs/first/mlflow_run_id.txt", f"{run_id}\n")
    assert but_for_names(read_arguments(["--from_run", run_id], 1)) == but_for_names(first)


def test_what_mlflow_says_is_quoted_without_logins() -> None:
    error = RuntimeError("API request to http://me:password@host/api failed\nand more")
    assert reason_of(error) == "API request to http://[redacted]@host/api failed"
