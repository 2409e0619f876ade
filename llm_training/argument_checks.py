"""What is wrong with arguments: alone, with each other, the disk, the machine and the launch.

Nothing here imports more than the standard library, so the report comes at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from arguments import (
    KINDS,
    Arguments,
    batch_problems,
    describe,
    holds_conversations,
    mixture_sources,
)
from llm_training.evaluation_checks import evaluation_problems, set_problems
from llm_training.hardware_checks import hardware_problems
from llm_training.hub_checks import hub_problems
from llm_training.launch_checks import launch_problems
from llm_training.launch_settings import LaunchSettings
from llm_training.length_checks import length_problems
from llm_training.lora_checks import lora_problems
from llm_training.pattern_checks import pattern_problems
from llm_training.speed_checks import speed_problems
from llm_training.validation_sets import validation_set_arguments

# What a value must be, its test, and the arguments it holds for; null passes where it is allowed.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "more than 0",
        lambda x: x > 0,
        "learning_rate adam_epsilon max_grad_norm num_train_epochs save_before_timeout skip_spikes"
        " max_train_hours lora_alpha neftune_noise_alpha",
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        "weight_decay warmup_steps early_stopping_min_delta sample_temperature"
        " min_document_characters bpe_min_frequency max_skipped_steps max_rewinds"
        " sample_validation_prompts",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "max_steps lr_decay_steps save_steps save_total_limit logging_steps num_threads"
        " per_device_train_batch_size gradient_accumulation_steps global_batch_size"
        " eval_steps eval_max_batches per_device_eval_batch_size early_stopping_patience"
        " sample_max_new_tokens ddp_timeout shuffle_buffer_size replica_check_steps"
        " pad_vocab_to_multiple_of dry_run_steps lora_rank sample_steps",
    ),
    ("2 or more", lambda x: x >= 2, "block_size verify_resume"),
    ("257 or more, for 256 bytes and a special token", lambda x: x >= 257, "vocab_size"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "min_lr_ratio"),
    (
        "at least 0 and less than 1",
        lambda x: 0 <= x < 1,
        "dropout adam_beta1 adam_beta2 lora_dropout label_smoothing_factor",
    ),
    ("from 0 to 50", lambda x: 0 <= x <= 50, "validation_split_percentage"),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "seed"),
)


# In front of the host, or behind the question mark.
URL_LOGIN = re.compile(
    r"\w://[^/\s@]+:[^/\s@]+@"
    r"|\w://[^\s\"]*[?&;][\w-]*(?:passw(?:or)?d|pwd|secret|token)=[^\s&;\"]"
)
# As Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack and Databricks make them.
SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{15,}"
    r"|A(KI|SI)A[0-9A-Z]{16}|sk-(proj-)?[A-Za-z0-9]{32,}|xox[abp]-[\w-]{10,}|dapi[0-9a-f]{32})\b"
)

# What a start can be for, in place of training.
MODES = ("dry_run", "find_batch_size", "eval_only", "verify_resume")
DEFAULTS = describe(Arguments())
_DATASET_ARGUMENTS = (
    *("dataset_config_name", "dataset_split", "dataset_validation_split", "dataset_revision"),
    "streaming",
)


def find_problems(arguments: Arguments, launch: LaunchSettings) -> list[str]:
    """Values out of range, and values at odds with each other, the disk, the machine, the launch.

    Their types must be right; `read_arguments` sees to it. Nothing is changed or raised.
    """
    out_of_range = list(_range_problems(arguments))
    rules = (
        *_mode_problems(arguments),
        *_model_problems(arguments),
        *_position_problems(arguments),
        *_data_problems(arguments),
        *_streaming_problems(arguments),
        *_document_mask_problems(arguments, launch),
        *_path_problems(arguments),
        *_folder_problems(arguments),
        *batch_problems(arguments, launch.data_parallel_size),
        *length_problems(arguments),
        *lora_problems(arguments, launch),
        *pattern_problems(arguments),
        *_health_problems(arguments),
        *evaluation_problems(arguments),
        *hub_problems(arguments),
        *_secret_problems(arguments),
        *hardware_problems(arguments, launch),
        *speed_problems(arguments, launch),
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


def _mode_problems(arguments: Arguments) -> Iterator[str]:
    """A start does one of these, or trains."""
    given = [f"{name}={shown(value)}" for name in MODES if (value := getattr(arguments, name))]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other: keep one, and start again for the next"
    if arguments.dry_run_steps is not None and not arguments.dry_run:
        steps = f"dry_run_steps={arguments.dry_run_steps}"
        yield f"{steps} has no effect without dry_run: drop it, or give that"


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
    if arguments.model_revision is not None and (new or os.path.isdir(loaded or "")):
        revision = f"model_revision={arguments.model_revision}"
        where = f"with model_type={new}" if new else f"on a local folder ({loaded})"
        yield f"{revision} has no effect {where}: drop it, or name a model of the hub"


def _position_problems(arguments: Arguments) -> Iterator[str]:
    """Rows that are longer than the model, where that stands written already."""
    block_size, folder = arguments.block_size, arguments.model_name_or_path
    if block_size is None:
        return
    place, config = "config_overrides", arguments.config_overrides
    if folder is not None:
        path = os.path.join(folder, "config.json")
        place, config = f"model_name_or_path={folder}", _read_json_object(path)
    for name in ("max_position_embeddings", "n_positions"):
        positions = config.get(name)
        if isinstance(positions, int) and 1 < positions < block_size:
            yield (
                f"block_size={block_size} is more than {name}={positions} of {place}: use"
                f" block_size {positions} or less, or a model with more positions"
            )


def _read_json_object(path: str) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _data_problems(arguments: Arguments) -> Iterator[str]:
    if arguments.train_mixture:
        for name in ("train_file", "dataset_name"):
            if value := getattr(arguments, name):
                both = f"train_mixture and {name}={shown(value)}"
                yield f"{both} exclude each other: name the data in the sources, or drop the first"
    for source, own in mixture_sources(arguments).items():
        prefix = f"train_mixture, source {source}: " if source else ""
        yield from (prefix + problem for problem in _source_problems(own))
    for name, own, problem in set_problems(arguments):
        found = [problem] if problem else [*_dataset_problems(own), *_column_problems(own)]
        yield from (f"validation_sets, {name}: {text}" for text in found)
    yield from _tokenizer_problems(arguments)


def _source_problems(arguments: Arguments) -> Iterator[str]:
    files, dataset = arguments.train_file, arguments.dataset_name
    if files and dataset:
        yield f"train_file={shown(files)} and dataset_name={dataset} exclude each other: keep one"
    if not files and not dataset and not arguments.eval_only:
        yield "no data: give train_file (files, folders or globs), dataset_name or train_mixture"
    has_validation = arguments.validation_file or arguments.validation_sets
    if not files and not has_validation and not dataset and arguments.eval_only:
        yield "no data for eval_only: give validation_file, or train_file or dataset_name"
    yield from _dataset_problems(arguments)
    yield from _column_problems(arguments)


def _dataset_problems(arguments: Arguments) -> Iterator[str]:
    for name in _DATASET_ARGUMENTS if arguments.dataset_name is None else ():
        value = getattr(arguments, name)
        if value not in (None, False, DEFAULTS[name]):
            yield f"{name}={shown(value)} has no effect without dataset_name: drop it, or give that"


def _column_problems(arguments: Arguments) -> Iterator[str]:
    prompt, completion = arguments.prompt_column, arguments.completion_column
    if (prompt is None) != (completion is None):
        given = f"prompt_column={prompt}" if prompt else f"completion_column={completion}"
        missing = "completion_column" if prompt else "prompt_column"
        yield f"{given} needs {missing}: one holds what the user says, the other the answer"
    if arguments.messages_column and (prompt or completion):
        both = f"messages_column={arguments.messages_column} and prompt_column={prompt}"
        yield f"{both} exclude each other: keep the one that the data has"


def _tokenizer_problems(arguments: Arguments) -> Iterator[str]:
    name, made_here = arguments.tokenizer_name, ("char", "byte", "bpe")
    sources = mixture_sources(arguments).values()
    files = [path for own in sources for path in own.train_file + own.validation_file]
    everything = [*sources, *validation_set_arguments(arguments).values()]
    has_only_tokens = bool(files) and all(_holds_tokens(path) for path in files)
    if arguments.model_type and not name and not has_only_tokens:
        advice = (
            "set tokenizer_name to char, byte or bpe, made from the data, or a folder or hub id"
        )
        yield f"model_type={arguments.model_type} comes without a tokenizer: {advice}"
    if any(holds_conversations(own) for own in everything) and name in made_here:
        advice = "name a tokenizer that knows the turns of a conversation: a folder or hub id"
        yield f"tokenizer_name={name} has no chat template for conversations: {advice}"
    if arguments.chat_template and not any(holds_conversations(own) for own in everything):
        advice = "name messages_column, or prompt_column and completion_column, or drop it"
        yield f"chat_template={shown(arguments.chat_template)} has no effect on text: {advice}"
    if any(not text.strip() for text in arguments.special_tokens):
        yield f"special_tokens={shown(arguments.special_tokens)} holds an empty text: drop it"


def _holds_tokens(path: str) -> bool:
    """Whether a file, or a folder such as nanoGPT's, holds token ids in place of text."""
    places = [os.path.join(path, folder, "train") for folder in ("", "processed")]
    files = [place + ending for place in places for ending in (".bin", ".npy")]
    return path.endswith((".bin", ".npy")) or any(os.path.isfile(file) for file in files)


