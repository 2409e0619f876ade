"""The arguments of `train_llm.py`: what they are, how they are read, and what is wrong with them.

Each dataclass below is one group; `Arguments` is all of them in one flat namespace. A field is
documented once, in its metadata. This module imports neither torch nor the package, so `--help`
and every mistake in the settings answer at once; `HfArgumentParser` makes the objects.

Reading takes three steps: files and flags become values, each converted by the type hint of its
field (`_convert`); the values are held against their ranges, each other, the disk and the machine
(`find_problems`); what was left open is derived (`_derived`). All problems are raised together.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


def arg(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; a list or dict default gets its own copy."""
    metadata = {"help": help, **metadata}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model is trained: an existing one, or a new one from a configuration."""

    _argument_group_name = "model"

    model_name_or_path: str | None = arg(
        None, "Continue from these weights: a local folder or a Hugging Face hub id."
    )
    model_type: str | None = arg(
        None, "Train from scratch a model of this transformers type: gpt2, llama, qwen3, ..."
    )
    config_overrides: dict[str, Any] = arg(
        {},
        "Changes to the model's configuration: a JSON object, or n_layer=6,n_embd=384 as a flag.",
    )
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = arg(None, "Attention kernel; null: the best that transformers finds.")
    dropout: float | None = arg(
        None,
        "Sets every dropout probability of the model, 0 to 1; null: as its configuration says.",
    )


@dataclass
class DataArguments:
    """What it is trained on, and how text becomes rows of tokens."""

    _argument_group_name = "data"

    train_file: list[str] = arg(
        [],
        "Training data: files, folders or globs (text and source code, .jsonl, .json, .parquet,"
        " .csv, .bin). ${NAME} is the environment's NAME; ${PYTHON_STDLIB} is Python's own library"
        " source.",
    )
    validation_file: list[str] = arg(
        [], "Validation data, like train_file; null: split off the training data."
    )
    exclude_files: list[str] = arg(
        [], "Glob patterns of paths that folders and globs leave out, such as */site-packages/*."
    )
    skip_bad_files: bool = arg(
        False,
        "Leave out files of folders and globs that are empty or not UTF-8 text, counted and named;"
        " off: stop at them.",
    )
    dataset_name: str | None = arg(
        None,
        "Dataset for datasets.load_dataset in place of train_file: a hub id or a local folder.",
    )
    dataset_config_name: str | None = arg(None, "Configuration of that dataset.")
    text_column: str = arg("text", "Column or JSON key that holds the text.")
    validation_split_percentage: float = arg(
        5.0,
        "Percent of the training documents kept for validation when no validation data is given.",
    )
    tokenizer_name: str | None = arg(
        None,
        "Tokenizer: a local folder, a hub id, or char, byte or bpe, made from the training data;"
        " null: the one of model_name_or_path.",
    )
    vocab_size: int = arg(8192, "Tokens in the vocabulary of a bpe tokenizer made from the data.")
    block_size: int | None = arg(
        None, "Tokens in a row; null: the model's longest row, at most 1024."
    )
    cache_dir: str = arg(
        "token_cache", "Folder for tokenized data, built once and used again by later runs."
    )


@dataclass
class OptimizationArguments:
    """How long and how fast it learns."""

    _argument_group_name = "optimization"

    learning_rate: float = arg(5e-5, "Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "warmup-stable-decay"] = arg(
        "cosine", "Shape of the learning rate after the warm-up."
    )
    warmup_steps: int = arg(0, "Steps over which the learning rate rises from 0 to its peak.")
    lr_decay_steps: int | None = arg(
        None,
        "Steps that the decay takes: for linear and cosine from the end of the warm-up (null: all"
        " that remain), for warmup-stable-decay up to the last step (null: a fifth of all steps).",
    )
    min_lr_ratio: float = arg(0.1, "Learning rate at the end of the decay, as a share of the peak.")
    weight_decay: float = arg(
        0.1, "Decay of the weight matrices; norms, biases and embeddings are never decayed."
    )
    adam_beta1: float = arg(0.9, "AdamW's decay of the mean gradient.")
    adam_beta2: float = arg(0.95, "AdamW's decay of the mean squared gradient.")
    adam_epsilon: float = arg(1e-8, "AdamW's term against division by zero.")
    max_grad_norm: float | None = arg(
        1.0, "Gradients are scaled down to this global norm; null: never."
    )
    max_steps: int | None = arg(
        None, "Optimizer steps of the whole run; null: num_train_epochs decides."
    )
    num_train_epochs: float = arg(
        1.0, "Passes over the training rows; max_steps, where given, goes before it."
    )
    per_device_train_batch_size: int | None = arg(
        None,
        "Rows in one forward pass of one process; null: derived, 8 where nothing says otherwise.",
    )
    gradient_accumulation_steps: int | None = arg(
        None,
        "Forward passes of each process in one step; null: derived, 1 where nothing says"
        " otherwise.",
    )
    global_batch_size: int | None = arg(
        None,
        "Rows in one optimizer step over all processes (= per_device_train_batch_size x"
        " gradient_accumulation_steps x processes); null: derived.",
    )


@dataclass
class PrecisionArguments:
    """What is traded between speed, memory and exactness."""

    _argument_group_name = "precision and memory"

    mixed_precision: Literal["auto", "bf16", "fp16", "fp32"] = arg(
        "auto",
        "Arithmetic of the forward pass; auto: bf16 where the device computes it, else fp32.",
    )
    gradient_checkpointing: bool = arg(
        False, "Compute activations again in the backward pass: less memory, about a third slower."
    )
    torch_compile: bool = arg(
        False, "Compile the model's blocks with torch.compile: slow to start, faster afterwards."
    )


@dataclass
class CheckpointArguments:
    """What is kept on disk, and where a stopped run continues."""

    _argument_group_name = "checkpointing"

    save_steps: int | None = arg(
        500, "Save a checkpoint every so many steps; null: only at the end."
    )
    save_total_limit: int | None = arg(
        2, "Checkpoints kept, the newest and beside them the best; null: all."
    )
    save_best: bool = arg(
        False, "Save a checkpoint whenever the validation loss is the lowest so far."
    )
    resume_from_checkpoint: str = arg(
        "auto",
        "auto: continue from the newest checkpoint in output_dir, if there is one; none: refuse a"
        " folder that has one; or the path of a checkpoint.",
    )


@dataclass
class EvaluationArguments:
    """How the model is judged on the validation data."""

    _argument_group_name = "evaluation"

    eval_steps: int | None = arg(
        500, "Evaluate every so many steps, and at the start and the end; null: never."
    )
    eval_max_batches: int | None = arg(
        None, "Batches of one process in one evaluation; null: the whole validation data."
    )
    per_device_eval_batch_size: int | None = arg(
        None, "Rows in one evaluation batch of one process; null: as in training."
    )
    eval_metrics: list[str] = arg(
        [], "Metrics beside loss and perplexity: token_accuracy.", choices=("token_accuracy",)
    )
    eval_only: bool = arg(False, "Evaluate once, print the result and stop.")
    early_stopping_patience: int | None = arg(
        None, "Stop after so many evaluations in a row without a better loss; null: never."
    )
    early_stopping_min_delta: float = arg(
        0.0, "Nats per token by which the validation loss must fall to count as better."
    )
    sample_prompt: str | None = arg(
        None, "Text that the trained model continues at the end of the run; null: no sample."
    )
    sample_max_new_tokens: int = arg(160, "Length of that sample in tokens.")
    sample_temperature: float = arg(
        0.7, "Temperature of that sample; 0: always the likeliest token."
    )


@dataclass
class LoggingArguments:
    """What is written down, and where it is reviewed."""

    _argument_group_name = "logging"

    logging_steps: int = arg(10, "Log the training metrics every so many steps.")
    report_to: list[str] = arg(
        ["mlflow"],
        "Where metrics go beside train_log.jsonl: mlflow, tensorboard, wandb, or none.",
        choices=("mlflow", "tensorboard", "wandb", "none"),
    )
    experiment_name: str = arg("train_llm", "Experiment (project) that the run is filed under.")
    tracking_uri: str | None = arg(
        None, "MLflow store or server; null: mlflow.db in the working folder."
    )


@dataclass
class RunArguments:
    """The run as a whole: its name, its folder, its seed, its device."""

    _argument_group_name = "run"

    run_name: str | None = arg(
        None, "Name of the run; null: the name of the argument file, else of output_dir, else run."
    )
    output_dir: str | None = arg(
        None, "Folder of everything the run writes, made if missing; null: runs/RUN_NAME."
    )
    seed: int | None = arg(
        42, "Seed of weights, order and dropout; null: drawn anew for each run, and noted."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = arg("auto", "Where it is computed.")
    num_threads: int | None = arg(
        None, "CPU threads of each process; null: the machine's cores shared by its processes."
    )


@dataclass
class Arguments(
    RunArguments,
    LoggingArguments,
    EvaluationArguments,
    CheckpointArguments,
    PrecisionArguments,
    OptimizationArguments,
    DataArguments,
    ModelArguments,
):
    """All groups in one flat namespace; a function that needs one group says which by its type."""


GROUPS: Sequence[Any] = (
    ModelArguments,
    DataArguments,
    OptimizationArguments,
    PrecisionArguments,
    CheckpointArguments,
    EvaluationArguments,
    LoggingArguments,
    RunArguments,
)

# ------------------------------------------------------------------------------------- reading

USAGE = """\
python train_llm.py [FILE.json ...] [--name value ...]
       python train_llm.py train_configs/quickstart.json --learning_rate 1e-3
       accelerate launch --config_file accelerate_configs/NAME.yaml train_llm.py FILE.json
