"""LitGPT, torchtitan, Megatron-LM and Lightning."""

from __future__ import annotations

from typing import Any

from llm_training.foreign_names.conversions import (
    above_zero_or_null,
    betas,
    end_of_decay,
    half_precision,
    if_true,
    minutes,
    needed,
    number,
    optimizer,
    paths,
    precision,
    schedule,
    shape,
    share_of_peak,
    share_of_steps,
    switch,
    whole,
)
from llm_training.foreign_names.form import (
    CannotConvert,
    Settings,
    Tool,
    converted,
    left_out,
    renamed,
)

LAUNCHER = "the launcher says it: accelerate launch --num_processes"
LAUNCH = "launch with accelerate launch --config_file accelerate_configs/"
DATA = "name the data yourself: train_file or dataset_name"
FUSED = "the fused form is taken"
MODEL = "name it yourself: model_name_or_path for weights, or model_type and config_overrides"


def _steps_of_tokens(value: Any, settings: Settings) -> dict[str, Any]:
    why = "divide it by the tokens of a step: global_batch_size x block_size"
    rows = needed(settings, "global_batch_size", why)
    length = needed(settings, "train.max_seq_length", why)
    return {"max_steps": max(1, int(number(value) // (rows * length)))}


def _evaluated(value: Any, settings: Settings) -> dict[str, Any]:
    why = "a batch is global_batch_size rows here: multiply by micro_batch_size / global_batch_size"
    rows = number(value) * needed(settings, "train.micro_batch_size", why)
    return {"eval_max_batches": max(1, whole(rows / needed(settings, "global_batch_size", why)))}


def _per_row(value: Any, settings: Settings) -> dict[str, Any]:
    why = "divide it by global_batch_size"
    return {"max_steps": int(number(value) // needed(settings, "global_batch_size", why))}


def _megatron_optimizer(value: Any, settings: Settings) -> dict[str, Any]:
    return optimizer("adamw" if value == "adam" else value, settings)


def _titan_rows(value: Any, settings: Settings) -> dict[str, Any]:
    return {"global_batch_size": value} if number(value) > 0 else {}


def _share_that_decays(value: Any, settings: Settings) -> dict[str, Any]:
    ours = share_of_steps("lr_decay_steps")(value, settings)
    return {"lr_scheduler_type": "warmup-stable-decay", **ours} if value else {}


def _titan_shape(value: Any, settings: Settings) -> dict[str, Any]:
    if settings.get("lr_scheduler.decay_ratio"):
        if value != "linear":
            raise CannotConvert("the decay of warmup-stable-decay is linear here")
        return {}
    return schedule(value, settings)


def _recomputed(value: Any, settings: Settings) -> dict[str, Any]:
    return {"gradient_checkpointing": value not in (None, False, "none")}


def _checkpoint_interval(value: Any, settings: Settings) -> dict[str, Any]:
    enabled = settings.get("checkpoint.enable", settings.get("checkpoint.enable_checkpoint"))
    return {"save_steps": None if enabled is False else value}


def _batches_or_share(value: Any, settings: Settings) -> dict[str, Any]:
    if type(value) is float:
        raise CannotConvert("a share: eval_max_batches takes a number of batches")
    return {"eval_max_batches": value}


def _epoch_or_steps(value: Any, settings: Settings) -> dict[str, Any]:
    if type(value) is float:
        raise CannotConvert("a share of an epoch: eval_steps takes a number of steps")
    return {"eval_steps": value}


def _last_checkpoints(value: Any, settings: Settings) -> dict[str, Any]:
    return {"save_total_limit": value if number(value) > 0 else None}


LITGPT = Tool(
    title="LitGPT",
    owner="LitGPT's",
    names=(
        *left_out("model_name model_config initial_checkpoint_dir checkpoint_dir", MODEL),
        *renamed("output_dir", "out_dir"),
        *converted("mixed_precision", "precision", precision, "bf16-mixed and bf16-true: bf16"),
        *left_out("data data.class_path", DATA),
        *converted("train_file", "train_data_path", paths("train_file")),
        *converted("validation_file", "val_data_path", paths("validation_file")),
        *renamed("tokenizer_name", "tokenizer_dir"),
        *left_out("devices num_nodes", LAUNCHER, 1),
        *left_out("logger_name", "report_to: mlflow, tensorboard, wandb", "csv"),
        *left_out("resume", "the same command goes on from the newest checkpoint", "auto"),
        *renamed("save_steps", "train.save_interval"),
        *renamed("logging_steps", "train.log_interval"),
        *renamed("per_device_train_batch_size", "train.micro_batch_size"),
        *converted("warmup_steps", "train.lr_warmup_fraction", share_of_steps("warmup_steps")),
        *renamed("warmup_steps", "train.lr_warmup_steps"),
        *renamed("num_train_epochs", "train.epochs"),
        *converted(
            "max_steps",
            "train.max_tokens",
            _steps_of_tokens,
            "max_tokens / (global_batch_size x block_size)",
        ),
        *renamed("block_size", "train.max_seq_length"),
        *left_out("train.tie_embeddings", "in config_overrides: tie_word_embeddings"),
        *converted("max_grad_norm", "train.max_norm", above_zero_or_null("max_grad_norm")),
        *converted("min_lr_ratio", "train.min_lr", share_of_peak, "min_lr / learning_rate"),
        *renamed("eval_steps", "eval.interval"),
        *converted(
            "eval_max_batches",
            "eval.max_iters",
            _evaluated,
            "x micro_batch_size / global_batch_size: batches are global_batch_size rows here",
        ),
        *renamed("sample_max_new_tokens", "eval.max_new_tokens"),
        *left_out("eval.initial_validation eval.final_validation", "always both", True),
        *left_out("eval.evaluate_example", "sample_prompt names texts to continue"),
        *converted("optim", "optimizer optimizer.class_path", optimizer, "AdamW: adamw"),
        *renamed("learning_rate", "lr"),
        *converted("adam_beta1 adam_beta2", "betas", betas),
        *renamed("lora_rank", "lora_r"),
        *left_out("quantize", "weights are kept in fp32"),
    ),
)

TORCHTITAN = Tool(
    title="torchtitan",
    owner="torchtitan's",
    names=(
        *renamed("output_dir", "job.dump_folder"),
        *left_out("job.description job.print_config job.print_args", "run_name names a run"),
        *left_out("model.name model.flavor model.hf_assets_path", MODEL),
        *renamed("tokenizer_name", "model.tokenizer_path"),
        *left_out("training.dataset training.dataset_path", DATA),
        *converted("optim", "optimizer.name", optimizer, "AdamW: adamw"),
        *renamed("learning_rate", "optimizer.lr"),
        *renamed("adam_beta1", "optimizer.beta1"),
        *renamed("adam_beta2", "optimizer.beta2"),
        *renamed("adam_epsilon", "optimizer.eps"),
        *left_out("optimizer.implementation optimizer.fused", FUSED, "fused"),
        *renamed("warmup_steps", "lr_scheduler.warmup_steps"),
        *converted(
            "lr_scheduler_type lr_decay_steps",
            "lr_scheduler.decay_ratio",
            _share_that_decays,
            "warmup-stable-decay; lr_decay_steps: times training.steps",
        ),
        *converted("lr_scheduler_type", "lr_scheduler.decay_type", _titan_shape),
        *renamed("min_lr_ratio", "lr_scheduler.min_lr_factor lr_scheduler.lr_min"),
        *renamed("per_device_train_batch_size", "training.local_batch_size training.batch_size"),
        *converted(
            "global_batch_size", "training.global_batch_size", _titan_rows, "-1: leave it out"
        ),
        *renamed("block_size", "training.seq_len"),
        *converted("max_grad_norm", "training.max_norm", above_zero_or_null("max_grad_norm")),
        *renamed("max_steps", "training.steps"),
        *renamed("seed", "training.seed"),
        *renamed("deterministic", "training.deterministic"),
        *converted("mixed_precision", "training.mixed_precision_param", precision),
        *left_out("training.mixed_precision_reduce", "gradients are summed in fp32", "float32"),
        *left_out("training.gc_freq training.enable_cpu_offload", "zero3_offload.yaml offloads"),
        *converted(
            "torch_compile", "training.compile compile.enable", lambda v, _: {"torch_compile": v}
        ),
        *left_out("parallelism.data_parallel_shard_degree", f"{LAUNCH}fsdp.yaml", -1),
        *left_out("parallelism.data_parallel_replicate_degree", f"{LAUNCH}ddp.yaml", 1),
        *left_out("parallelism.tensor_parallel_degree", f"{LAUNCH}tp.yaml", 1),
        *left_out("parallelism.context_parallel_degree", f"{LAUNCH}cp.yaml", 1),
        *left_out("parallelism.pipeline_parallel_degree", "models are not split by layers", 1),
        *converted("save_steps", "checkpoint.interval", _checkpoint_interval),
        *converted(
            "save_total_limit",
            "checkpoint.keep_latest_k",
            above_zero_or_null("save_total_limit"),
            "0: null",
        ),
        *converted(
            "async_save",
            "checkpoint.async_mode",
            lambda value, _: {"async_save": value not in (None, "disabled")},
            "async and async_with_pinned_mem: true",
        ),
        *left_out("checkpoint.folder", "checkpoints/ in output_dir", "checkpoint"),
        *left_out("checkpoint.enable checkpoint.enable_checkpoint", "save_steps", True),
        *left_out("checkpoint.last_save_model_only", "final/ is the model alone", True),
        *converted(
            "gradient_checkpointing",
            "activation_checkpoint.mode",
            _recomputed,
            "selective and full: true (every block)",
        ),
        *left_out("activation_checkpoint.selective_ac_option", "every block", "2"),
        *renamed("logging_steps", "metrics.log_freq"),
        *converted(
            "report_to",
            "metrics.enable_tensorboard",
            lambda value, _: {"report_to": ["tensorboard"]} if switch(value) else {},
            "true: tensorboard",
        ),
        *converted(
            "report_to",
            "metrics.enable_wandb",
            lambda value, _: {"report_to": ["wandb"]} if switch(value) else {},
            "true: wandb",
        ),
        *left_out("metrics.save_tb_folder metrics.disable_color_printing", "in output_dir", "tb"),
        *renamed("eval_steps", "validation.freq"),
        *renamed("eval_max_batches", "validation.steps", "batches of global_batch_size rows here"),
    ),
)

MEGATRON = Tool(
    title="Megatron-LM",
    owner="Megatron-LM's",
    names=(
        *converted("config_overrides", "num_layers", shape("num_hidden_layers")),
        *converted("config_overrides", "hidden_size", shape("hidden_size")),
        *converted("config_overrides", "ffn_hidden_size", shape("intermediate_size")),
        *converted("config_overrides", "num_attention_heads", shape("num_attention_heads")),
        *converted("config_overrides", "num_query_groups", shape("num_key_value_heads")),
        *converted("config_overrides", "max_position_embeddings", shape("max_position_embeddings")),
        *left_out("swiglu normalization position_embedding_type group_query_attention", MODEL),
        *left_out("untie_embeddings_and_output_weights", "tie_word_embeddings: config_overrides"),
        *left_out("disable_bias_linear init_method_std rotary_base", MODEL),
        *converted("dropout", "hidden_dropout attention_dropout", lambda v, _: {"dropout": v}),
        *renamed("block_size", "seq_length"),
        *renamed("per_device_train_batch_size", "micro_batch_size"),
        *renamed("max_steps", "train_iters"),
        *converted("max_steps", "train_samples", _per_row, "train_samples / global_batch_size"),
        *renamed("learning_rate", "lr"),
        *converted("min_lr_ratio", "min_lr", share_of_peak, "min_lr / lr"),
        *converted("lr_scheduler_type", "lr_decay_style", schedule, "WSD: warmup-stable-decay"),
        *converted("lr_decay_steps", "lr_decay_iters", end_of_decay, "minus lr_warmup_iters"),
        *renamed("warmup_steps", "lr_warmup_iters"),
        *converted("warmup_steps", "lr_warmup_fraction", share_of_steps("warmup_steps")),
        *renamed("lr_decay_steps", "lr_wsd_decay_iters"),
        *converted("max_grad_norm", "clip_grad", above_zero_or_null("max_grad_norm"), "0: null"),
        *renamed("adam_epsilon", "adam_eps"),
        *converted("optim", "optimizer", _megatron_optimizer, "adam, which is AdamW: adamw"),
        *converted("mixed_precision", "bf16", half_precision("bf16"), "true: bf16"),
        *converted("mixed_precision", "fp16", half_precision("fp16"), "true: fp16"),
        *renamed("output_dir", "save"),
        *left_out("load", "the same command goes on from the newest checkpoint in output_dir"),
        *renamed("save_steps", "save_interval"),
        *renamed("eval_steps", "eval_interval"),
        *renamed("eval_max_batches", "eval_iters"),
        *renamed("logging_steps", "log_interval"),
        *converted(
            "save_before_timeout",
            "exit_duration_in_mins",
            lambda value, _: {"save_before_timeout": value},
        ),
        *left_out("data_path split", f"{DATA}; its .bin and .idx files are not read"),
        *left_out("tokenizer_type vocab_file merge_file", "tokenizer_name: a folder or hub id"),
        *renamed("tokenizer_name", "tokenizer_model"),
        *renamed("pad_vocab_to_multiple_of", "make_vocab_size_divisible_by"),
        *left_out("tensor_model_parallel_size", f"{LAUNCH}tp.yaml", 1),
        *left_out("context_parallel_size", f"{LAUNCH}cp.yaml", 1),
        *left_out("pipeline_model_parallel_size", "models are not split by layers", 1),
        *left_out("use_distributed_optimizer", f"{LAUNCH}zero1.yaml"),
        *converted(
            "gradient_checkpointing",
            "recompute_activations",
            if_true(gradient_checkpointing=True),
            "true",
        ),
        *converted("gradient_checkpointing", "recompute_granularity", _recomputed, "every block"),
        *converted("ddp_timeout", "distributed_timeout_minutes", minutes("ddp_timeout"), "x 60"),
        *left_out("distributed_backend", "NCCL on GPUs, gloo on CPUs", "nccl"),
        *converted(
            "attn_implementation",
            "use_flash_attn",
            if_true(attn_implementation="flash_attention_2"),
            "true: flash_attention_2",
        ),
        *left_out("tensorboard_dir", "report_to tensorboard"),
        *renamed("run_name", "wandb_exp_name"),
        *renamed("experiment_name", "wandb_project"),
    ),
)

LIGHTNING = Tool(
    title="Lightning",
    owner="Lightning's",
    names=(
        *converted("max_steps", "max_steps", above_zero_or_null("max_steps"), "-1: null"),
        *renamed("num_train_epochs", "max_epochs"),
        *renamed("gradient_accumulation_steps", "accumulate_grad_batches"),
        *converted("max_grad_norm", "gradient_clip_val", above_zero_or_null("max_grad_norm")),
        *left_out("gradient_clip_algorithm", "gradients are clipped by their norm", "norm"),
        *converted("mixed_precision", "precision", precision, "bf16-mixed: bf16; 32-true: fp32"),
        *converted("eval_steps", "val_check_interval", _epoch_or_steps, "steps, not a share"),
        *left_out("check_val_every_n_epoch", "eval_steps", 1),
        *converted("eval_max_batches", "limit_val_batches", _batches_or_share, "not a share"),
        *left_out("limit_train_batches", "max_steps ends a run", 1.0),
        *left_out("num_sanity_val_steps", "the first evaluation is before the first step", 2),
        *renamed("logging_steps", "log_every_n_steps"),
        *renamed("save_steps", "every_n_train_steps"),
        *converted("save_total_limit", "save_top_k", _last_checkpoints, "-1: null; the newest"),
        *renamed("output_dir", "default_root_dir"),
        *renamed("early_stopping_patience", "patience"),
        *left_out("devices num_nodes", LAUNCHER, "auto"),
        *left_out("accelerator", "device: auto, cpu, cuda or mps", "auto"),
        *left_out("strategy", f"{LAUNCH}ddp.yaml or fsdp.yaml", "auto"),
        *left_out("enable_progress_bar enable_model_summary enable_checkpointing", "always", True),
        *left_out("benchmark inference_mode detect_anomaly", "not an argument here", True),
    ),
)
