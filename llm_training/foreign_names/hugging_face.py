"""Hugging Face: the fields of `TrainingArguments`, and the arguments of the script run_clm.py."""

from __future__ import annotations

from typing import Any

from llm_training.foreign_names.conversions import (
    above_zero_or_null,
    half_precision,
    if_true,
    literal,
    number,
    optimizer,
    paths,
    precision,
    schedule,
    share_of_peak,
    share_of_steps,
    steps_or_share,
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

TRACKERS = ("mlflow", "tensorboard", "wandb")


def _schedule(value: Any, settings: Settings) -> dict[str, Any]:
    """The shape, and where its lowest rate and its decay stand in lr_scheduler_kwargs."""
    ours = schedule(value, settings)
    more = settings.get("lr_scheduler_kwargs")
    more = more if isinstance(more, dict) else {}
    if ours["lr_scheduler_type"] == "constant":
        return ours
    ours["min_lr_ratio"] = more.get("min_lr_rate") or more.get("min_lr_ratio") or 0.0
    if "min_lr" in more:
        ours |= share_of_peak(more["min_lr"], settings)
    if "num_decay_steps" in more:
        ours["lr_decay_steps"] = more["num_decay_steps"]
    return ours


def _warmup(value: Any, settings: Settings) -> dict[str, Any]:
    if settings.get("lr_scheduler_type") == "constant":
        return {"warmup_steps": 0}  # Hugging Face ignores it there
    if number(value) == 0 and settings.get("warmup_ratio"):
        return {}
    return steps_or_share("warmup_steps")(value, settings)


def _warmup_ratio(value: Any, settings: Settings) -> dict[str, Any]:
    steps = settings.get("warmup_steps") or 0
    is_constant = settings.get("lr_scheduler_type") == "constant"
    return {} if steps or is_constant else share_of_steps("warmup_steps")(value, settings)


def _epochs(value: Any, settings: Settings) -> dict[str, Any]:
    has_steps = number(settings.get("max_steps") or 0) > 0
    return {} if has_steps else {"num_train_epochs": value}


def _interval(ours: str, *strategies: str) -> Conversion:
    """Steps or a share of them; the strategy, where it is given, can take their meaning away."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        strategy = next((settings[name] for name in strategies if name in settings), "steps")
        if value is None or strategy != "steps":
            return {}
        return steps_or_share(ours)(value, settings)

    return convert


def _strategy(ours: str) -> Conversion:
    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        if value == "steps":
            every = settings.get(ours) or settings.get("logging_steps", 500)
            return {} if settings.get(ours) else steps_or_share(ours)(every, settings)
        if value == "no" and ours != "logging_steps":
            return {ours: None}
        if value == "best":
            return {"save_best": True}
        if value == "no":
            raise CannotConvert("the log is always written; logging_steps says how often")
        raise CannotConvert(f"here it goes by steps: set {ours} to the steps of one epoch")

    return convert


def _private(value: Any, settings: Settings) -> dict[str, Any]:
    return {} if value is None else {"hub_private_repo": value}


def _trackers(value: Any, settings: Settings) -> dict[str, Any]:
    if value in (None, [], "none", ["none"]):
        return {"report_to": ["none"]}
    named = value if isinstance(value, list) else [value]
    known = [name for name in named if name in TRACKERS]
    if len(known) < len(named):
        raise CannotConvert(f"report_to takes {', '.join(TRACKERS)} or none: name those")
    return {"report_to": known}


def _continued(value: Any, settings: Settings) -> dict[str, Any]:
    if value in (None, True, "True", "true"):
        return {}  # auto, which is the default
    if value is False:
        return {"resume_from_checkpoint": "none"}
    raise CannotConvert("checkpoints of other tools are not read; weights: model_name_or_path")


def _judged_by(value: Any, settings: Settings) -> dict[str, Any]:
    words = str(value or "loss").removeprefix("eval_")
    if words == "loss":
        return {"metric_for_best_model": "eval/loss"}
    if words.endswith("_loss"):  # of one validation set of several
        return {"metric_for_best_model": f"eval/{words.removesuffix('_loss')}/loss"}
    raise CannotConvert("name it as it is logged here, such as eval/token_accuracy")


def _overrides(value: Any, settings: Settings) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return {"config_overrides": value or {}}
    pairs = [pair.split("=") for pair in str(value).split(",")]
    if not all(len(pair) == 2 for pair in pairs):
        raise CannotConvert(f"{value!r:.60} is not key=value,...")
    return {"config_overrides": {key: literal(word) for key, word in pairs}}


def _same(name: str) -> Conversion:
    """Ours by name and meaning; null, which stands for its default there, says nothing."""
    return lambda value, _: {} if value is None else {name: value}


def _seed_of_data(value: Any, settings: Settings) -> dict[str, Any]:
    if value is not None and value != settings.get("seed", 42):
        raise CannotConvert("one seed serves weights, order and dropout")
    return {}


LAUNCH = "launch with accelerate launch --config_file accelerate_configs/"
HUB = "final/ is uploaded once, at the end (push_to_hub)"
ALWAYS = "it is always so"
LOADER = "rows are read from a memory map by the process itself, which costs it next to nothing"
DDP = "Accelerate's file and torch's defaults decide: see accelerate_configs/ddp.yaml"

LENGTH = (
    *converted("max_steps", "max_steps", above_zero_or_null("max_steps"), "-1: null"),
    *converted("num_train_epochs", "num_train_epochs", _epochs, "unless max_steps is given"),
    *converted(
        "lr_scheduler_type min_lr_ratio lr_decay_steps",
        "lr_scheduler_type",
        _schedule,
        "the rate falls to 0 there, so min_lr_ratio 0; constant_with_warmup: constant;"
        " warmup_stable_decay: warmup-stable-decay, whose decay is linear here",
    ),
    *converted(
        "min_lr_ratio lr_decay_steps",
        "lr_scheduler_kwargs",
        lambda *_: {},
        "min_lr, min_lr_rate, num_decay_steps are taken over, others are not",
    ),
    *converted("warmup_steps", "warmup_steps", _warmup, "below 1: a share of max_steps"),
    *converted("warmup_steps", "warmup_ratio", _warmup_ratio, "warmup_ratio x max_steps"),
    *converted("optim", "optim", optimizer, "adamw_torch, adamw_torch_fused, ...: adamw"),
    *converted("optim", "adafactor", if_true(), "optim has adamw, muon and adamw_8bit"),
    *left_out("optim_args optim_target_modules", "the optimizers take no further arguments"),
    *converted("max_grad_norm", "max_grad_norm", above_zero_or_null("max_grad_norm"), "0: null"),
    *left_out("average_tokens_across_devices", f"{ALWAYS}: each token counts the same", True),
    *renamed("per_device_train_batch_size", "per_gpu_train_batch_size"),
    *renamed("per_device_eval_batch_size", "per_gpu_eval_batch_size"),
    *left_out("auto_find_batch_size", "batches keep their size: set gradient_accumulation_steps"),
)
SPEED = (
    *converted("mixed_precision", "bf16", half_precision("bf16"), "true: bf16"),
    *converted("mixed_precision", "fp16", half_precision("fp16"), "true: fp16; neither: fp32"),
    *left_out("bf16_full_eval fp16_full_eval", "evaluation computes as training does"),
    *left_out("half_precision_backend fp16_backend fp16_opt_level", "torch's autocast", "auto"),
    *converted(
        "gradient_checkpointing",
        "activation_checkpointing",
        if_true(gradient_checkpointing=True),
        "the newer name of gradient_checkpointing",
    ),
    *left_out(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        "the form that is exact with dropout is taken (use_reentrant false)",
    ),
    *converted("torch_compile_mode", "torch_compile_mode", _same("torch_compile_mode")),
    *left_out("torch_compile_backend torchdynamo", "torch's own (inductor)", "inductor"),
    *left_out("liger_kernel_config", "use_liger_kernel chooses the kernels"),
    *left_out("use_cache", "there is no cache of keys and values in training"),
    *left_out("torch_empty_cache_steps", "set PYTORCH_CUDA_ALLOC_CONF in the environment"),
    *left_out("dataloader_num_workers dataloader_prefetch_factor", LOADER),
    *left_out("dataloader_pin_memory dataloader_in_order", LOADER, True),
    *left_out("dataloader_persistent_workers dataloader_multiprocessing_context", LOADER),
    *left_out("dispatch_batches split_batches", LOADER),
    *converted("deterministic", "full_determinism", if_true(deterministic=True), "the default"),
    *converted("device", "use_cpu no_cuda", if_true(device="cpu"), "true: cpu"),
    *converted("device", "use_mps_device", if_true(device="mps"), "true: mps"),
    *left_out("use_ipex jit_mode_eval tpu_num_cores tpu_metrics_debug", "not supported here"),
    *left_out("sortish_sampler group_by_length length_column_name", "rows are packed", "length"),
    *left_out("train_sampling_strategy", "rows are drawn at random", "random"),
)
SAVING = (
    *converted(
        "save_steps save_best",
        "save_strategy",
        _strategy("save_steps"),
        "no: save_steps null; best: save_best; epoch: set save_steps",
    ),
    *converted(
        "save_steps", "save_steps", _interval("save_steps", "save_strategy"), "below 1: a share"
    ),
    *left_out("save_only_model", "a checkpoint holds all that continuing needs"),
    *left_out("save_on_each_node", "output_dir is a folder that all machines share"),
    *left_out("save_safetensors", ALWAYS, True),
    *left_out("enable_jit_checkpoint", "a signal saves a checkpoint anyway; save_before_timeout"),
    *converted(
        "save_best",
        "load_best_model_at_end",
        if_true(save_best=True),
        "best/ is the best model, final/ the last one",
    ),
    *converted(
        "metric_for_best_model",
        "metric_for_best_model",
        _judged_by,
        "loss: eval/loss; math_loss: eval/math/loss",
    ),
    *left_out("ignore_data_skip", "a continued run finds its place in the data at once"),
    *left_out("restore_callback_states_from_checkpoint", "there are no callbacks"),
    *left_out("overwrite_output_dir", "no run is overwritten: name another output_dir"),
    *converted(
        "resume_from_checkpoint",
        "resume_from_checkpoint",
        _continued,
        "true: auto, the default; Hugging Face checkpoints are not continued",
    ),
    *renamed("hub_model_id", "push_to_hub_model_id"),
    *converted("hub_private_repo", "hub_private_repo", _private, "null: true"),
    *left_out("hub_token push_to_hub_token", "set HF_TOKEN in the environment", "<HUB_TOKEN>"),
    *left_out("hub_always_push hub_revision", HUB),
    *left_out("hub_strategy", HUB, "every_save"),
    *left_out("push_to_hub_organization", "hub_model_id has it: OWNER/NAME"),
)
JUDGING = (
    *converted(
        "eval_steps",
        "eval_strategy evaluation_strategy",
        _strategy("eval_steps"),
        "no: eval_steps null; steps without eval_steps: logging_steps; epoch: set eval_steps",
    ),
    *converted(
        "eval_steps",
        "eval_steps",
        _interval("eval_steps", "evaluation_strategy", "eval_strategy"),
        "below 1: a share of max_steps",
    ),
    *left_out("eval_delay", "evaluations begin before the first step"),
    *left_out("eval_on_start", ALWAYS),
    *left_out("prediction_loss_only eval_do_concat_batches", "no predictions are kept", True),
    *left_out("eval_accumulation_steps eval_use_gather_object", "no predictions are kept"),
    *left_out("include_for_metrics include_inputs_for_metrics", "eval_metrics names what there is"),
    *left_out("batch_eval_metrics", ALWAYS),
    *left_out("label_names", "labels are the tokens themselves"),
    *left_out("do_train", "training is what this does; eval_only evaluates alone"),
    *left_out("do_eval", "eval_steps says when, null never"),
    *left_out("do_predict", "sample_prompt lets the model speak"),
)
LOGGING = (
    *converted(
        "logging_steps",
        "logging_steps",
        _interval("logging_steps", "logging_strategy"),
        "below 1: a share",
    ),
    *converted(
        "logging_steps", "logging_strategy", _strategy("logging_steps"), "epoch: set logging_steps"
    ),
    *converted(
        "report_to", "report_to", _trackers, "mlflow, tensorboard and wandb; name them for all"
    ),
    *renamed("experiment_name", "project"),
    *left_out("logging_dir", "logs go to output_dir, and by report_to to trackers"),
    *left_out("logging_first_step", "step 0 is evaluated; logging_steps 1 logs every step"),
    *left_out("logging_nan_inf_filter", "a loss that is not finite is shown", True),
    *left_out("log_on_each_node", "rank 0 talks", True),
    *left_out("log_level", "what matters is said, once", "passive"),
    *left_out("log_level_replica", "rank 0 talks", "warning"),
    *left_out("disable_tqdm", "there is no progress bar; one line each logging_steps"),
    *left_out("include_num_input_tokens_seen include_tokens_per_second", ALWAYS),
    *left_out("trackio_space_id trackio_bucket_id trackio_static_space_id", "report_to has none"),
    *left_out("skip_memory_metrics", "peak memory is logged", True),
)
LAUNCHING = (
    *left_out("fsdp fsdp_config", f"{LAUNCH}fsdp.yaml"),
    *left_out("fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap", f"{LAUNCH}fsdp.yaml"),
    *left_out("deepspeed", f"{LAUNCH}zero2.yaml, or the file of another stage"),
    *left_out("parallelism_config", f"{LAUNCH}tp.yaml or cp.yaml"),
    *left_out(
        "accelerator_config",
        "its settings are fixed here: batches are whole and seeded",
        {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": True,
            "non_blocking": False,
            "gradient_accumulation_kwargs": None,
        },
    ),
    *left_out("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers", DDP),
    *left_out("ddp_static_graph ddp_backend xpu_backend", DDP),
    *left_out("local_rank", "the launcher says it", -1),
    *left_out("debug ray_scope mp_parameters past_index use_legacy_prediction_loop", "no use here"),
    *converted("seed", "data_seed", _seed_of_data, "one seed serves weights, order and dropout"),
    *left_out("dataloader_drop_last", "every row is trained on; what is left over is counted"),
    *left_out("remove_unused_columns", "text_column or messages_column says what is read", True),
)
RUN_CLM = (
    *converted("config_overrides", "config_overrides", _overrides, "n_embd=10,n_head=2: an object"),
    *converted("train_file", "train_file", paths("train_file")),
    *converted("validation_file", "validation_file", paths("validation_file")),
    *renamed("model_type", "config_name", "the type that this configuration has, such as llama"),
    *converted("mixed_precision", "torch_dtype", precision, "trained weights stay in fp32"),
    *left_out("use_fast_tokenizer", ALWAYS, True),
    *left_out("token use_auth_token", "set HF_TOKEN in the environment"),
    *left_out("low_cpu_mem_usage", "weights are read without a second copy"),
    *left_out("max_train_samples", "name a part of a dataset: dataset_split train[:1000]"),
    *left_out("max_eval_samples", "eval_max_batches limits an evaluation"),
    *left_out("overwrite_cache", "the cache goes by the content: it is never stale"),
    *left_out("preprocessing_num_workers", "tokenizing takes all cores that are of use"),
    *left_out("keep_linebreaks", ALWAYS, True),
)

TRAINING_ARGUMENTS = Tool(
    title="TrainingArguments",
    owner="TrainingArguments'",
    names=LENGTH + SPEED + SAVING + JUDGING + LOGGING + LAUNCHING + RUN_CLM,
    defaults={
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "logging_strategy": "steps",
        "logging_steps": 500,
        "eval_strategy": "no",
        "per_device_eval_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": None,
        "seed": 42,
    },
)