"""
RULES = """\
Flags win over files, and later files over earlier ones. --name alone means true and --no_name
false; null empties what may be null; ${NAME} in a text is the environment's NAME, and ~/ at its
start the home folder.
"""
HINT = "All arguments: python train_llm.py --help"
FLAG = "command line"


class ArgumentProblems(ValueError):
    """Everything that is wrong with the arguments; `str()` of it is the report."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} with the arguments:", *(f"  - {text}" for text in problems), HINT]
        super().__init__("\n".join(lines))


class Setting(NamedTuple):
    """What was given for an argument, and where: JSON from a file, or the words of a flag."""

    origin: str
    value: Any


class Kind(NamedTuple):
    """What an argument takes, in files and flags alike: read off its type hint and choices."""

    type: type  # bool, int, float, str, list (of str) or dict
    nullable: bool
    choices: tuple[str, ...]

    @property
    def form(self) -> str:
        """How help and messages say it: `integer|null`, `true|false`, `text ...`."""
        forms = {bool: "true|false", int: "integer", float: "number", dict: "object|key=value,..."}
        form = "|".join(self.choices) or forms.get(self.type, "text")
        return form + (" ..." if self.type is list else "") + ("|null" if self.nullable else "")


def _kind(field: dataclasses.Field[Any], hint: Any) -> Kind:
    nullable = NoneType in get_args(hint)
    inner = get_args(hint)[0] if nullable else hint
    if get_origin(inner) is Literal:
        return Kind(str, nullable, get_args(inner))
    return Kind(get_origin(inner) or inner, nullable, field.metadata.get("choices", ()))


