"""What is wrong with arguments: alone, with each other, the disk, the machine and the launch.

Nothing here imports more than the standard library, so the report comes at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from arguments import KINDS, Arguments, batch_problems
from llm_training.launch_checks import launch_problems
from llm_training.launch_settings import LaunchSettings

# What a value must be, its test, and the arguments it holds for; null passes where it is allowed.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("more than 0", lambda x: x > 0, "learning_rate adam_epsilon max_grad_norm num_train_epochs"),
    (
        "0 or more",
        lambda x: x >= 0,
        "weight_decay warmup_steps early_stopping_min_delta sample_temperature",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "max_steps lr_decay_steps save_steps save_total_limit logging_steps num_threads"
        " per_device_train_batch_size gradient_accumulation_steps global_batch_size"
        " eval_steps eval_max_batches per_device_eval_batch_size early_stopping_patience"
        " sample_max_new_tokens ddp_timeout",
    ),
    ("2 or more", lambda x: x >= 2, "block_size"),
    ("257 or more, for 256 bytes and a special token", lambda x: x >= 257, "vocab_size"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "min_lr_ratio"),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, "dropout adam_beta1 adam_beta2"),
    ("from 0 to 50", lambda x: 0 <= x <= 50, "validation_split_percentage"),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "seed"),
)


def find_problems(arguments: Arguments, launch: LaunchSettings) -> list[str]:
    """Values out of range, and values at odds with each other, the disk, the machine, the launch.

    Their types must be right; `read_arguments` sees to it. Nothing is changed or raised.
    """
    out_of_range = list(_range_problems(arguments))
    rules = (
        *_model_problems(arguments),
        *_data_problems(arguments),
        *_path_problems(arguments),
        *_folder_problems(arguments),
        *batch_problems(arguments, launch.data_parallel_size),
        *_schedule_problems(arguments),
        *_evaluation_problems(arguments),
        *_machine_problems(arguments),
        *launch_problems(arguments, launch),
    )
    doubtful = names_in(*out_of_range)
    return out_of_range + [text for text in rules if not names_in(text) & doubtful]


def _range_problems(arguments: Arguments) -> Iterator[str]:
    for phrase, is_inside, names in RANGES:
        for name in names.split():
            value = getattr(arguments, name)
            if value is not None and not is_inside(value):
                null = ", or null" if KINDS[name].nullable else ""
                yield f"{name}={value} is out of range: it must be {phrase}{null}"


def _model_problems(arguments: Arguments) -> Iterator[str]:
    loaded, new = arguments.model_name_or_path, arguments.model_type
    if loaded and new:
        both = f"model_name_or_path={loaded} and model_type={new}"
        yield f"{both} exclude each other: keep the first to load weights, else the second"
    if not loaded and not new:
        yield "no model: give model_name_or_path to load weights, or model_type to start anew"
    if loaded and arguments.config_overrides:
        changes = shown(arguments.config_overrides)
        both = f"config_overrides={changes} and model_name_or_path={loaded}"
        yield f"{both} exclude each other: weights fit one configuration only; drop the first"


def _data_problems(arguments: Arguments) -> Iterator[str]:
    files, dataset = arguments.train_file, arguments.dataset_name
    if files and dataset:
        yield f"train_file={shown(files)} and dataset_name={dataset} exclude each other: keep one"
    if not files and not dataset and not arguments.eval_only:
        yield "no data: give train_file (files, folders or globs) or dataset_name"
    files = files + arguments.validation_file
    if not files and not dataset and arguments.eval_only:
        yield "no data for eval_only: give validation_file, or train_file or dataset_name"
    has_only_tokens = bool(files) and all(path.endswith(".bin") for path in files)
    if arguments.model_type and not arguments.tokenizer_name and not has_only_tokens:
        advice = (
            "set tokenizer_name to char, byte or bpe, made from the data, or a folder or hub id"
        )
        yield f"model_type={arguments.model_type} comes without a tokenizer: {advice}"


def _path_problems(arguments: Arguments) -> Iterator[str]:
    for name in ("train_file", "validation_file"):
        for path in getattr(arguments, name):
            if not re.search(r"[*?\[]", path) and not os.path.exists(path):
                yield _missing(name, path)
    for name in ("model_name_or_path", "tokenizer_name", "dataset_name"):
        path = getattr(arguments, name) or ""
        cannot_be_hub_id = path.startswith((".", "/")) or path.count("/") > 1
        if cannot_be_hub_id and not os.path.exists(path):
            yield _missing(name, path)
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint not in ("auto", "none") and not os.path.isdir(checkpoint):
        yield f"resume_from_checkpoint={checkpoint} is no folder: give one, or auto or none"
    if arguments.reset_optimizer and checkpoint == "none":
        both = "reset_optimizer=true and resume_from_checkpoint=none"
        yield f"{both} exclude each other: name the checkpoint to continue from, or drop the first"


def _missing(name: str, path: str) -> str:
    return f"{name}={path} does not exist: there is no {os.path.abspath(path)}; correct the path"


def _folder_problems(arguments: Arguments) -> Iterator[str]:
    for name in ("output_dir", "cache_dir"):
        path = getattr(arguments, name) or ""
        if os.path.exists(path) and not os.path.isdir(path):
            yield f"{name}={path} is a file: name a folder"
    run_name = arguments.run_name
    if run_name is None:
        return
    if run_name.strip() in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", run_name):
        yield f"run_name={shown(run_name)} cannot name a folder: use no slash, and not . or .."


def _schedule_problems(arguments: Arguments) -> Iterator[str]:
    warmup, decay, total = arguments.warmup_steps, arguments.lr_decay_steps, arguments.max_steps
    if decay and arguments.lr_scheduler_type == "constant":
        advice = "leave it out, or choose another lr_scheduler_type"
        yield f"lr_decay_steps={decay} has no effect with lr_scheduler_type=constant: {advice}"
    if total is None:
        return
    if warmup > total:
        yield f"warmup_steps={warmup} is more than max_steps={total}: lower it or raise max_steps"
    elif decay and warmup + decay > total:
        steps = f"warmup_steps={warmup} + lr_decay_steps={decay} = {warmup + decay}"
        yield f"{steps} is more than max_steps={total}: lower one or raise max_steps"


def _evaluation_problems(arguments: Arguments) -> Iterator[str]:
    can_validate = arguments.validation_file or arguments.validation_split_percentage > 0
    for name in ("save_best", "early_stopping_patience", "eval_only"):
        value = getattr(arguments, name)
        wish = f"{name}={shown(value)}"
        if value and not can_validate:
            advice = "give validation_file, or a validation_split_percentage above 0"
            yield f"{wish} needs validation data: {advice}"
        if value and arguments.eval_steps is None and name != "eval_only":
            yield f"{wish} needs evaluations, but eval_steps is null: set eval_steps"


def _machine_problems(arguments: Arguments) -> Iterator[str]:
    if arguments.mixed_precision == "fp16" and arguments.device == "cpu":
        yield "mixed_precision=fp16 does not train with device=cpu: use bf16, fp32 or auto"
    report_to = arguments.report_to
    if len(set(report_to)) < len(report_to) or ("none" in report_to and len(report_to) > 1):
        yield f"report_to={shown(report_to)}: name each tracker once, or none alone"
    for tracker in sorted({*report_to} - {"none"}):
        spec = importlib.util.find_spec(tracker)
        if spec is None or spec.origin is None:  # no origin: a folder ./wandb of earlier runs
            yield f"report_to={tracker} is not installed: pip install {tracker}, or report_to=none"


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def names_in(*texts: str) -> set[str]:
    """The arguments that the texts speak of; a word in a path, such as seed.json, is none."""
    return KINDS.keys() & set(re.findall(r"(?<![./-])\b\w+\b(?![./-])", " ".join(texts)))
