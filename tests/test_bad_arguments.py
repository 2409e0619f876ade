"""Proves that each of many mistakes gives one problem, which says what is wrong and what to do.

Every case of `tests/bad_arguments.py` is one mistake in an otherwise good set: in a JSON file, in
flags, in files of other forms, or between the arguments and the launch. No two cases give the same
problem.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training import argument_parsing, hardware_checks
from llm_training.resolved_arguments import as_settings, as_yaml
from tests.argument_cases import open_clean_place, the_problem_of, write, write_good
from tests.bad_arguments import (
    BAD_DATA,
    BAD_EVALUATIONS,
    BAD_FILES,
    BAD_FLAGS,
    BAD_SETTINGS,
    LOADED,
    TEXTS,
)
from tests.launches import DDP, DDP_FILE, FSDP, FSDP_FILE, NAMES_JSON, STAGE_2, WITH_JSON, launched

# A launch of two processes, what is set beside a good file, and what the one problem must say.
BAD_LAUNCHES: list[tuple[tuple[Any, ...], dict[str, Any], list[str]]] = [
    (
        (DDP, DDP_FILE),
        {"global_batch_size": 9},
        ["global_batch_size=9 is not a multiple of processes=2", "8 or 10"],
    ),
    (
        (DDP, DDP_FILE + "mixed_precision: bf16\n"),
        {"mixed_precision": "fp32"},
        ["mixed_precision=fp32, but launch.yaml says mixed_precision: bf16", "keep one"],
    ),
    (
        (DDP, DDP_FILE + "use_cpu: true\n"),
        {"mixed_precision": "fp16"},
        ["mixed_precision=fp16", "the CPU, which the launcher asks for"],
    ),
    (
        (FSDP, FSDP_FILE),
        {"optim": "adamw_8bit", "device": "cuda"},
        ["optim=adamw_8bit is for whole parameters, and FSDP2 splits them", "ddp.yaml"],
    ),
    (
        (WITH_JSON, NAMES_JSON, "", STAGE_2 | {"gradient_clipping": 0.5}),
        {},
        ["max_grad_norm=1.0, but zero.json says gradient_clipping: 0.5", 'write "auto" there'],
    ),
    (
        (WITH_JSON, NAMES_JSON, "", STAGE_2),
        {"optim": "muon"},
        ["optim=muon does not work under DeepSpeed", "fsdp.yaml"],
    ),
    (
        (DDP | {"WORLD_SIZE": "3"}, DDP_FILE),
        {},
        ["launch.yaml says num_processes: 2", "WORLD_SIZE=3"],
    ),
    (
        (DDP, DDP_FILE),
        {"torch_compile": True, "torch_compile_scope": "model"},
        ["torch_compile_scope=model", "2 processes", "blocks"],
    ),
]


IN_ONE_FILE = BAD_SETTINGS + BAD_DATA + BAD_EVALUATIONS


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)
    monkeypatch.setattr(hardware_checks, "is_installed", lambda package: True)
    Path("short").mkdir()
    write("short/config.json", '{"max_position_embeddings": 32}')


def name_of(part: Any) -> str:
    """Names a case after what is given, not after what the problem must say."""
    return "" if isinstance(part, list) else str(part)[:60]


def missing(phrases: list[str], problem: str) -> list[str]:
    return [phrase for phrase in phrases if phrase not in problem]


@pytest.mark.parametrize(("changes", "phrases"), IN_ONE_FILE, ids=name_of)
def test_one_mistake_in_a_file(changes: dict[str, Any], phrases: list[str]) -> None:
    problem = the_problem_of(write_good(**changes))
    assert missing(phrases, problem) == [], problem


@pytest.mark.parametrize(("flags", "phrases"), BAD_FLAGS, ids=name_of)
def test_one_mistake_in_the_flags(flags: str, phrases: list[str]) -> None:
    problem = the_problem_of(write_good(), *flags.split(" "))
    assert missing(phrases, problem) == [], problem


@pytest.mark.parametrize(("name", "text", "phrases"), BAD_FILES, ids=name_of)
def test_one_mistake_in_another_file(name: str, text: str, phrases: list[str]) -> None:
    problem = the_problem_of(write_good(), write(name, text))
    assert missing(phrases, problem) == [], problem


def problem_of_launch(
    launch: tuple[Any, ...], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> str:
    settings = launched(*launch)
    monkeypatch.setattr(argument_parsing, "read_launch_settings", lambda: settings)
    found = argument_parsing.resolve_arguments([write_good(**changes)])
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


@pytest.mark.parametrize(
    ("launch", "changes", "phrases"), BAD_LAUNCHES, ids=range(len(BAD_LAUNCHES))
)
def test_one_contradiction_with_the_launch(
    launch: tuple[Any, ...],
    changes: dict[str, Any],
    phrases: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = problem_of_launch(launch, changes, monkeypatch)
    assert missing(phrases, problem) == [], problem


def test_no_two_mistakes_are_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [the_problem_of(write_good(**changes)) for changes, _ in IN_ONE_FILE]
    problems += [the_problem_of(write_good(), *flags.split(" ")) for flags, _ in BAD_FLAGS]
    problems += [the_problem_of(write_good(), write(name, text)) for name, text, _ in BAD_FILES]
    problems += [problem_of_launch(*case[:2], monkeypatch) for case in BAD_LAUNCHES]
    assert len(problems) >= 80
    assert sorted(set(problems)) == sorted(problems)


# ------------------------------------------------------------------- what is judged by the machine

# ------------------------------------------------------------------ what only its place makes wrong


@pytest.mark.parametrize(
    ("file", "argv"),
    [
        ({"save_steps": 20, "eval_steps": 20}, ["--max_steps", "10"]),  # a shorter run of a file
        ({"save_steps": 20, "eval_steps": 20}, ["shorter.yaml"]),
        ({"max_steps": 10}, []),  # the defaults are 500
        ({"save_steps": 10, "eval_steps": 10, "max_steps": 10}, []),
        ({"early_stopping_patience": 3, "eval_steps": 5, "max_steps": 16}, []),
        ({"early_stopping_patience": 3, "eval_steps": 5}, ["--max_steps", "10"]),
    ],
    ids=str,
)
def test_intervals_that_no_person_gave_together_with_the_length(
    file: dict[str, Any], argv: list[str]
) -> None:
    write("shorter.yaml", "max_steps: 10")
    arguments = argument_parsing.read_arguments([write_good(**file), *argv])
    # What a run wrote of itself runs again.
    for name, text in (
        ("again.yaml", as_yaml(arguments)),
        ("again.json", json.dumps(as_settings(arguments))),
    ):
        assert argument_parsing.read_arguments([write(name, text)]) == arguments


def test_an_interval_given_over_the_length() -> None:
    path = write_good(max_steps=10)
    assert "save_steps=20 is more" in the_problem_of(path, "--save_steps", "20")


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 64, "config_overrides": {"n_positions": 64}},
        {"block_size": 64, "config_overrides": {"n_positions": -1}},
        {"block_size": 64, "config_overrides": {"n_positions": "64"}},
        {**LOADED, "model_name_or_path": "short", "block_size": 32},
        {**LOADED, "model_name_or_path": "torn", "block_size": 33},
        {**LOADED, "block_size": 100_000},  # of a hub
        {"dry_run": True, "dry_run_steps": 3},
        {"validation_sets": {"a-b_1": TEXTS}, "metric_for_best_model": "eval/a-b_1/loss"},
        {"metric_for_best_model": "eval/some_key", "eval_metrics": ["accuracy"]},
        {"validation_sets": {"a": TEXTS}, "validation_split_percentage": 0, "save_best": True},
        {"train_file": None, "eval_only": True, "validation_sets": {"a": TEXTS}},
        {
            "early_stopping_patience": 2,
            "early_stopping_min_delta": 2,
            "early_stopping_min_delta_unit": "standard_errors",
        },
        {"max_train_hours": 2, "lr_decay_steps": 5, "lr_scheduler_type": "warmup-stable-decay"},
        {"warmup_steps": 80, "max_steps": 100, "lr_scheduler_type": "warmup-stable-decay"},
    ],
    ids=str,
)
def test_what_fits_is_no_problem(changes: dict[str, Any]) -> None:
    Path("torn").mkdir()
    write("torn/config.json", '{"max_position_embeddings": 32')
    assert argument_parsing.read_arguments([write_good(**changes)])