HINTS = get_type_hints(Arguments)  # not field.type, which HfArgumentParser overwrites
KINDS = {field.name: _kind(field, HINTS[field.name]) for field in dataclasses.fields(Arguments)}


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The arguments of this run, from the words behind the script's name; rank 0 does the talking.

    Raises:
        SystemExit: 0 after `--help`; 2 after a report of all problems on stderr.
    """
    is_first = (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"
    if "--help" in argv or "-h" in argv:
        if is_first:
            print(help_text(), end="")
        raise SystemExit(0)
    try:
        if argv:
            return read_arguments(argv)
        report = f"usage: {USAGE}{HINT}"
    except ArgumentProblems as problems:
        report = str(problems)
    if is_first:
        print(report, file=sys.stderr)
    raise SystemExit(2)


def read_arguments(argv: Sequence[str], num_processes: int | None = None) -> Arguments:
    """Arguments from JSON files and flags, checked and completed.

    Args:
        argv: argument files, of which later ones win, then flags, which win over all files.
        num_processes: processes that train together; None: the environment's WORLD_SIZE, or 1.

    Returns:
        The arguments with run_name, output_dir and the three batch sizes resolved.

    Raises:
        ArgumentProblems: with all that is wrong.
    """
    num_processes = num_processes or int(os.environ.get("WORLD_SIZE") or 1)
    paths, flags = _split(argv)
    problems: list[str] = []
    settings: dict[str, Setting] = {}
    unread = []
    for path in paths:
        try:
            settings |= _file_settings(path, problems)
        except ValueError as error:
            unread.append(f"argument file {path}: {error}")
    settings |= _flag_settings(flags, problems)
    arguments = Arguments(**_values(settings, problems))

    # What has no good value, or may have one in a file that could not be read, is not judged.
    doubtful = _names_in(*problems) | (KINDS.keys() - settings.keys() if unread else set())
    rules = find_problems(arguments, num_processes)
    rules = [_with_origins(text, settings) for text in rules if not _names_in(text) & doubtful]
    if problems := unread + problems + rules:
        raise ArgumentProblems(problems)
    return _build(describe(arguments) | _derived(arguments, paths, num_processes))


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The argument files, and the name of each flag with the words behind it."""
    paths: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word):  # so that -1 and "-- text" are values
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        else:
            (flags[-1][1] if flags else paths).append(word)
    return paths, flags


