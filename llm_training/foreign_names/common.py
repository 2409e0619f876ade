"""What trainers of one's own commonly call their settings, in YAML and TOML files and as flags."""

from __future__ import annotations

from typing import Any

from llm_training.foreign_names.conversions import (
    above_zero_or_null,
    betas,
    end_of_decay,
    half_precision,
    if_true,
    number,
    optimizer,
    paths,
    percent,
    precision,
    schedule,
    shape,
    share_of_peak,
    share_of_steps,
    switch,
    wandb,
)
from llm_training.foreign_names.form import (
    CannotConvert,
    Conversion,
    Settings,
    Tool,
    converted,
    left_out,
    renamed,
)

MICRO = "micro_batch_size device_batch_size"
MODELS = "model arch architecture model_name base_model model.name model.type"
ACCUMULATION = (
    "grad_accum_steps grad_accum gradient_accumulation grad_accumulation_steps accumulation_steps"
    " accumulate_grad_steps"
)


def _is_given(names: str, settings: Settings) -> bool:
    return any(name in settings for name in names.split())


def _batch_size(value: Any, settings: Settings) -> dict[str, Any]:
    """The rows of a step; where only accumulation stands beside it, those of a forward pass."""
    accumulates = _is_given(f"{ACCUMULATION} gradient_accumulation_steps", settings)
    if accumulates and not _is_given(MICRO, settings):
        return {"per_device_train_batch_size": value}
    return {"global_batch_size": value}


def _model(value: Any, settings: Settings) -> dict[str, Any]:
    if not isinstance(value, str):
        raise CannotConvert("name it: model_name_or_path for weights, model_type for a new one")
    is_weights = "/" in value or "-" in value
    return {"model_name_or_path" if is_weights else "model_type": value}


