"""Proves that arguments are read as written, completed, and that no mistake in them passes.

Files and flags go through one conversion, so both are held to the same strict types. Every case of
`BAD_SETTINGS` and `BAD_FLAGS` is one mistake in an otherwise good set and must give exactly one
problem, which names the argument and what to do. Nothing slow is imported to find it.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
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
from llm_training.argument_parsing import (
    ArgumentProblems,
    argument_table,
    help_text,
    parse_arguments,
    read_arguments,
)
from llm_training.launch_settings import LaunchSettings

ROOT = Path(__file__).parents[1]
GOOD = {
    "model_type": "gpt2",
    "tokenizer_name": "byte",
    "train_file": "${PYTHON_STDLIB}",
    "report_to": "none",
}
GOOD_VALUES: dict[str, Any] = {  # the same as the dataclass holds it
    **GOOD,
    "train_file": [sysconfig.get_path("stdlib")],
    "report_to": ["none"],
}
LOADED = {"model_type": None, "model_name_or_path": "gpt2"}  # a loaded model in place of a new one
FLAG = "(command line)"


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and an environment that says nothing about processes."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NOT_SET"):
        monkeypatch.delenv(name, raising=False)


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def write_good(name: str = "good.json", **changes: Any) -> str:
    return write(name, json.dumps({**GOOD, **changes}))


def name_of(part: Any) -> str:
    """Names a case after what is given, not after what the problem must say."""
    return "" if isinstance(part, list) else str(part)[:60]


def problems_of(*argv: str, num_processes: int = 1) -> list[str]:
    with pytest.raises(ArgumentProblems) as caught:
        read_arguments(argv, num_processes)
    return caught.value.problems


def the_problem_of(*argv: str, num_processes: int = 1) -> str:
    problems = problems_of(*argv, num_processes=num_processes)
    assert len(problems) == 1, problems
    return problems[0]


# ---------------------------------------------------------------------------------- one mistake

PRODUCT_OF_8 = "per_device_train_batch_size=4 x gradient_accumulation_steps=2 x processes=1 = 8"

CODE = {"train_file": "${PYTHON_STDLIB}", "weight": 3}
CHAT = {"tokenizer_name": "gpt2", "messages_column": "messages"}

# Mistakes in what the data is, on top of a good file.
BAD_DATA: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"train_mixture": {"code": CODE}},
        ["train_mixture and train_file", "exclude each other", "drop the first"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": 3}},
        ["train_mixture (good.json)", 'code takes an object like {"train_file"', "not 3"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"train_files": "x"}}},
        ["code cannot set train_files", "did you mean train_file?"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"block_size": 8}}},
        ["code cannot set block_size"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"weight": "3"}}},
        ["code, weight takes number", "without quotes"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": {"weight": 1}}},
        ["train_mixture, source code: no data", "train_file"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": {"train_file": "nowhere"}}},
        ["train_file=nowhere does not exist"],
    ),
    ({"dataset_revision": "main"}, ["dataset_revision", "no effect without dataset_name"]),
    ({"dataset_split": "test"}, ["dataset_split", "no effect without dataset_name"]),
    ({"prompt_column": "question"} | CHAT | {"messages_column": None}, ["needs completion_column"]),
    ({"completion_column": "a"} | CHAT | {"messages_column": None}, ["needs prompt_column"]),
    (
        CHAT | {"prompt_column": "a", "completion_column": "b"},
        ["messages_column=messages and prompt_column=a exclude each other"],
    ),
    (CHAT | {"tokenizer_name": "bpe"}, ["tokenizer_name=bpe", "no chat template"]),
    ({"chat_template": "{{ messages }}"}, ["chat_template", "no effect on text"]),
    ({"special_tokens": ["<a>"], "tokenizer_name": "gpt2"}, ["special_tokens", "made here"]),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
            "max_rewinds": 1,
        },
        ["max_rewinds=1 with streaming=true", "a stream cannot go back"],
    ),
    ({"shuffle_buffer_size": 7}, ["shuffle_buffer_size=7", "no effect without streaming"]),
    (
        {"train_file": None, "dataset_name": "a/b", "streaming": True, "eval_steps": None},
        ["streaming=true needs max_steps"],
    ),
    ({"streaming": True, "max_steps": 9}, ["streaming=true", "no effect without dataset_name"]),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
        }
        | {"tokenizer_name": "bpe"},
        ["tokenizer_name=bpe", "streaming=true never holds"],
    ),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
        }
        | {"drop_duplicates": True},
        ["drop_duplicates=true and streaming=true exclude each other"],
    ),
    (
        {"train_file": None, "dataset_name": "a/b", "streaming": True, "max_steps": 9},
        ["eval_steps with streaming=true needs eval_max_batches"],
    ),
    ({"min_document_characters": -1}, ["min_document_characters=-1", "0 or more"]),
    ({"packing": "best"}, ["packing", "stream|best_fit"]),
    ({"allow_resume_change": ["model"]}, ["allow_resume_change", "data|block_size"]),
]

# Changes to a good file, and what the one problem must say.
BAD_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    # names
    ({"learnig_rate": 0.1}, ["learnig_rate (good.json)", "did you mean learning_rate"]),
    ({"learning-rate": 0.1}, ["learning-rate (good.json)", "did you mean learning_rate"]),
    ({"#comment": "x"}, ["#comment (good.json)", "no such argument", "--help"]),
    # types
    ({"learning_rate": "3e-4"}, ["learning_rate (good.json)", '"3e-4"', "without quotes"]),
    ({"learning_rate": True}, ["learning_rate", "takes number, not true"]),
    ({"learning_rate": None}, ["learning_rate", "takes number, not null"]),
    ({"learning_rate": float("nan")}, ["learning_rate", "not NaN"]),
    ({"learning_rate": float("inf")}, ["learning_rate", "not Infinity"]),
    ({"learning_rate": 10**400}, ["learning_rate", "takes number, not 1000"]),
    ({"learning_rate": [0.1]}, ["learning_rate", "takes number, not [0.1]"]),
    ({"max_steps": 100.0}, ["max_steps", "takes integer|null, not 100.0", "write 100"]),
    ({"max_steps": 1.5}, ["max_steps", "takes integer|null, not 1.5"]),
    ({"max_steps": True}, ["max_steps", "takes integer|null, not true"]),
    ({"max_steps": "100"}, ["max_steps", "without quotes"]),
    ({"warmup_steps": None}, ["warmup_steps", "takes integer, not null"]),
    ({"save_best": 1}, ["save_best", "takes true|false, not 1"]),
    ({"save_best": "true"}, ["save_best", "takes true|false", "without quotes"]),
    ({"run_name": 7}, ["run_name", "takes text|null, not 7", "in quotes"]),
    ({"run_name": ""}, ["run_name", 'not ""', "leave the argument out"]),
    ({"train_file": 7}, ["train_file", "takes text ..., not 7"]),
    ({"train_file": ["${PYTHON_STDLIB}", 7]}, ["train_file", "not 7"]),
    ({"train_file": [""]}, ["train_file", 'not ""']),
    ({"config_overrides": [1]}, ["config_overrides", "object", "[1]"]),
    ({"config_overrides": {"n_layer": float("nan")}}, ["config_overrides", "NaN"]),
    # choices
    ({"lr_scheduler_type": "cosin"}, ["linear|cosine|constant", "did you mean cosine?"]),
    ({"device": "tpu"}, ["device", "auto|cpu|cuda|mps", '"tpu"']),
    ({"report_to": ["mlflow", "tensorbord"]}, ["report_to", "did you mean tensorboard?"]),
    ({"eval_metrics": ["bleu"]}, ["eval_metrics", "token_accuracy", '"bleu"']),
    # the environment
    ({"cache_dir": "${NOT_SET}/x"}, ["cache_dir", "${NOT_SET}/x", "set NOT_SET"]),
    # ranges
    ({"learning_rate": 0}, ["learning_rate=0.0", "more than 0", "(learning_rate: good.json)"]),
    ({"min_lr_ratio": 1.1}, ["min_lr_ratio=1.1", "from 0 to 1"]),
    ({"dropout": 1}, ["dropout=1.0", "less than 1, or null"]),
    ({"adam_beta1": 1.0}, ["adam_beta1=1.0", "less than 1"]),
    ({"adam_beta2": -0.1}, ["adam_beta2=-0.1", "at least 0"]),
    ({"adam_epsilon": 0}, ["adam_epsilon=0.0", "more than 0"]),
    ({"weight_decay": -0.1}, ["weight_decay=-0.1", "0 or more"]),
    ({"max_grad_norm": 0}, ["max_grad_norm=0.0", "more than 0, or null"]),
    ({"max_steps": 0}, ["max_steps=0", "1 or more, or null"]),
    ({"num_train_epochs": 0}, ["num_train_epochs=0.0", "more than 0"]),
    ({"block_size": 1}, ["block_size=1", "2 or more, or null"]),
    ({"vocab_size": 256}, ["vocab_size=256", "257 or more"]),
    ({"validation_split_percentage": 51}, ["validation_split_percentage=51.0", "from 0 to 50"]),
    ({"seed": 2**32}, ["seed=4294967296", "from 0 to 4294967295"]),
    ({"logging_steps": 0}, ["logging_steps=0", "1 or more"]),
    ({"ddp_timeout": 0}, ["ddp_timeout=0", "1 or more"]),
    # model, data and tokenizer
    ({"model_type": None}, ["no model", "model_name_or_path", "model_type"]),
    ({"model_name_or_path": "gpt2"}, ["model_name_or_path=gpt2 and model_type=gpt2", "exclude"]),
    ({**LOADED, "config_overrides": {"n_layer": 2}}, ["config_overrides", "exclude each other"]),
    ({"train_file": []}, ["no data", "train_file", "dataset_name"]),
    ({"train_file": [], "eval_only": True}, ["no data for eval_only", "validation_file"]),
    ({"dataset_name": "wikitext"}, ["train_file", "dataset_name=wikitext", "keep one"]),
    ({"tokenizer_name": None}, ["model_type=gpt2", "tokenizer_name", "char, byte or bpe"]),
    # paths
    ({"train_file": ["missing.txt"]}, ["train_file=missing.txt does not exist", "correct"]),
    ({"validation_file": "no/such/file.txt"}, ["validation_file=no/such/file.txt", "not exist"]),
    ({"train_file": "~/no such text"}, ["/no such text does not exist"]),
    (
        {**LOADED, "model_name_or_path": "./nowhere"},
        ["model_name_or_path=./nowhere does not exist"],
    ),
    ({"tokenizer_name": "a/b/c"}, ["tokenizer_name=a/b/c does not exist"]),
    ({"resume_from_checkpoint": "nowhere"}, ["resume_from_checkpoint=nowhere is no folder"]),
    (
        {"reset_optimizer": True, "resume_from_checkpoint": "none"},
        ["reset_optimizer=true and resume_from_checkpoint=none exclude each other", "drop"],
    ),
    ({"output_dir": "good.json"}, ["output_dir=good.json is a file"]),
    ({"cache_dir": "good.json"}, ["cache_dir=good.json is a file"]),
    ({"run_name": "a/b"}, ["run_name", "a/b", "no slash"]),
    ({"run_name": ".."}, ["run_name", "cannot name a folder"]),
    # batch sizes, for one process
    (
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "global_batch_size": 16,
        },
        ["global_batch_size=16", PRODUCT_OF_8, "set it to 8", "leave one of the three out"],
    ),
    (
        {"per_device_train_batch_size": 4, "global_batch_size": 10},
        ["global_batch_size=10 is not a multiple of per_device_train_batch_size=4", "8 or 12"],
    ),
    ({"gradient_accumulation_steps": 8, "global_batch_size": 4}, ["global_batch_size=4", "to 8"]),
    ({"gradient_accumulation_steps": 0, "global_batch_size": 4}, ["=0", "1 or more"]),
    # steps
    ({"warmup_steps": 11, "max_steps": 10}, ["warmup_steps=11 is more than max_steps=10"]),
    (
        {"warmup_steps": 6, "lr_decay_steps": 5, "max_steps": 10},
        ["warmup_steps=6 + lr_decay_steps=5 = 11 is more than max_steps=10"],
    ),
    (
        {"lr_decay_steps": 11, "max_steps": 10, "lr_scheduler_type": "warmup-stable-decay"},
        ["lr_decay_steps=11", "more than max_steps=10"],
    ),
    # health
    ({"max_skipped_steps": -1}, ["max_skipped_steps=-1", "0 or more"]),
    ({"skip_spikes": 0}, ["skip_spikes=0.0", "more than 0, or null"]),
    (
        {"max_rewinds": 1, "save_steps": None},
        ["max_rewinds=1 needs a checkpoint", "set save_steps"],
    ),
    ({"save_before_timeout": 0}, ["save_before_timeout=0.0", "more than 0, or null"]),
    ({"verify_resume": 1}, ["verify_resume=1", "2 or more, or null"]),
    # evaluation
    ({"save_best": True, "eval_steps": None}, ["save_best=true", "set eval_steps"]),
    (
        {"early_stopping_patience": 3, "eval_steps": None},
        ["early_stopping_patience=3", "set eval_steps"],
    ),
    (
        {"early_stopping_patience": 3, "validation_split_percentage": 0},
        ["early_stopping_patience=3 needs validation data", "validation_file"],
    ),
    ({"save_best": True, "validation_split_percentage": 0}, ["save_best", "validation data"]),
    ({"eval_only": True, "validation_split_percentage": 0}, ["eval_only", "validation data"]),
    # secrets
    (
        {"tracking_uri": "https://me:pw@host/x"},
        ["tracking_uri holds a login", "MLFLOW_TRACKING_PASSWORD"],
    ),
    (
        {"config_overrides": {"a": ["hf_" + "aB3" * 10]}},
        ["config_overrides holds what looks like a key or token", "HF_TOKEN"],
    ),
    # the machine
    ({"mixed_precision": "fp16", "device": "cpu"}, ["fp16", "device=cpu", "bf16, fp32 or auto"]),
    (
        {"optim": "adamw_8bit", "device": "cpu"},
        ["optim=adamw_8bit and device=cpu exclude each other", "use optim=adamw"],
    ),
    ({"optim": "adam"}, ["optim", "adamw|muon|adamw_8bit", "did you mean adamw?"]),
    ({"report_to": ["none", "mlflow"]}, ["report_to", "none alone"]),
    ({"report_to": ["mlflow", "mlflow"]}, ["report_to", "once"]),
]

# Flags after a good file, and what the one problem must say.
BAD_FLAGS: list[tuple[str, list[str]]] = [
    ("--learnig_rate 1e-3", [f"learnig_rate {FLAG}", "did you mean learning_rate"]),
    ("--no_seed", ["no_seed", "no such argument"]),
    ("--seed 1 --seed 2", [f"seed {FLAG}", "given twice"]),
    ("--save_best --no_save_best", ["save_best", "given twice"]),
    ("--seed", [f"seed {FLAG}", "no value", "--seed VALUE"]),
    ("--seed 1 other.json", ["seed", "takes one value, not 2", "other.json"]),
    ("--save_best yes", ["save_best", 'takes true|false, not "yes"']),
    ("--no_save_best true", ["save_best", "takes one value"]),
    ("--max_steps 1e3", ["max_steps", "takes integer|null, not 1000.0", "write 1000"]),
    ("--max_steps 100.0", ["max_steps", "write 100"]),
    ("--max_steps 1_000", ["max_steps", '"1_000"']),
    ("--max_steps " + "9" * 5000, ["max_steps", "takes integer|null"]),
    ("--max_steps true", ["max_steps", "takes integer|null, not true"]),
    ("--warmup_steps null", ["warmup_steps", "takes integer, not null"]),
    ("--learning_rate fast", ["learning_rate", 'takes number, not "fast"']),
    ("--learning_rate nan", ["learning_rate", '"nan"']),
    ("--learning_rate 1e999", ["learning_rate", "Infinity"]),
    ("--learning_rate=", ["learning_rate", 'not ""']),
    ("--weight_decay -1", ["weight_decay=-1.0", "0 or more", "weight_decay: command line"]),
    ("--weight-decay=-1", ["weight_decay=-1.0", "0 or more"]),
    ("--seed ${NOT_SET}", ["seed", "set NOT_SET"]),
    ("--config_overrides n_layer", ["config_overrides", '"n_layer"', "n_layer=6,n_embd=384"]),
    ("--config_overrides n_layer=6,", ["config_overrides", "n_layer=6,n_embd=384"]),
    ("--config_overrides n_layer=6,n_layer=7", ["config_overrides", "n_layer stands twice"]),
    ("--config_overrides {n_layer:6}", ["config_overrides", "not valid JSON", "column 2"]),
    ('--config_overrides {"a":1,"a":2}', ["config_overrides", "a stands twice"]),
    ("--report_to none mlflow", ["report_to", "none alone"]),
]


@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 10, "ghp_" + "x1Y" * 12, "a://me:hunter2@b"])
def test_a_secret_is_refused_and_not_repeated(secret: str) -> None:
    problem = the_problem_of(write_good(experiment_name=f"try {secret}"))
    assert "experiment_name holds" in problem
    assert secret not in problem
    read_arguments([write_good(experiment_name="sk-learn hf_models at a://b:80/c@d")])


@pytest.mark.parametrize(("changes", "phrases"), BAD_SETTINGS + BAD_DATA, ids=name_of)
def test_one_mistake_in_a_file(changes: dict[str, Any], phrases: list[str]) -> None:
    problem = the_problem_of(write_good(**changes))
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


@pytest.mark.parametrize(("flags", "phrases"), BAD_FLAGS, ids=name_of)
def test_one_mistake_in_the_flags(flags: str, phrases: list[str]) -> None:
    problem = the_problem_of(write_good(), *flags.split(" "))
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        (b'{"seed": 1,}', ["not valid JSON", "double quotes", "line 1 column 12"]),
        (b'{\n "seed": 1\n "device": "cpu"\n}', ["',' delimiter", "line 3 column 2"]),
        (b"", ["not valid JSON", "line 1 column 1"]),
        (b"seed: 1", ["not valid JSON", "line 1 column 1"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b'["seed"]', ['holds ["seed"], not one object']),
        (b'{"run_name": "\xff"}', ["not UTF-8 text", "0xff", "position 14"]),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes, phrases: list[str]) -> None:
    problem = the_problem_of(write("bad.json", content))
    assert problem.startswith("argument file bad.json: ")
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


def test_a_file_that_is_not_there() -> None:
    Path("folder.json").mkdir()
    missing, folder = problems_of("missing.json", "folder.json")
    assert missing.startswith("argument file missing.json: No such file or directory")
    assert folder.startswith("argument file folder.json: Is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission() -> None:
    Path(write_good()).chmod(0)
    assert "Permission denied" in the_problem_of("good.json")


def test_keys_that_stand_twice() -> None:
    text = json.dumps(GOOD)[:-1] + ', "seed": 1, "seed": 2, "config_overrides": {"a": 1, "a": 1}}'
    inner, outer = problems_of(write("twice.json", text))
    assert inner == "a (twice.json): the key stands twice; keep one"
    assert outer == "seed (twice.json): the key stands twice; keep one"


def test_batch_sizes_are_checked_against_the_processes() -> None:
    problem = the_problem_of(write_good(global_batch_size=8), num_processes=3)
    assert problem == (
        "global_batch_size=8 is not a multiple of processes=3 = 3: set it to 6 or 9"
        " (global_batch_size: good.json)"
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
    mixture = {"code": CODE, "chat": {"train_file": ["."], "messages_column": "turns"}}
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
        "sede (good.json)",
        "learning_rate (good.json)",
        "device (command line)",
        "weight_decay=-1.0",
        "warmup_steps=20",
    ]
    problems = caught.value.problems
    assert len(problems) == len(starts)
    assert all(map(str.startswith, problems, starts)), problems
    assert str(caught.value).startswith("6 problems with the arguments:\n  - argument file")
    assert "warmup_steps: good.json, max_steps: good.json" in problems[-1]


def test_no_problem_follows_from_another() -> None:
    """A misspelled name or a bad value is told once, not also as "nothing given"."""
    good = {key: value for key, value in GOOD.items() if key not in ("train_file", "model_type")}
    path = write("typos.json", json.dumps({**good, "train_files": "x", "model_type": 5}))
    first, second = problems_of(path)
    assert first.startswith("train_files (typos.json): no such argument")
    assert second.startswith("model_type (typos.json): takes text|null, not 5")


def test_a_path_is_not_taken_for_an_argument() -> None:
    """What is wrong in a file says nothing of the arguments that its name happens to spell."""
    path = write_good("seed.logging_steps", nonsense=1)
    problems = problems_of(path, "--seed", "-1", "--logging_steps", "0")
    assert problems[0].startswith("nonsense (seed.logging_steps): no such argument")
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
        ("--sample_prompt=--x", "sample_prompt", "--x"),
        ("--sample_prompt -x", "sample_prompt", "-x"),
        ("--cache_dir ${WHERE}/$x$", "cache_dir", "somewhere/$x$"),
        ("--output_dir ~/${WHERE}", "output_dir", "house/somewhere"),
        ("--sample_prompt a~/", "sample_prompt", "a~/"),
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
    ("name", "given", "value"),
    [
        ("weight_decay", 0, 0.0),
        ("dropout", None, None),
        ("eval_metrics", "token_accuracy", ["token_accuracy"]),
        ("validation_file", None, []),
        ("config_overrides", {"act": "${WHERE}", "n": [1]}, {"act": "somewhere", "n": [1]}),
        ("train_file", "${PYTHON_STDLIB}/*.py", [sysconfig.get_path("stdlib") + "/*.py"]),
        ("experiment_name", "costs $5", "costs $5"),
    ],
)
def test_a_file_is_read(name: str, given: Any, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "somewhere")
    found = getattr(read_arguments([write_good(**{name: given})]), name)
    assert (found, type(found)) == (value, type(value))


def test_a_byte_order_mark_is_no_mistake() -> None:
    path = write("marked.json", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_arguments([path]).model_type == "gpt2"


def test_later_files_win_and_flags_win_over_files() -> None:
    first = write_good("first.json", seed=1, max_steps=1, save_steps=1)
    second = write("second.json", '{"max_steps": 2, "save_steps": 2}')
    arguments = read_arguments([first, second, "--save_steps", "3"])
    assert (arguments.seed, arguments.max_steps, arguments.save_steps) == (1, 2, 3)
    assert arguments.logging_steps == Arguments().logging_steps


@pytest.mark.parametrize(
    "changes",
    [
        {"train_file": None, "validation_file": "${PYTHON_STDLIB}", "eval_only": True},
        {"train_file": ["*.bin"], "tokenizer_name": None},
        {**LOADED, "tokenizer_name": None, "dropout": 0.1},
        {"train_file": None, "dataset_name": "org/name"},
        {"warmup_steps": 10, "max_steps": 10},
        {"lr_scheduler_type": "constant", "warmup_steps": 10, "max_steps": 10},
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


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_mistake_ends_with_code_2_and_without_a_traceback() -> None:
    ended = run_python(
        "from llm_training.argument_parsing import parse_arguments\n"
        "parse_arguments(['--max_stebs', '5', '--seed', 'x'])"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("4 problems with the arguments:\n")
    assert "did you mean max_steps" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_and_mistakes_import_nothing_slow() -> None:
    ended = run_python(
        "from llm_training.argument_parsing import parse_arguments\n"
        "for words in (['--help'], ['--seed', 'x']):\n"
        "    try: parse_arguments(words)\n"
        "    except SystemExit as end: print('code', end.code)\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "print('slow', sorted(tops & {'torch', 'transformers', 'numpy', 'yaml'}))\n"
    )
    assert ended.stdout.startswith("usage: python train_llm.py")
    assert ended.stdout.endswith("code 0\ncode 2\nslow []\n"), ended.stderr


def test_no_arguments_at_all_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert "train_configs/quickstart.json --learning_rate 1e-3" in shown.err
    assert "--help" in shown.err


@pytest.mark.parametrize("argv", [["-h"], ["good.json", "--seed", "x", "--help"]])
def test_help_goes_before_everything(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(argv)
    assert (ended.value.code, capsys.readouterr()) == (0, (help_text(), ""))


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


def test_help_shows_every_argument_and_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    wide = help_text()
    for name, kind in KINDS.items():
        assert f"--{name} {kind.form}" in wide
    assert (
        wide.index("\noptimization:") < wide.index("--learning_rate number") < wide.index("\nrun:")
    )
    assert '(default: ["mlflow"])' in " ".join(wide.split())
    assert max(map(len, wide.splitlines())) <= 120
    monkeypatch.setenv("COLUMNS", "70")
    assert len(help_text().splitlines()) > len(wide.splitlines())


def test_the_table_has_a_row_for_each_argument() -> None:
    rows = [line for line in argument_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KINDS)
    assert all(row.replace(r"\|", "").count("|") == 5 for row in rows)
    device = next(row for row in rows if row.startswith("| `device`"))
    assert device.startswith(r'| `device` | `auto\|cpu\|cuda\|mps` | `"auto"` | Where')
    assert argument_table().count("|---|---|---|---|") == len(GROUPS)


def test_saved_arguments_are_read_again_as_they_were() -> None:
    flags = "--config_overrides a=1,b=x --no_save_best --save_steps null --exclude_files é*"
    arguments = read_arguments([write_good(), *flags.split()], 2)
    Path("saved.json").write_text(json.dumps(describe(arguments)))
    assert read_arguments(["saved.json"], 2) == arguments
    assert json.loads(Path("saved.json").read_text(encoding="utf-8")) == describe(arguments)
    assert list(describe(arguments)) == list(KINDS)


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