def _streaming_problems(arguments: Arguments) -> Iterator[str]:
    if not arguments.streaming:
        if arguments.shuffle_buffer_size != DEFAULTS["shuffle_buffer_size"]:
            size = arguments.shuffle_buffer_size
            yield f"shuffle_buffer_size={size} has no effect without streaming: drop it"
        return
    if arguments.max_steps is None and arguments.max_train_hours is None:
        yield "streaming=true needs max_steps or max_train_hours: nobody knows where a stream ends"
    for name in ("train_mixture", "drop_duplicates", "min_document_characters"):
        if value := getattr(arguments, name):
            advice = "drop it, or prepare the data without streaming"
            yield f"{name}={shown(value)} and streaming=true exclude each other: {advice}"
    reads_split = arguments.dataset_name and not arguments.validation_file
    if arguments.eval_steps is not None and reads_split and arguments.eval_max_batches is None:
        yield (
            "eval_steps with streaming=true needs eval_max_batches, which says how much of the"
            " dataset's validation split is read: give it, a validation_file, or eval_steps null"
        )
    if arguments.tokenizer_name in ("char", "bpe"):
        advice = "name one that exists (a folder or hub id), or byte"
        yield (
            f"tokenizer_name={arguments.tokenizer_name} is made from all of the data, which"
            f" streaming=true never holds: {advice}"
        )