def _file_settings(path: str, problems: list[str]) -> dict[str, Setting]:
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{error.strerror}; name a JSON file, or write --name value") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None
    values, repeated = _load_json(text)
    if not isinstance(values, dict):
        raise ValueError(f'holds {_shown(values)}, not one object {{"name": value, ...}}')
    problems += [f"{name} ({path}): the key stands twice; keep one" for name in repeated]
    problems += [_unknown_name(name, path) for name in values if name not in KINDS]
    return {name: Setting(path, value) for name, value in values.items() if name in KINDS}


def _load_json(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the keys that stand twice in one of its objects."""
    repeated: list[str] = []

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=build_object), repeated
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _flag_settings(flags: list[tuple[str, list[str]]], problems: list[str]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, words in flags:
        positive = name.removeprefix("no_")
        if name != positive and positive in KINDS and KINDS[positive].type is bool:
            name, words = positive, ["false", *words]
        if name not in KINDS:
            problems.append(_unknown_name(name, FLAG))
        elif name in settings:
            problems.append(f"{name} ({FLAG}): given twice; keep one")
        else:
            settings[name] = Setting(FLAG, words)
    return settings


def _unknown_name(name: str, origin: str) -> str:
    close = difflib.get_close_matches(name, KINDS, n=3)
    advice = f"did you mean {' or '.join(close)}?" if close else "--help lists all"
    return f"{name} ({origin}): no such argument; {advice}"


def _values(settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Any]:
    """The settings as their arguments take them; those that do not fit become problems."""
    values = {}
    for name, (origin, given) in settings.items():
        try:
            value = _expanded(given)
            if origin == FLAG:
                value = _flag_value(name, value)
            values[name] = _convert(KINDS[name], value)
        except ValueError as error:
            problems.append(f"{name} ({origin}): {error}")
    return values


def _expanded(value: Any) -> Any:
    """`value` with `${NAME}` replaced in its texts, and a ~/ at their start by the home folder."""
    if isinstance(value, list):
        return [_expanded(element) for element in value]
    if isinstance(value, dict):
        return {key: _expanded(element) for key, element in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    known = {**os.environ, "PYTHON_STDLIB": sysconfig.get_path("stdlib")}
    try:
        return re.sub(r"\$\{([A-Za-z_]\w*)\}", lambda match: known[match[1]], value)
    except KeyError as error:
        raise ValueError(f"{_shown(value)}: set {error.args[0]} in the environment") from None


def _flag_value(name: str, words: list[str]) -> Any:
    """The words behind a flag as a JSON file would hold them."""
    kind = KINDS[name]
    if not words:
        if kind.type is bool:
            return True
        raise ValueError(f"no value; write --{name} VALUE, or --{name}=VALUE if it has dashes")
    is_null = words[0].lower() in ("null", "none") and words[0] not in kind.choices
    if is_null and len(words) == 1 and (kind.nullable or kind.type in (list, dict)):
        return None
    if kind.type is list:
        return words
    if len(words) > 1:
        raise ValueError(f"takes one value, not {len(words)}: {' '.join(words)}")
    if kind.type is dict:
        return _overrides(words[0])
    return words[0] if kind.type is str else _literal(words[0])


def _literal(word: str) -> Any:
    """A word as JSON would read it: a number, true, false or null, and else text."""
    if re.fullmatch(r"[-+]?[0-9]{1,4000}", word):  # Python refuses longer ones
        return int(word)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", word):
        return float(word)
    return {"true": True, "false": False, "null": None, "none": None}.get(word.lower(), word)


def _overrides(text: str) -> dict[str, Any]:
    """The changes that `{"n_layer": 6, "n_embd": 384}` or `n_layer=6,n_embd=384` names."""
    if text.lstrip().startswith("{"):
        value, repeated = _load_json(text)
    else:
        pairs = [pair.split("=", 1) for pair in text.split(",")]
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise ValueError(f"takes a JSON object or n_layer=6,n_embd=384, not {_shown(text)}")
        value = {key: _literal(word) for key, word in pairs}
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]} stands twice; keep one")
    return value


def _convert(kind: Kind, value: Any) -> Any:
    """`value`, as JSON holds it, as the argument takes it; nothing is guessed, but 1 may be 1.0.

    Raises:
        ValueError: it does not fit; the message says what does and what to write.
    """
    if value is None and (kind.nullable or kind.type in (list, dict)):
        return None if kind.nullable else kind.type()
    if kind.type is list and isinstance(value, (str, list)):
        elements = value if isinstance(value, list) else [value]
        return [_convert(kind._replace(type=str), element) for element in elements]
    fits = type(value) is kind.type  # not isinstance, by which True is an int
    if kind.type is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # nor NaN
    elif kind.type is dict:
        fits = fits and _is_finite(value)
    elif kind.type is str:
        fits = fits and value != "" and (not kind.choices or value in kind.choices)
    if not fits:
        raise ValueError(f"takes {kind.form}, not {_shown(value)}{_advice(kind, value)}")
    return float(value) if kind.type is float else value


def _is_finite(value: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def _advice(kind: Kind, value: Any) -> str:
    """What to write in place of a value that does not fit, where one can tell."""
    if kind.type is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind.type in (bool, int, float) and type(value) is str and type(_literal(value)) is not str:
        return "; write it without quotes"
    if kind.type is str and type(value) in (bool, int, float):
        return "; write it in quotes"
    if value == "":
        return "; give one, or leave the argument out"
    close = difflib.get_close_matches(str(value), kind.choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _names_in(*texts: str) -> set[str]:
    """The arguments that the texts speak of; a word in a path, such as seed.json, is none."""
    return KINDS.keys() & set(re.findall(r"(?<![./-])\b\w+\b(?![./-])", " ".join(texts)))


def _with_origins(text: str, settings: Mapping[str, Setting]) -> str:
    names = [name for name in KINDS if name in settings and name in _names_in(text)]
    origins = ", ".join(f"{name}: {settings[name].origin}" for name in names)
    return f"{text} ({origins})" if origins else text


def _derived(arguments: Arguments, paths: Sequence[str], num_processes: int) -> dict[str, Any]:
    """The arguments that null leaves open and that follow from the others."""
    sizes = resolve_batch_sizes(arguments, num_processes)
    folder = Path(os.path.abspath(arguments.output_dir)).name if arguments.output_dir else ""
    run_name = arguments.run_name or (Path(paths[-1]).stem if paths else folder) or "run"
    return {
        "run_name": run_name,
        "output_dir": arguments.output_dir or f"runs/{run_name}",
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "global_batch_size": sizes.global_batch,
    }


def _build(values: dict[str, Any]) -> Arguments:
    from transformers import HfArgumentParser  # 0.6 s, and needed only now

    groups = HfArgumentParser(GROUPS).parse_dict(values)
    return Arguments(**{name: value for group in groups for name, value in vars(group).items()})


# ------------------------------------------------------------------------------------- checking

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
        " sample_max_new_tokens",
    ),
    ("2 or more", lambda x: x >= 2, "block_size"),
    ("257 or more, for 256 bytes and a special token", lambda x: x >= 257, "vocab_size"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "min_lr_ratio"),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, "dropout adam_beta1 adam_beta2"),
    ("from 0 to 50", lambda x: 0 <= x <= 50, "validation_split_percentage"),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "seed"),
)


def find_problems(arguments: Arguments, num_processes: int) -> list[str]:
    """Values out of their range, and values at odds with each other, the disk or the machine.

    Their types must be right; `read_arguments` sees to it. Nothing is changed or raised.
    """
    out_of_range = list(_range_problems(arguments))
    rules = (
        *_model_problems(arguments),
        *_data_problems(arguments),
        *_path_problems(arguments),
        *_folder_problems(arguments),
        *_batch_problems(arguments, num_processes),
        *_schedule_problems(arguments),
        *_evaluation_problems(arguments),
        *_machine_problems(arguments),
    )
    doubtful = _names_in(*out_of_range)
    return out_of_range + [text for text in rules if not _names_in(text) & doubtful]


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
        changes = _shown(arguments.config_overrides)
        both = f"config_overrides={changes} and model_name_or_path={loaded}"
        yield f"{both} exclude each other: weights fit one configuration only; drop the first"


def _data_problems(arguments: Arguments) -> Iterator[str]:
    files, dataset = arguments.train_file, arguments.dataset_name
    if files and dataset:
        yield f"train_file={_shown(files)} and dataset_name={dataset} exclude each other: keep one"
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
        yield f"run_name={_shown(run_name)} cannot name a folder: use no slash, and not . or .."


def _schedule_problems(arguments: Arguments) -> Iterator[str]:
    warmup, decay, total = arguments.warmup_steps, arguments.lr_decay_steps, arguments.max_steps
    if total is None:
        return
    if warmup > total:
        yield f"warmup_steps={warmup} is more than max_steps={total}: lower it or raise max_steps"
    elif decay and warmup + decay > total and arguments.lr_scheduler_type != "constant":
        steps = f"warmup_steps={warmup} + lr_decay_steps={decay} = {warmup + decay}"
        yield f"{steps} is more than max_steps={total}: lower one or raise max_steps"


def _evaluation_problems(arguments: Arguments) -> Iterator[str]:
    can_validate = arguments.validation_file or arguments.validation_split_percentage > 0
    for name in ("save_best", "early_stopping_patience", "eval_only"):
        value = getattr(arguments, name)
        wish = f"{name}={_shown(value)}"
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
        yield f"report_to={_shown(report_to)}: name each tracker once, or none alone"
    for tracker in sorted({*report_to} - {"none"}):
        spec = importlib.util.find_spec(tracker)
        if spec is None or spec.origin is None:  # no origin: a folder ./wandb of earlier runs
            yield f"report_to={tracker} is not installed: pip install {tracker}, or report_to=none"


# ---------------------------------------------------------------------------------- batch sizes


@dataclass(frozen=True)
class BatchSizes:
    """How the rows of one optimizer step are split; the first three multiply to the last."""

    per_device: int
    accumulation: int
    processes: int
    global_batch: int


def resolve_batch_sizes(arguments: Arguments, num_processes: int) -> BatchSizes:
    """The batch sizes as given; those left null are derived from the others.

    Raises:
        ValueError: those given contradict each other.
    """
    for problem in _batch_problems(arguments, num_processes):
        raise ValueError(problem)
    per_device = arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    if arguments.global_batch_size is not None:
        rows = arguments.global_batch_size // num_processes  # of one process in one step
        if per_device is None and accumulation is None:
            per_device = max(size for size in range(1, 9) if rows % size == 0)
        per_device = per_device or rows // (accumulation or 1)
        accumulation = rows // per_device
    per_device, accumulation = per_device or 8, accumulation or 1
    product = per_device * accumulation * num_processes
    return BatchSizes(per_device, accumulation, num_processes, product)


def _batch_problems(arguments: Arguments, num_processes: int) -> Iterator[str]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = {name: size for name in names if (size := getattr(arguments, name)) is not None}
    total = arguments.global_batch_size
    if total is None or min(total, *given.values(), 1) < 1:
        return  # nothing to contradict, or out of range already
    product = math.prod(given.values()) * num_processes
    factors = [*(f"{name}={size}" for name, size in given.items()), f"processes={num_processes}"]
    arithmetic = f"{' x '.join(factors)} = {product}"
    if len(given) == 2 and product != total:
        advice = f"set it to {product}, or leave one of the three out"
        yield f"global_batch_size={total}, but {arithmetic}: {advice}"
    elif total % product:
        below = total - total % product
        nearest = f"{below} or {below + product}" if below else product
        yield f"global_batch_size={total} is not a multiple of {arithmetic}: set it to {nearest}"


# ------------------------------------------------------------------------------ writing, showing


def describe(arguments: Arguments) -> dict[str, Any]:
    """All arguments as a flat dict, in the order of the groups."""
    return dataclasses.asdict(arguments)


def save_arguments(arguments: Arguments, path: str | Path) -> None:
    """Write all arguments as an argument file, which `read_arguments` reads again."""
    Path(path).write_text(json.dumps(describe(arguments), indent=2) + "\n", encoding="utf-8")


def help_text() -> str:
    """What `--help` prints, as wide as the terminal."""
    import argparse

    defaults = describe(Arguments())
    parser = argparse.ArgumentParser(usage=USAGE, description=RULES, add_help=False)
    for group in GROUPS:
        section = parser.add_argument_group(group._argument_group_name, group.__doc__)
        for field in dataclasses.fields(group):
            text = f"{field.metadata['help']} (default: {json.dumps(defaults[field.name])})"
            form = KINDS[field.name].form
            section.add_argument(f"--{field.name}", metavar=form, help=text)
    return parser.format_help()


def argument_table() -> str:
    """The arguments in Markdown, a table for each group."""
    defaults = describe(Arguments())
    lines = []
    for group in GROUPS:
        lines += [f"### {group._argument_group_name.capitalize()}", "", str(group.__doc__), ""]
        lines += ["| argument | takes | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(group):
            code = (field.name, KINDS[field.name].form, json.dumps(defaults[field.name]))
            cells = [*(f"`{text}`" for text in code), field.metadata["help"]]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
