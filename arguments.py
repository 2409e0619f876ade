"""The arguments of `train_llm.py`: what they are, and what follows from them.

Each dataclass below is one group; `Arguments` is all of them in one flat namespace. A field is
documented once, in its metadata. This module imports neither torch nor the package, so that
`--help` and every mistake in the settings answer at once. Files and flags are read in
`llm_training/argument_parsing.py` and held against each other in `llm_training/argument_checks.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        "Changes to the model's configuration: a JSON object; as a flag also n_layer=6,n_embd=384,"
        " which changes these keys of a file's object.",
    )
    model_revision: str | None = arg(
        None,
        "Its branch, tag or commit on the hub; null: the newest of its main branch. Which commit it"
        " was is noted.",
    )
    trust_remote_code: bool = arg(
        False,
        "Run the Python code that a model or tokenizer brings along. It may do anything on this"
        " machine: read it first, and name its commit in model_revision.",
    )
    frozen_dtype: Literal["float32", "bfloat16", "nf4"] = arg(
        "float32",
        "Type in which the matrices of linear layers that are not trained are held: bfloat16: half"
        " the memory, and the same curve where mixed_precision is bf16; nf4: 4 bits by the package"
        " bitsandbytes, for lora_rank (QLoRA), on one process or DDP. All else is in float32.",
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
        "Training data: files, folders or globs (text and source code, .jsonl, .json, .csv,"
        " .parquet, .arrow, and these compressed as .gz, .bz2, .xz or .zst; token files .bin or"
        " .npy, or a folder that holds train.bin). ${NAME} is the environment's NAME;"
        " ${PYTHON_STDLIB} is Python's own library source.",
    )
    validation_file: list[str] = arg(
        [], "Validation data, like train_file; null: split off the training data."
    )
    validation_sets: dict[str, Any] = arg(
        {},
        "Further validation sets, each with its own curve: a JSON object that gives each a name,"
        ' such as {"math": {"validation_file": "math.jsonl"}, ...}; what it does not set itself is'
        " as above.",
    )
    exclude_files: list[str] = arg(
        [], "Glob patterns of paths that folders and globs leave out, such as */site-packages/*."
    )
    dataset_name: str | None = arg(
        None,
        "Dataset for datasets.load_dataset in place of train_file: a hub id or a local folder.",
    )
    dataset_config_name: str | None = arg(None, "Configuration of that dataset.")
    dataset_split: str = arg(
        "train", "Its split to train on, as the datasets library writes it: train[:1000]."
    )
    dataset_validation_split: str | None = arg(
        None, "Its split to validate on; null: the one called validation, if there is one."
    )
    dataset_revision: str | None = arg(
        None, "Its branch, tag or commit on the hub; null: the newest."
    )
    streaming: bool = arg(
        False,
        "Read that dataset while training, for one that fits on no disk; needs max_steps.",
    )
    shuffle_buffer_size: int = arg(
        1024, "Rows that are read ahead and mixed when streaming; 1: the order of the dataset."
    )
    train_mixture: dict[str, Any] = arg(
        {},
        "Several sources mixed by weight, in place of train_file: a JSON object that gives each"
        ' source a name, such as {"code": {"train_file": "src", "weight": 3}, ...}; what it does'
        " not set itself is as above.",
    )
    text_column: str = arg("text", "Column or JSON key that holds the text.")
    messages_column: str | None = arg(
        None,
        "Column that holds conversations (lists of role and content): only the assistant's turns"
        " are learned.",
    )
    prompt_column: str | None = arg(
        None, "Column that holds what the user says, where each row is one question and answer."
    )
    completion_column: str | None = arg(
        None, "Column that holds the answer to prompt_column; only it is learned."
    )
    chat_template: str | None = arg(
        None,
        "Chat template for conversations: a Jinja file or text, saved with the model; null: the"
        " tokenizer's own.",
    )
    document_separator: Literal["file", "line", "blank_line"] = arg(
        "file", "What parts text files into documents: nothing, each line, or blank lines."
    )
    min_document_characters: int = arg(
        0, "Documents of fewer characters are left out, counted and named."
    )
    drop_duplicates: bool = arg(
        False, "Leave out documents that are equal to an earlier one, counted and named."
    )
    skip_bad_files: bool = arg(
        False,
        "Leave out files of folders and globs that are empty or not UTF-8 text, counted and named;"
        " off: stop at them.",
    )
    skip_bad_documents: bool = arg(
        False,
        "Leave out lines and rows that cannot be read or hold no text or no usable conversation,"
        " counted and named; off: stop at them.",
    )
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
    bpe_min_frequency: int = arg(
        0, "Times that a pair must occur to become a token of that vocabulary."
    )
    special_tokens: list[str] = arg(
        [],
        "Further special tokens: of a tokenizer made from the data, beside <|endoftext|>; or for an"
        " existing one, such as those of a chat template: they take spare rows of the model's"
        " embedding, or it grows.",
    )
    block_size: int | None = arg(
        None, "Tokens in a row; null: the model's longest row, at most 1024."
    )
    packing: Literal["stream", "best_fit"] | None = arg(
        None,
        "stream: all documents end to end, cut into rows; best_fit: rows of whole documents,"
        " padded; null: best_fit for conversations, else stream.",
    )
    document_mask: bool | None = arg(
        None,
        "Tokens see only their own document, and its positions start at 0; null: on for"
        " conversations, else off.",
    )
    leakage_report: bool = arg(
        True, "Count the validation documents and 13-grams that also occur in training."
    )
    cache_dir: str = arg(
        "token_cache", "Folder for tokenized data, built once and used again by later runs."
    )


@dataclass
class LoraArguments:
    """Low-rank adapters (LoRA): a few small matrices are trained beside weights that stay."""

    _argument_group_name = "LoRA"

    lora_rank: int | None = arg(
        None,
        "Train adapters of this rank in place of the model's own weights, by the package peft;"
        " null: train the weights.",
    )
    lora_alpha: float | None = arg(
        None,
        "The adapters' output is scaled by lora_alpha / lora_rank; null: twice the rank.",
    )
    lora_dropout: float = arg(0.0, "Dropout probability of what goes into the adapters, 0 to 1.")
    lora_target_modules: list[str] = arg(
        ["all-linear"],
        "Modules that get an adapter, by the end of their names, such as q_proj v_proj; all-linear:"
        " every linear layer but the head.",
    )
    lora_modules_to_save: list[str] = arg(
        [], "Modules that are trained whole beside the adapters, by name, such as lm_head."
    )
    use_rslora: bool = arg(
        False, "Scale by lora_alpha / sqrt(lora_rank): high ranks learn as fast as low ones."
    )
    use_dora: bool = arg(
        False, "DoRA: learn the length of each weight column apart from its direction."
    )
    merge_adapter: bool = arg(
        False, "Write final/ and best/ as plain models with the adapters added to the weights."
    )


@dataclass
class OptimizationArguments:
    """How long and how fast it learns."""

    _argument_group_name = "optimization"

    learning_rate: float = arg(5e-5, "Peak learning rate.")
    learning_rate_factors: dict[str, Any] = arg(
        {},
        "Parameters with a learning rate of their own: a JSON object of patterns of their names and"
        ' factors, such as {"*.wte.*": 0.1, "*lora_B*": 16}; of several that fit, the last counts.',
    )
    freeze_parameters: list[str] = arg(
        [],
        "Parameters that stay as they are: patterns of their names, such as *.wte.* or *.h.[0-5].*"
        " (in a shell in quotes); one with ! in front takes its parameters out again, and the last"
        " that fits counts.",
    )
    label_smoothing_factor: float = arg(
        0.0,
        "Share of each target that is spread evenly over the vocabulary, 0 to 1. It shapes the"
        " gradient; the losses that are logged stay the plain cross-entropy.",
    )
    neftune_noise_alpha: float | None = arg(
        None,
        "NEFTune: uniform noise on the embeddings while training, of alpha / sqrt(tokens x width);"
        " 5 is usual for fine-tuning on conversations; null: none.",
    )
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
    optim: Literal["adamw", "muon", "adamw_8bit"] = arg(
        "adamw",
        "adamw; muon: Muon for the matrices of the blocks, AdamW for embeddings, norms, biases and"
        " the head, at the same learning rate; adamw_8bit: AdamW with moments in 8 bits, on GPUs"
        " with the package bitsandbytes.",
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
    max_train_hours: float | None = arg(
        None,
        "Hours of training, pauses for saving and evaluating included: the decay ends with them,"
        " and a last checkpoint lies within them; null: max_steps or num_train_epochs decide.",
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

    mixed_precision: Literal["auto", "bf16", "fp16", "fp8", "fp32"] = arg(
        "auto",
        "Arithmetic of the forward pass; auto: bf16 where the device computes it, else fp32; fp8:"
        " the blocks' matrices in 8 bits by the package torchao, all else as bf16.",
    )
    tf32: bool | None = arg(
        None,
        "On NVIDIA GPUs, round what is multiplied in float32 to TF32's 10 bits: several times as"
        " fast; null: beside bf16, fp16 and fp8, not with fp32.",
    )
    deterministic: bool = arg(
        True,
        "On GPUs, use algorithms that give the same bits each time, where torch has them, though"
        " some are slower; false: a continued run differs in the last bits. CPUs need no choice.",
    )
    gradient_checkpointing: bool = arg(
        False, "Compute activations again in the backward pass: less memory, about a third slower."
    )
    chunked_loss: bool | None = arg(
        None,
        "Compute the loss over a part of the positions at a time, so that the logits never exist as"
        " a whole; null: where they would take much memory.",
    )
    pad_vocab_to_multiple_of: int | None = arg(
        None,
        "Pad embedding and head to so many rows, which GPUs multiply faster. The rows are never"
        " predicted, change no loss and are cut off from models in final/ and best/; 1: never;"
        " null: 64 for new models of 16,384 tokens or more.",
    )
    cpu_fast_path: bool = arg(
        True,
        "On a CPU, keep freed memory for the next step and compute GELU's tanh form and dropout in"
        " one operation each: the same functions, faster.",
    )
    use_liger_kernel: bool = arg(
        False,
        "On GPUs, compute norms, rotary positions and gated MLPs by the package liger-kernel, for"
        " the model types that it knows.",
    )
    torch_compile: bool = arg(
        False, "Compile the model with torch.compile: slow to start, faster afterwards."
    )
    torch_compile_scope: Literal["blocks", "model"] = arg(
        "blocks",
        "What is compiled: blocks: one block, whose code serves all, which starts sooner; model:"
        " the whole model with its loss.",
    )
    torch_compile_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = arg(
        "default",
        "torch.compile's mode: reduce-overhead replays each step as a CUDA graph, max-autotune also"
        " tries out kernels, which takes minutes.",
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
    async_save: bool = arg(
        False,
        "Train on while a checkpoint is written: the run pauses only to copy it to memory"
        " (/dev/shm). On one machine with Linux.",
    )
    save_best: bool = arg(
        False, "Save a checkpoint whenever metric_for_best_model is the best so far."
    )
    resume_from_checkpoint: str = arg(
        "auto",
        "auto: continue from the newest checkpoint in output_dir, if there is one; none: refuse a"
        " folder that has one; or the path of a checkpoint.",
    )
    reset_optimizer: bool = arg(
        False,
        "Continue with the checkpoint's weights and position but a new optimizer, where its state"
        " cannot be read.",
    )
    allow_resume_change: list[str] = arg(
        [],
        "What may differ from the checkpoint that is continued: data, block_size,"
        " global_batch_size, seed. The curve is then another one.",
        choices=("data", "block_size", "global_batch_size", "seed"),
    )
    on_save_error: Literal["stop", "continue"] = arg(
        "stop",
        "What follows a checkpoint that cannot be written, on a full disk for example; those before"
        " it stay. continue: a warning, and the next try when it is due.",
    )
    save_before_timeout: float | None = arg(
        None,
        "Minutes after its start when the run saves a checkpoint and ends, to be chosen a little"
        " below the time limit of a job; null: no limit.",
    )


@dataclass
class HealthArguments:
    """What happens when a step goes wrong."""

    _argument_group_name = "health"

    max_skipped_steps: int = arg(
        10,
        "Steps in a row that may be left out before the run ends. Left out is a step whose loss or"
        " gradient norm is not finite, or a spike; it changes no weight.",
    )
    skip_spikes: float | None = arg(
        None,
        "Leave a step out whose loss or gradient norm is more than so many robust standard"
        " deviations above the last 128 (try 10); null: never.",
    )
    max_rewinds: int = arg(
        0,
        "How often the run may, in place of ending, go back to its newest checkpoint and pass over"
        " the samples between it and the last step left out.",
    )
    replica_check_steps: int | None = arg(
        1000,
        "Every so many steps, make sure that processes which hold the same weights hold the same"
        " bits, and end the run where they do not; null: never.",
    )


@dataclass
class EvaluationArguments:
    """How the model is judged on the validation data."""

    _argument_group_name = "evaluation"

    eval_steps: int | None = arg(
        500, "Evaluate every so many steps, and at the start and the end; null: never."
    )
    eval_max_batches: int | None = arg(
        None,
        "Batches of global_batch_size rows in one evaluation, taken evenly from the validation"
        " data; null: all of it.",
    )
    per_device_eval_batch_size: int | None = arg(
        None, "Rows in one evaluation batch of one process; null: as in training."
    )
    eval_metrics: list[str] = arg(
        ["perplexity", "bits_per_byte", "token_accuracy"],
        "Metrics beside the loss: perplexity, bits_per_byte, token_accuracy, or what evaluate.load"
        " takes: a name, or the path of a metric's Python file, fed with token ids.",
    )
    metric_for_best_model: str = arg(
        "eval/loss",
        "Metric that save_best and early stopping go by, as it is logged: eval/loss,"
        " eval/math/loss (of the validation set math), eval/token_accuracy, ...",
    )
    greater_is_better: bool | None = arg(
        None,
        "Whether that metric should rise; null: not for a loss, perplexity and bits per byte, else"
        " yes.",
    )
    eval_only: bool = arg(False, "Evaluate once, print the result and stop.")
    early_stopping_patience: int | None = arg(
        None, "Stop after so many evaluations in a row without a better result; null: never."
    )
    early_stopping_min_delta: float = arg(
        0.0,
        "By how much metric_for_best_model must be better to count for early_stopping_patience, in"
        " early_stopping_min_delta_unit.",
    )
    early_stopping_min_delta_unit: Literal["absolute", "standard_errors"] = arg(
        "absolute",
        "absolute: as the metric is logged (a loss in nats per token); standard_errors: of the"
        " difference of a loss, row by row, to the best one before.",
    )
    sample_prompt: list[str] = arg(
        [],
        "Texts that the model continues, greedily and at random, to show what it has learned;"
        " trained on conversations alone, it answers them.",
    )
    sample_validation_prompts: int = arg(
        0, "Further such texts: the beginnings of so many validation documents."
    )
    sample_steps: int | None = arg(
        None, "Let it continue them every so many steps; null: only at the end of the run."
    )
    sample_max_new_tokens: int = arg(160, "Length of a continuation in tokens.")
    sample_temperature: float = arg(
        0.7, "Temperature of the continuation at random; 0: only the greedy one."
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
    tracking: Literal["required", "optional"] = arg(
        "required",
        "What follows a tracker that cannot be reached at the start: required: the run does not"
        " begin; optional: it runs with train_log.jsonl alone, and says so.",
    )
    tracking_uri: str | None = arg(
        None,
        "MLflow store or server; null: the environment's MLFLOW_TRACKING_URI, else ./mlflow.db.",
    )
    sweep: str | None = arg(
        None,
        "Name of a sweep: the run is filed in MLflow as a child of the run of this name, which the"
        " first of them makes.",
    )
    log_model: bool = arg(
        False, "Log the finished model to MLflow, with its signature, beside final/."
    )
    register_model: str | None = arg(
        None, "Log it and register it in MLflow's model registry under this name; null: do not."
    )
    log_system_metrics: bool = arg(
        True, "Log the load of processors, memory, disk, network and GPUs as system/ metrics."
    )


@dataclass
class HubArguments:
    """Where the finished model is published."""

    _argument_group_name = "hub"

    push_to_hub: bool = arg(
        False,
        "Upload final/ with its model card to the Hugging Face hub at the end. HF_TOKEN in the"
        " environment, or `hf auth login`, says who you are; that is tried before step 0. An upload"
        " that fails can be made later.",
    )
    hub_model_id: str | None = arg(
        None, "Repository to upload it to, as OWNER/NAME or NAME; null: run_name."
    )
    hub_private_repo: bool = arg(
        True, "Make that repository private where it is new; an existing one stays as it is."
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
    ddp_timeout: int = arg(
        1800, "Seconds that a process waits for the others in one exchange before the run ends."
    )
    dry_run: bool = arg(
        False,
        "Print what the run would do and need, refuse what cannot work, and stop: no weight is"
        " allocated and nothing is trained.",
    )
    dry_run_steps: int | None = arg(
        None,
        "With dry_run, also train so many steps, which are thrown away, to tell how long the run"
        " will take; null: none.",
    )
    find_batch_size: bool = arg(
        False,
        "Rehearse the longest batch through a whole step, evaluation and save, with more and more"
        " rows, print the per_device_train_batch_size and gradient_accumulation_steps that fit the"
        " same global_batch_size, and stop.",
    )
    verify_resume: int | None = arg(
        None,
        "Prove that this run continues bit for bit on this machine: train twice so many steps with"
        " kills and without, compare everything, and stop; null: train.",
    )
    from_run: str | None = arg(
        None,
        "Run an earlier run again: its output_dir, one of its checkpoints or its MLflow run id."
        " Files and flags go before its arguments; it is written to a folder of its own.",
    )
    show_arguments: bool = arg(
        False,
        "Print all arguments with where each comes from, as YAML that can be run, and stop.",
    )


@dataclass
class Arguments(
    RunArguments,
    HubArguments,
    LoggingArguments,
    EvaluationArguments,
    HealthArguments,
    CheckpointArguments,
    PrecisionArguments,
    OptimizationArguments,
    LoraArguments,
    DataArguments,
    ModelArguments,
):
    """All groups in one flat namespace; a function that needs one group says which by its type."""

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value came from, by its name: "default", "run.yaml line 12", ...

        Empty where they were not read by `llm_training/argument_parsing.py`. It is no field: equal
        arguments are equal whatever their origins. `dataclasses.replace` leaves it behind.
        """
        return dict(vars(self).get("_origins", {}))

    def with_origins(self, origins: Mapping[str, str]) -> Arguments:
        """The same arguments, which know where they came from."""
        known = dataclasses.replace(self)
        vars(known)["_origins"] = dict(origins)
        return known