def masks_documents(arguments: Arguments) -> bool:
    """Whether documents in a row do not see each other; by default those of conversations."""
    by_default = any(holds_conversations(own) for own in mixture_sources(arguments).values())
    return by_default if arguments.document_mask is None else arguments.document_mask


def _document_mask_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    if masks_documents(arguments) and launch.cp_size > 1:
        yield (
            f"document_mask={shown(arguments.document_mask)} is on, but"
            f" parallelism_config_cp_size={launch.cp_size} splits rows over ranks, whose attention"
            " knows no documents: set document_mask to false, or cp_size to 1"
        )


def _path_problems(arguments: Arguments) -> Iterator[str]:
    sets = validation_set_arguments(arguments).values()
    for own in [*mixture_sources(arguments).values(), *sets]:
        for name in ("train_file", "validation_file"):
            for path in getattr(own, name):
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
    if arguments.allow_resume_change and checkpoint == "none":
        allowed = f"allow_resume_change={shown(arguments.allow_resume_change)}"
        advice = "nothing is continued that could differ; drop the first"
        yield f"{allowed} and resume_from_checkpoint=none exclude each other: {advice}"


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


def _health_problems(arguments: Arguments) -> Iterator[str]:
    if arguments.max_rewinds and arguments.streaming:
        yield (
            f"max_rewinds={arguments.max_rewinds} with streaming=true: a stream cannot go back;"
            " set max_rewinds to 0, or leave streaming out"
        )
    if arguments.max_rewinds and arguments.save_steps is None:
        wish = f"max_rewinds={arguments.max_rewinds}"
        yield f"{wish} needs a checkpoint to go back to, but save_steps is null: set save_steps"


def _secret_problems(arguments: Arguments) -> Iterator[str]:
    """Arguments stand in the list of processes, in shells' histories and in every checkpoint."""
    for name, value in describe(arguments).items():
        text = json.dumps(value, ensure_ascii=False)
        if URL_LOGIN.search(text):
            yield (
                f"{name} holds a login in a URL, which everyone on this machine could read: leave"
                " it out, and give it in the environment, to MLflow as MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD"
            )
        if SECRET.search(text):
            yield (
                f"{name} holds what looks like a key or token, which everyone on this machine could"
                " read: leave it out, and give it in the environment, such as HF_TOKEN"
            )


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def names_in(*texts: str) -> set[str]:
    """The arguments that the texts speak of; a word in a path, such as seed.json, is none."""
    return KINDS.keys() & set(re.findall(r"(?<![./-])\b\w+\b(?![./-])", " ".join(texts)))
