"""Proves that names of other tools are explained: each of them, with values converted rightly.

TrainingArguments is held against the installed transformers: no field of it is forgotten, and what
it does by default is known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from arguments import KINDS, Arguments, describe
from llm_training.argument_values import file_value
from llm_training.foreign_names import TOOLS, CannotConvert, explain
from llm_training.foreign_names.common import COMMON
from llm_training.foreign_names.hugging_face import TRAINING_ARGUMENTS
from llm_training.foreign_names.nanogpt import NANOGPT

ROOT = Path(__file__).parents[1]

# Fields of TrainingArguments that have our name and our meaning.
SAME = {
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate"),
    *("gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("tf32", "gradient_checkpointing", "torch_compile", "use_liger_kernel", "run_name", "seed"),
    *("save_total_limit", "ddp_timeout", "greater_is_better", "label_smoothing_factor"),
    *("neftune_noise_alpha", "push_to_hub", "hub_model_id"),
}

ODD_VALUES = (None, True, False, -1, 0, 1, 0.5, 2.5, 10**400, float("nan"), "", "no", "x", "1,2")
ODD_VALUES += ([], ["a"], [1, 2], [None], {}, {"a": 1}, {"min_lr": "x"}, "steps", "auto")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "max_iters",
            ["5000"],
            "max_iters is nanoGPT's and other trainers' name: here it is max_steps"
            " (give --max_steps 5000)",
        ),
        (
            "batch_size",
            12,
            "batch_size means several things; as nanoGPT's name: here it is"
            " per_device_train_batch_size (give --per_device_train_batch_size 12); as other"
            " trainers' name: here it is global_batch_size (give --global_batch_size 12)",
        ),
        (
            "fsdp",
            "full_shard",
            "fsdp is TrainingArguments' and other trainers' name: it has no counterpart here:"
            " launch with accelerate launch --config_file accelerate_configs/fsdp.yaml",
        ),
        (
            "warmup_ratio",
            0.03,
            "warmup_ratio is TrainingArguments' and other trainers' name: here it is warmup_steps"
            " (it is a share of the run, whose steps are not known: set warmup_steps to 0.03 x"
            " them)",
        ),
        (
            "training.steps",
            100,
            "training.steps is torchtitan's name: here it is max_steps (give --max_steps 100)",
        ),
        (
            "betas",
            [0.9, 0.95],
            "betas is LitGPT's and other trainers' name: here it is adam_beta1 and adam_beta2"
            " (give --adam_beta1 0.9 --adam_beta2 0.95)",
        ),
    ],
)
def test_a_name_is_explained(name: str, value: Any, sentence: str) -> None:
    assert explain(name, value) == sentence


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("grad_clip", 1.0, "--max_grad_norm 1.0"),
        ("grad_clip", 0, "--max_grad_norm null"),
        ("n_layer", "6", "--config_overrides n_layer=6"),
        ("dtype", ["bfloat16"], "--mixed_precision bf16"),
        ("compile", [], "--torch_compile true"),
        ("bf16", True, "--mixed_precision bf16"),
        ("fp16", "true", "--mixed_precision fp16"),
        ("micro_batch_size", 4, "--per_device_train_batch_size 4"),
        ("num_batches", 5, "--max_steps 5"),
        ("save_interval_steps", 5, "--save_steps 5"),
        ("eval_interval_steps", 5, "--eval_steps 5"),
        ("log_interval_steps", 5, "--logging_steps 5"),
        ("checkpoint_dir", "there", "--output_dir there"),
        ("grad_accum_steps", 5, "--gradient_accumulation_steps 5"),
        ("precision", "bf16-mixed", "--mixed_precision bf16"),
        ("eval_every", 5, "--eval_steps 5"),
        ("save_every", 5, "--save_steps 5"),
        ("log_every", 5, "--logging_steps 5"),
        ("data_format", "jsonl", "no counterpart here"),
        ("deepspeed", "ds.json", "accelerate_configs/zero2.yaml"),
        ("backend", "nccl", "NCCL on GPUs"),
        ("eval_strategy", "no", "--eval_steps null"),
        ("eval_strategy", "epoch", "set eval_steps to the steps of one epoch"),
        ("val_size", 0.07, "--validation_split_percentage 7.0"),
        ("optim", "adamw_torch", "--optim adamw"),  # ours by name, theirs by value
        ("report_to", ["all"], "name those"),
    ],
)
def test_the_advice_holds_the_converted_value(name: str, value: Any, advice: str) -> None:
    assert advice in str(explain(name, value))


def test_a_value_of_the_wrong_type_is_not_passed_on() -> None:
    assert explain("max_iters", "many") == (
        "max_iters is nanoGPT's and other trainers' name: here it is max_steps"
    )


def test_what_is_ours_or_unknown_is_not_explained() -> None:
    assert explain("nonsense", 1) is None
    explained = {name: explain(name, value) for name, value in describe(Arguments()).items()}
    assert {name for name, sentence in explained.items() if sentence} == set()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.title)
def test_every_entry_is_complete(tool: Any) -> None:
    for entry in tool.names:
        assert set(entry.ours) <= KINDS.keys(), entry.name
        assert entry.ours or entry.note, f"{entry.name} has neither a counterpart nor a reason"
    assert [name for name in tool.defaults if not tool.find(name) and name not in KINDS] == []


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.title)
def test_odd_values_are_converted_or_refused(tool: Any) -> None:
    """No value of a foreign file may end in a traceback."""
    for entry in tool.names:
        for value in ODD_VALUES:
            for settings in ({}, tool.defaults, dict.fromkeys(tool.own, value)):
                try:
                    ours = entry.convert(value, {**settings, entry.name: value})
                except CannotConvert:
                    continue
                assert set(ours) <= KINDS.keys(), f"{entry.name} = {value!r}"
            explain(entry.name, value)


def test_no_field_of_training_arguments_is_forgotten() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    unknown = {name for name in fields if not TRAINING_ARGUMENTS.find(name)}
    assert unknown == SAME
    assert unknown <= KINDS.keys()


def test_the_defaults_of_training_arguments_are_known() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = describe(Arguments())
    assert {name: defaults[name] for name in TRAINING_ARGUMENTS.defaults} == dict(
        TRAINING_ARGUMENTS.defaults
    )
    unsaid = {name for name in SAME if defaults[name] is None and not KINDS[name].nullable}
    differing = {name for name in SAME - unsaid if defaults[name] != ours[name]}
    assert differing - TRAINING_ARGUMENTS.defaults.keys() == set()


def test_at_its_defaults_nothing_of_training_arguments_is_lost() -> None:
    for field in dataclasses.fields(TrainingArguments):
        entry = TRAINING_ARGUMENTS.find(field.name)
        if entry and not entry.ours and field.default is not dataclasses.MISSING:
            assert entry.is_idle(field.default), f"{field.name} = {field.default!r}"


@pytest.mark.parametrize(
    ("name", "words", "understood"),
    [
        ("lr_scheduler_type", SchedulerType, 6),
        ("optim", OptimizerNames, 6),
        ("eval_strategy", IntervalStrategy, 2),
        ("save_strategy", SaveStrategy, 3),
    ],
)
def test_words_of_training_arguments_become_ours(name: str, words: Any, understood: int) -> None:
    entry = TRAINING_ARGUMENTS.own[name]
    converted = []
    for word in words:
        try:
            ours = entry.convert(word.value, {**TRAINING_ARGUMENTS.defaults, name: word.value})
        except CannotConvert as reason:
            assert len(str(reason)) > 20
            continue
        assert all(file_value(key, value) == value for key, value in ours.items())
        converted.append(word.value)
    assert len(converted) == understood, converted


@pytest.mark.parametrize(
    ("tool", "name", "value", "settings", "ours"),
    [
        (NANOGPT, "min_lr", 6e-5, {"learning_rate": 6e-4}, {"min_lr_ratio": 0.1}),
        (NANOGPT, "min_lr", 6e-5, {"decay_lr": False}, {}),
        (
            NANOGPT,
            "lr_decay_iters",
            800,
            {"max_iters": 1000, "warmup_iters": 100},
            {"lr_decay_steps": 700},
        ),
        (NANOGPT, "lr_decay_iters", 1000, {"max_iters": 1000}, {"lr_decay_steps": None}),
        (
            NANOGPT,
            "gradient_accumulation_steps",
            40,
            {"batch_size": 12},
            {"global_batch_size": 480},
        ),
        (NANOGPT, "eval_iters", 200, {"gradient_accumulation_steps": 40}, {"eval_max_batches": 5}),
        (NANOGPT, "init_from", "gpt2-xl", {}, {"model_name_or_path": "gpt2-xl"}),
        (NANOGPT, "n_layer", 6, {"init_from": "gpt2"}, {}),
        (TRAINING_ARGUMENTS, "warmup_ratio", 0.03, {"max_steps": 1000}, {"warmup_steps": 30}),
        (TRAINING_ARGUMENTS, "warmup_ratio", 0.1, {"warmup_steps": 5, "max_steps": 10}, {}),
        (TRAINING_ARGUMENTS, "warmup_steps", 0.1, {"max_steps": 15}, {"warmup_steps": 2}),
        (TRAINING_ARGUMENTS, "save_steps", 0.5, {"max_steps": 10}, {"save_steps": 5}),
        (TRAINING_ARGUMENTS, "save_steps", 5, {"save_strategy": "no"}, {}),
        (TRAINING_ARGUMENTS, "bf16", False, {"fp16": True}, {}),
        (TRAINING_ARGUMENTS, "bf16", False, {}, {"mixed_precision": "fp32"}),
        (TRAINING_ARGUMENTS, "max_steps", -1, {}, {"max_steps": None}),
        (TRAINING_ARGUMENTS, "data_seed", 42, {"seed": 42}, {}),
        (COMMON, "batch_size", 32, {"micro_batch_size": 8}, {"global_batch_size": 32}),
        (COMMON, "batch_size", 8, {"grad_accum_steps": 4}, {"per_device_train_batch_size": 8}),
        (COMMON, "n_layer", 4, {"model": "llama"}, {"config_overrides": {"num_hidden_layers": 4}}),
    ],
)
def test_neighbours_decide(
    tool: Any, name: str, value: Any, settings: dict[str, Any], ours: dict[str, Any]
) -> None:
    assert tool.find(name).convert(value, {name: value, **settings}) == ours


def test_explaining_imports_nothing_slow() -> None:
    program = (
        "import json, sys; from llm_training.foreign_names import explain; explain('max_iters', 1);"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(json.loads(run.stdout)) - set(sys.stdlib_module_names)
    assert {"torch", "transformers", "yaml", "numpy"} & imported == set()


def test_the_page_of_other_tools_is_current() -> None:
    command = [sys.executable, "docs/make_tool_table.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    check = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