GROUPS: Sequence[Any] = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    OptimizationArguments,
    PrecisionArguments,
    CheckpointArguments,
    HealthArguments,
    EvaluationArguments,
    LoggingArguments,
    HubArguments,
    RunArguments,
)


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


# What a source of train_mixture may set for itself, beside its weight.
SOURCE_ARGUMENTS = (
    *("train_file", "validation_file", "exclude_files", "dataset_name", "dataset_config_name"),
    *("dataset_split", "dataset_validation_split", "dataset_revision", "text_column"),
    *("messages_column", "prompt_column", "completion_column", "document_separator"),
    *("min_document_characters", "drop_duplicates", "skip_bad_files", "skip_bad_documents"),
    "validation_split_percentage",
)


def mixture_sources(arguments: Arguments) -> dict[str, Arguments]:
    """The arguments of each source by its name; without a mixture, the arguments as they are."""
    if not arguments.train_mixture:
        return {"": arguments}
    return {
        name: dataclasses.replace(
            arguments,
            train_mixture={},
            **{key: value for key, value in source.items() if key != "weight"},
        )
        for name, source in arguments.train_mixture.items()
    }


def holds_conversations(arguments: DataArguments) -> bool:
    """Whether the columns named are those of conversations."""
    return any((arguments.messages_column, arguments.prompt_column, arguments.completion_column))


def describe(arguments: Arguments) -> dict[str, Any]:
    """All arguments as a flat dict, in the order of the groups."""
    return dataclasses.asdict(arguments)


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
    for problem in batch_problems(arguments, num_processes):
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


def batch_problems(arguments: Arguments, num_processes: int) -> Iterator[str]:
    """What is wrong with the batch sizes given, with the arithmetic: at most one sentence."""
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