def _gpt2(key: str, elsewhere: str) -> Conversion:
    """GPT-2's spelling of a size, kept where the model is a GPT-2 or not named."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        named = [settings[name] for name in ("model_type", *MODELS.split()) if name in settings]
        return {"config_overrides": {key if named in ([], ["gpt2"]) else elsewhere: value}}

    return convert


def _data_format(value: Any, settings: Settings) -> dict[str, Any]:
    raise CannotConvert("the endings of the files in train_file say it (.txt, .jsonl, .bin, ...)")


def _tracked_by_wandb(value: Any, settings: Settings) -> dict[str, Any]:
    return wandb(value.get("enabled", True) if isinstance(value, dict) else value, settings)


def _resume(value: Any, settings: Settings) -> dict[str, Any]:
    if value is False:
        return {"resume_from_checkpoint": "none"}
    if value in (None, True, "auto", "latest", "last"):
        return {}  # auto, which is the default
    raise CannotConvert("checkpoints of other tools are not read; weights: model_name_or_path")


def _compiled(value: Any, settings: Settings) -> dict[str, Any]:
    return {"torch_compile": switch(value)}


def _device(value: Any, settings: Settings) -> dict[str, Any]:
    return {"device": str(value).partition(":")[0]}


def _no_share(value: Any, settings: Settings) -> dict[str, Any]:
    if number(value) < 1 and value:
        return share_of_steps("warmup_steps")(value, settings)
    return {"warmup_steps": value}


LAUNCH = "launch with accelerate launch --config_file accelerate_configs/"
DEEPSPEED = f"{LAUNCH}zero2.yaml, or the file of another stage"

COMMON = Tool(
    title="Other trainers",
    owner="other trainers'",
    names=(
        # Length and batch
        *renamed("max_steps", "max_iters num_iters n_iters iterations total_steps train_steps"),
        *renamed("max_steps", "num_steps n_steps num_train_steps steps max_iterations"),
        *renamed("max_steps", "num_batches", "batches of global_batch_size rows"),
        *renamed("num_train_epochs", "epochs num_epochs n_epochs max_epochs"),
        *converted(
            "global_batch_size per_device_train_batch_size",
            "batch_size train_batch_size",
            _batch_size,
            "global_batch_size; per_device_train_batch_size where accumulation alone is beside it",
        ),
        *renamed("global_batch_size", "total_batch_size effective_batch_size"),
        *renamed("per_device_train_batch_size", MICRO),
        *renamed("gradient_accumulation_steps", ACCUMULATION),
        *renamed(
            "per_device_eval_batch_size",
            "eval_batch_size val_batch_size eval.batch_size validation.batch_size",
        ),
        *renamed(
            "block_size",
            "seq_len seq_length sequence_length max_seq_len max_seq_length max_length"
            " context_length context_size ctx_len",
        ),
        # Optimizer
        *renamed("learning_rate", "lr max_lr peak_lr base_lr"),
        *converted(
            "min_lr_ratio", "min_lr final_lr lr_min min_learning_rate", share_of_peak, "/ the peak"
        ),
        *converted(
            "lr_scheduler_type", "lr_schedule lr_scheduler scheduler schedule lr_decay", schedule
        ),
        *converted(
            "warmup_steps",
            "warmup warmup_iters num_warmup_steps lr_warmup_steps",
            _no_share,
            "below 1: a share of max_steps",
        ),
        *converted(
            "warmup_steps",
            "warmup_ratio warmup_fraction",
            share_of_steps("warmup_steps"),
            "x max_steps",
        ),
        *converted("lr_decay_steps", "lr_decay_iters", end_of_decay, "minus the warm-up"),
        *renamed("lr_decay_steps", "decay_steps"),
        *converted("optim", "optimizer optimizer.name optimizer.type", optimizer, "AdamW: adamw"),
        *converted("adam_beta1 adam_beta2", "betas adam_betas", betas),
        *renamed("adam_beta1", "beta1"),
        *renamed("adam_beta2", "beta2"),
        *renamed("adam_epsilon", "eps epsilon adam_eps"),
        *renamed("weight_decay", "wd"),
        *converted(
            "max_grad_norm",
            "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip grad_clip_norm"
            " max_norm clip_norm",
            above_zero_or_null("max_grad_norm"),
            "0: null",
        ),
        # Precision and memory
        *converted(
            "mixed_precision",
            "precision dtype amp_dtype",
            precision,
            "bfloat16: bf16",
        ),
        *converted("mixed_precision", "bf16", half_precision("bf16"), "true: bf16"),
        *converted("mixed_precision", "fp16", half_precision("fp16"), "true: fp16; neither: fp32"),
        *converted("mixed_precision", "amp use_amp", if_true(mixed_precision="auto"), "true: auto"),
        *converted("torch_compile", "compile use_compile compile_model", _compiled),
        *renamed(
            "gradient_checkpointing",
            "activation_checkpointing grad_checkpointing use_gradient_checkpointing"
            " checkpoint_activations",
        ),
        *converted(
            "attn_implementation",
            "use_flash_attention flash_attention use_flash_attn",
            if_true(attn_implementation="flash_attention_2"),
            "true: flash_attention_2",
        ),
        # Model
        *converted(
            "model_type model_name_or_path",
            MODELS,
            _model,
            "a type such as gpt2, or a folder or hub id",
        ),
        *converted("config_overrides", "n_layers num_layers depth", shape("num_hidden_layers")),
        *converted("config_overrides", "d_model dim hidden_size hidden_dim", shape("hidden_size")),
        *converted(
            "config_overrides",
            "n_heads num_heads num_attention_heads",
            shape("num_attention_heads"),
        ),
        *converted(
            "config_overrides",
            "n_kv_heads num_kv_heads num_key_value_heads",
            shape("num_key_value_heads"),
        ),
        *converted(
            "config_overrides", "d_ff ffn_dim ffn_hidden_size mlp_dim", shape("intermediate_size")
        ),
        *converted("config_overrides", "num_hidden_layers", shape("num_hidden_layers")),
        *converted("config_overrides", "intermediate_size", shape("intermediate_size")),
        *converted("config_overrides", "n_layer", _gpt2("n_layer", "num_hidden_layers")),
        *converted("config_overrides", "n_embd", _gpt2("n_embd", "hidden_size")),
        *converted("config_overrides", "n_head", _gpt2("n_head", "num_attention_heads")),
        # Data
        *converted(
            "train_file",
            "data_path train_data train_path train_data_path data_dir train_files data_file",
            paths("train_file"),
        ),
        *converted(
            "validation_file",
            "val_path val_data val_file valid_path valid_file eval_file eval_data val_data_path"
            " validation_data validation_path test_file",
            paths("validation_file"),
        ),
        *renamed("dataset_name", "dataset dataset_path hf_dataset"),
        *converted("", "data_format file_format", _data_format, "the files' endings say it"),
        *converted(
            "validation_split_percentage",
            "val_split val_fraction val_ratio validation_split eval_split_ratio",
            percent,
            "a share: times 100, in percent",
        ),
        *renamed("tokenizer_name", "tokenizer tokenizer_path tokenizer_dir tokenizer_name_or_path"),
        *renamed("text_column", "text_field text_key"),
        *left_out("shuffle", "rows are drawn at random, each once an epoch", True),
        *left_out(
            "num_workers data_workers num_data_workers",
            "rows are read by the process itself, which costs it next to nothing",
        ),
        *left_out("pin_memory drop_last prefetch_factor", "there is no such choice", True),
        # Checkpoints, evaluation, logging
        *renamed(
            "save_steps",
            "save_interval_steps save_interval save_every save_freq checkpoint_interval"
            " checkpoint_every checkpoint_steps checkpoint_freq ckpt_interval ckpt_every"
            " save_every_n_steps checkpoint.interval",
        ),
        *renamed(
            "save_total_limit", "keep_last keep_last_n max_checkpoints max_to_keep keep_checkpoints"
        ),
        *renamed(
            "output_dir",
            "checkpoint_dir checkpoint_path ckpt_dir save_dir save_path out_dir output_path"
            " output_folder run_dir",
            "checkpoints lie in its folder checkpoints/",
        ),
        *converted(
            "resume_from_checkpoint",
            "resume resume_from",
            _resume,
            "true: auto, the default; false: none",
        ),
        *renamed(
            "eval_steps",
            "eval_interval_steps eval_interval eval_every eval_freq val_interval val_every"
            " validation_interval validate_every val_check_interval eval.interval",
        ),
        *renamed(
            "eval_max_batches",
            "eval_batches eval_iters max_eval_batches num_eval_batches val_batches val_steps"
            " eval.num_batches",
            "batches of global_batch_size rows",
        ),
        *renamed("early_stopping_patience", "patience"),
        *renamed(
            "logging_steps",
            "log_interval_steps log_interval log_every log_freq log_steps print_every"
            " logging_interval log_every_n_steps",
        ),
        *converted("report_to", "wandb use_wandb wandb_log", _tracked_by_wandb, "true: wandb"),
        *renamed("experiment_name", "wandb_project project project_name experiment wandb.project"),
        *renamed("run_name", "wandb_run_name wandb_name exp_name wandb.name"),
        *left_out("log_dir logging_dir tensorboard_dir", "logs go to output_dir, and by report_to"),
        *left_out("log_level verbose debug", "what matters is said, once", "info"),
        *renamed("sample_prompt", "prompt"),
        *renamed("sample_steps", "sample_every generate_every"),
        *renamed("sample_max_new_tokens", "max_new_tokens"),
        *renamed("sample_temperature", "temperature"),
        # The machine
        *renamed("seed", "random_seed rng_seed"),
        *converted("device", "device", _device, "cuda:0 is cuda: accelerate launch picks GPUs"),
        *left_out(
            "num_gpus n_gpus gpus world_size nproc nproc_per_node num_processes",
            "accelerate launch --num_processes says it",
            1,
        ),
        *left_out("ddp distributed", f"{LAUNCH}ddp.yaml"),
        *left_out("fsdp", f"{LAUNCH}fsdp.yaml"),
        *left_out("deepspeed zero_stage", DEEPSPEED),
        *left_out("tensor_parallel_size tp_size", f"{LAUNCH}tp.yaml", 1),
        *left_out("use_lora lora", "lora_rank says it: null trains all weights"),
        *renamed("lora_rank", "lora_r"),
        *converted("frozen_dtype", "load_in_4bit", if_true(frozen_dtype="nf4"), "true: nf4"),
        *left_out("load_in_8bit", "frozen_dtype has float32, bfloat16 and nf4"),
        *renamed("model_revision", "revision"),
    ),
)
