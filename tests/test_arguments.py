"""Proves that arguments are read as written, completed, and that no mistake in them passes.

Files and flags go through one conversion, so both are held to the same strict types. Single
mistakes of all kinds are in `tests/test_bad_arguments.py`. Nothing slow is imported to find them.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from arguments import (
    GROUPS,
    KINDS,
    Arguments,
    BatchSizes,
    describe,
    holds_conversations,
    mixture_sources,
    resolve_batch_sizes,
)
from llm_training.argument_checks import RANGES, find_problems
from llm_training.argument_parsing import ArgumentProblems, parse_arguments, read_arguments
from llm_training.launch_settings import LaunchSettings
from tests.argument_cases import (
    GOOD,
    open_clean_place,
    problems_of,
    run_python,
    the_problem_of,
    write,
    write_good,
)
from tests.bad_arguments import LOADED

GOOD_VALUES: dict[str, Any] = {  # the same as the dataclass holds it
    **GOOD,
    "train_file": [sysconfig.get_path("stdlib")],
    "report_to": ["none"],
}


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------- one mistake


@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 10, "ghp_" + "x1Y" * 12, "a://me:hunter2@b"])
def test_a_secret_is_refused_and_not_repeated(secret: str) -> None:
    problem = the_problem_of(write_good(experiment_name=f"try {secret}"))
    assert "experiment_name holds" in problem
    assert secret not in problem
    read_arguments([write_good(experiment_name="sk-learn hf_models at a://b:80/c@d")])


def test_batch_sizes_are_checked_against_the_processes() -> None:
    problem = the_problem_of(write_good(global_batch_size=8), num_processes=3)
    assert problem == (
        "global_batch_size=8 is not a multiple of processes=3 = 3: set it to 6 or 9"
        " (global_batch_size: good.json line 1)"
    )


@pytest.mark.parametrize(
    "spec",
    [None, importlib.machinery.ModuleSpec("wandb", loader=None)],
    ids=["absent", "only a folder of that name"],
)
def test_a_tracker_that_is_not_installed(
    spec: importlib.machinery.ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    problem = find_problems(Arguments(**{**GOOD_VALUES, "report_to": ["wandb"]}), LaunchSettings())
    assert problem == ["report_to=wandb is not installed: pip install wandb, or report_to=none"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_optimizer_that_is_not_installed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Arguments(**{**GOOD_VALUES, "optim": "adamw_8bit", "device": device})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_problems(asked, LaunchSettings()) == [
        "optim=adamw_8bit needs a package: pip install bitsandbytes, or use optim=adamw"
    ]
    found = importlib.machinery.ModuleSpec("bitsandbytes", loader=None, origin="here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert find_problems(asked, LaunchSettings()) == []


def test_a_source_of_a_mixture_has_arguments_of_its_own() -> None:
    code = {"train_file": "${PYTHON_STDLIB}", "weight": 3}
    mixture = {"code": code, "chat": {"train_file": ["."], "messages_column": "turns"}}
    path = write_good(train_file=None, train_mixture=mixture, tokenizer_name="gpt2")
    arguments = read_arguments([path], 1)
    assert arguments.train_mixture["chat"]["weight"] == 1.0
    sources = mixture_sources(arguments)
    assert sources["code"].train_file == [sysconfig.get_path("stdlib")]
    assert [holds_conversations(own) for own in sources.values()] == [False, True]
    assert sources["chat"].tokenizer_name == "gpt2"
    assert not sources["chat"].train_mixture


def test_rows_of_documents_cannot_be_split_over_ranks() -> None:
    arguments = Arguments(**GOOD_VALUES, document_mask=True)
    launch = LaunchSettings(num_processes=2, cp_size=2)
    problems = [p for p in find_problems(arguments, launch) if "document_mask" in p]
    assert len(problems) == 1 and "cp_size=2 splits rows over ranks" in problems[0]


# --------------------------------------------------------------------------------- many mistakes


def test_all_problems_stand_in_one_report() -> None:
    path = write_good(learning_rate="3e-4", sede=1, warmup_steps=20, max_steps=10)
    with pytest.raises(ArgumentProblems) as caught:
        read_arguments([path, "missing.json", "--weight_decay", "-1", "--device", "tpu"])
    starts = [
        "argument file missing.json",
        "sede (good.json line 1)",
        "learning_rate (good.json line 1)",
        "device (command line)",
        "weight_decay=-1.0",
        "warmup_steps=20",
    ]
    problems = caught.value.problems
    assert len(problems) == len(starts)
    assert all(map(str.startswith, problems, starts)), problems
    assert str(caught.value).startswith("6 problems with the arguments:\n  - argument file")
    assert "warmup_steps: good.json line 1, max_steps: good.json" in problems[-1]


def test_no_problem_follows_from_another() -> None:
    """A misspelled name or a bad value is told once, not also as "nothing given"."""
    good = {key: value for key, value in GOOD.items() if key not in ("train_file", "model_type")}
    path = write("typos.json", json.dumps({**good, "train_files": "x", "model_type": 5}))
    first, second = problems_of(path)
    assert first.startswith("train_files (typos.json line 1): no such argument")
    assert second.startswith("model_type (typos.json line 1): takes text|null, not 5")


def test_a_path_is_not_taken_for_an_argument() -> None:
    """What is wrong in a file says nothing of the arguments that its name happens to spell."""
    path = write_good("seed.logging_steps", nonsense=1)
    problems = problems_of(path, "--seed", "-1", "--logging_steps", "0")
    assert problems[0].startswith("nonsense (seed.logging_steps line 1): no such argument")
    assert [text.split("=")[0] for text in problems[1:]] == ["logging_steps", "seed"]


def test_find_problems_judges_nothing_by_a_value_out_of_range() -> None:
    arguments = Arguments(**{**GOOD_VALUES, "max_steps": -5, "warmup_steps": 3})
    assert find_problems(arguments, LaunchSettings()) == [
        "max_steps=-5 is out of range: it must be 1 or more, or null"
    ]


# ----------------------------------------------------------------------------------- good values


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--learning_rate 1e-3", "learning_rate", 0.001),
        ("--learning_rate=.5", "learning_rate", 0.5),
        ("--learning-rate 2", "learning_rate", 2.0),
        ("--max-grad-norm none", "max_grad_norm", None),
        ("--save_steps null", "save_steps", None),
        ("--seed +7", "seed", 7),
        ("--save_best", "save_best", True),
        ("--save_best true", "save_best", True),
        ("--save_best=False", "save_best", False),
        ("--no_save_best", "save_best", False),
        ("--no-save-best", "save_best", False),
        ("--run_name 5", "run_name", "5"),
        ("--resume_from_checkpoint none", "resume_from_checkpoint", "none"),
        ("--report_to none", "report_to", ["none"]),
        ("--eval_metrics null", "eval_metrics", []),
        ("--exclude_files *.pyc */test/*", "exclude_files", ["*.pyc", "*/test/*"]),
        ("--run_name=--x", "run_name", "--x"),
        ("--run_name -x", "run_name", "-x"),
        ("--cache_dir ${WHERE}/$x$", "cache_dir", "somewhere/$x$"),
        ("--output_dir ~/${WHERE}", "output_dir", "house/somewhere"),
        ("--sample_prompt a~/", "sample_prompt", ["a~/"]),
        ("--sample_prompt=--x", "sample_prompt", ["--x"]),
        ("--learning_rate ${RATE}", "learning_rate", 0.25),
        ('--config_overrides {"n_layer":6}', "config_overrides", {"n_layer": 6}),
        (
            "--config_overrides a=6,b=1e-3,c=true,d=null,e=gelu,f=-1,g=x=y",
            "config_overrides",
            {"a": 6, "b": 0.001, "c": True, "d": None, "e": "gelu", "f": -1, "g": "x=y"},
        ),
    ],
)
def test_a_flag_is_read(flags: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "somewhere")
    monkeypatch.setenv("RATE", "0.25")
    monkeypatch.setenv("HOME", "house")
    found = getattr(read_arguments([write_good(), *flags.split(" ")]), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "changes",
    [
        {"train_file": None, "validation_file": "${PYTHON_STDLIB}", "eval_only": True},
        {"train_file": ["*.bin"], "tokenizer_name": None},
        {**LOADED, "tokenizer_name": None, "dropout": 0.1},
        {"train_file": None, "dataset_name": "org/name"},
        {"warmup_steps": 9, "max_steps": 10},
        {"lr_scheduler_type": "constant", "warmup_steps": 9, "max_steps": 10},
        {"validation_split_percentage": 0},
        {"train_file": "not_there_yet_*.txt"},
        {"resume_from_checkpoint": ".", "output_dir": "."},
        {"eval_only": True, "eval_steps": None},
        {"reset_optimizer": True},
    ],
    ids=str,
)
def test_what_is_allowed_is_no_problem(changes: dict[str, Any]) -> None:
    assert read_arguments([write_good(**changes)])


@pytest.mark.parametrize(
    ("argv", "run_name", "output_dir"),
    [
        (["good.json"], "good", "runs/good"),
        (["good.json", "--output_dir", "a/b"], "good", "a/b"),
        (["good.json", "--run_name", "mine"], "mine", "runs/mine"),
        (["good.json", "other.json"], "other", "runs/other"),
        ([], "run", "runs/run"),
        (["--output_dir", "a/b/"], "b", "a/b/"),
    ],
)
def test_run_name_and_output_dir_are_always_set(
    argv: list[str], run_name: str, output_dir: str
) -> None:
    write_good()
    write("other.json", "{}")
    flags = [f"--{name}={value}" for name, value in GOOD.items() if "good.json" not in argv]
    arguments = read_arguments([*argv, *flags])
    assert (arguments.run_name, arguments.output_dir) == (run_name, output_dir)


def test_the_working_folder_as_output_dir_names_the_run() -> None:
    flags = [f"--{name}={value}" for name, value in GOOD.items()]
    assert read_arguments([*flags, "--output_dir", "."]).run_name == Path.cwd().name


# ----------------------------------------------------------------------------------- batch sizes


@pytest.mark.parametrize(
    ("per_device", "accumulation", "total", "processes", "expected"),
    [
        (None, None, None, 1, (8, 1, 8)),
        (None, None, None, 3, (8, 1, 24)),
        (4, None, None, 2, (4, 1, 8)),
        (None, 4, None, 2, (8, 4, 64)),
        (4, 3, None, 2, (4, 3, 24)),
        (None, None, 32, 1, (8, 4, 32)),
        (None, None, 36, 2, (6, 3, 36)),
        (None, None, 13, 1, (1, 13, 13)),
        (None, None, 4, 4, (1, 1, 4)),
        (16, None, 64, 2, (16, 2, 64)),
        (None, 2, 64, 2, (16, 2, 64)),
        (4, 2, 16, 2, (4, 2, 16)),
    ],
)
def test_missing_batch_sizes_are_derived(
    per_device: int | None,
    accumulation: int | None,
    total: int | None,
    processes: int,
    expected: tuple[int, int, int],
) -> None:
    given = write_good(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        global_batch_size=total,
    )
    arguments = read_arguments([given], processes)
    assert (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.global_batch_size,
    ) == expected
    sizes = BatchSizes(expected[0], expected[1], processes, expected[2])
    assert resolve_batch_sizes(arguments, processes) == sizes


def test_the_number_of_processes_is_that_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert read_arguments([write_good()]).global_batch_size == 24


def test_contradicting_batch_sizes_are_not_resolved() -> None:
    arguments = Arguments(per_device_train_batch_size=4, global_batch_size=6)
    with pytest.raises(ValueError, match="is not a multiple of"):
        resolve_batch_sizes(arguments, 1)


# --------------------------------------------------------------------------- the entry, the texts


def test_a_mistake_ends_with_code_2_and_without_a_traceback() -> None:
    ended = run_python(
        "from llm_training.argument_parsing import parse_arguments\n"
        "parse_arguments(['--max_stebs', '5', '--seed', 'x'])"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("4 problems with the arguments:\n")
    assert "did you mean max_steps" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_arguments_at_all_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert "train_configs/quickstart.json --learning_rate 1e-3" in shown.err
    assert "--help" in shown.err


@pytest.mark.parametrize("argv", [["--help"], [], ["--seed", "x"]])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_only_rank_0_talks(
    argv: list[str],
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank, talks in (("0", True), ("1", False)):
        monkeypatch.setenv(name, rank)
        with pytest.raises(SystemExit):
            parse_arguments(argv)
        assert any(capsys.readouterr()) is talks


def test_good_arguments_are_returned() -> None:
    assert parse_arguments([write_good(), "--seed", "5"]) == read_arguments(
        ["good.json", "--seed=5"]
    )


# --------------------------------------------------------------------------------- the dataclasses


def test_plain_hf_argument_parser_takes_the_groups() -> None:
    parser = HfArgumentParser(GROUPS)
    parser.format_help()  # a lone % in a help text would end here
    groups = parser.parse_args_into_dataclasses(["--seed", "3"], look_for_args_file=False)
    merged = {name: value for group in groups for name, value in vars(group).items()}
    assert merged == {**describe(Arguments()), "seed": 3}


def test_groups_hold_every_argument_once_and_in_order() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert names == list(KINDS)


def test_every_number_has_exactly_one_range() -> None:
    ranged = [name for _, _, names in RANGES for name in names.split()]
    numbers = [name for name, kind in KINDS.items() if kind.type in (int, float)]
    assert sorted(ranged) == sorted(numbers)


def test_lists_and_dicts_are_not_shared() -> None:
    Arguments().train_file.append("x")
    assert Arguments().train_file == []
