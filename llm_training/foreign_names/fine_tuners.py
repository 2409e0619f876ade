"""TRL, LLaMA-Factory and Axolotl, which build on Hugging Face's TrainingArguments."""

from __future__ import annotations

from typing import Any

from llm_training.foreign_names.conversions import (
    half_precision,
    if_true,
    optimizer,
    percent,
    schedule,
    share_of_peak,
    switch,
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
from llm_training.foreign_names.hugging_face import TRAINING_ARGUMENTS

QUANTIZED = "frozen_dtype has float32, bfloat16 and nf4"
LORA_PLUS = '16: {"*lora_B*": 16}'
TURNS = "of conversations only the assistant's turns are learned, of texts everything"
WHAT_DATA = "name the data yourself: train_file or dataset_name, and messages_column for chats"

STRATEGIES = {"bfd": "best_fit", "ffd": "best_fit", "wrapped": "stream"}
ATTENTION = {
    "fa2": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "sdpa": "sdpa",
    "eager": "eager",
    "disabled": "eager",
}


def _packing(value: Any, settings: Settings) -> dict[str, Any]:
    if isinstance(value, str):
        raise CannotConvert("packing takes stream or best_fit")
    strategy = str(settings.get("packing_strategy", "bfd"))
    return {"packing": STRATEGIES.get(strategy, "best_fit") if switch(value) else "best_fit"}


def _packing_strategy(value: Any, settings: Settings) -> dict[str, Any]:
    if str(value) not in STRATEGIES:
        raise CannotConvert("packing takes stream or best_fit")
    return {"packing": STRATEGIES[value]} if settings.get("packing", True) else {}


def _sample_packing(value: Any, settings: Settings) -> dict[str, Any]:
    return {"packing": "best_fit", "document_mask": True} if switch(value) else {}


def _attention(value: Any, settings: Settings) -> dict[str, Any]:
    if value in (None, "auto"):
        return {}
    if str(value) not in ATTENTION:
        raise CannotConvert("attn_implementation has no such kernel")
    return {"attn_implementation": ATTENTION[value]}


def _adapters(names_of_rank: str, default_rank: int | None) -> Conversion:
    """All weights, or adapters of a rank that is named elsewhere."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        if value in (None, "", "full", False):
            return {}
        if value not in ("lora", "qlora", True):
            raise CannotConvert("all weights are trained (full), or adapters (lora)")
        ranks = (settings[name] for name in names_of_rank.split() if name in settings)
        rank = next(ranks, default_rank)
        if rank is None:
            raise CannotConvert("set lora_rank")
        return {"lora_rank": rank}

    return convert


def _lora_plus(value: Any, settings: Settings) -> dict[str, Any]:
    return {"learning_rate_factors": {"*lora_B*": value}} if value else {}


def _bits(value: Any, settings: Settings) -> dict[str, Any]:
    if not value:
        return {}
    if value != 4:
        raise CannotConvert(QUANTIZED)
    return {"frozen_dtype": "nf4"}


def _targets(value: Any, settings: Settings) -> dict[str, Any]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if words in (["all"], ["all-linear"]):
        words = ["all-linear"]
    return {"lora_target_modules": words} if words else {}


def _stage(value: Any, settings: Settings) -> dict[str, Any]:
    if value not in ("pt", "sft"):
        raise CannotConvert("this trains on text and on conversations (pt and sft), nothing else")
    return {}


def _times_a_pass(value: Any, settings: Settings) -> dict[str, Any]:
    raise CannotConvert("here it goes by steps: divide the steps of one epoch by it")


TRL = Tool(
    title="TRL",
    owner="TRL's",
    base=TRAINING_ARGUMENTS,
    names=(
        *renamed("block_size", "max_length max_seq_length", "longer conversations are counted"),
        *converted("packing", "packing", _packing, "true, or false (rows are still filled)"),
        *converted("packing", "packing_strategy", _packing_strategy, "wrapped: stream"),
        *renamed("text_column", "dataset_text_field"),
        *renamed("chat_template", "chat_template_path"),
        *converted(
            "document_mask", "padding_free", if_true(document_mask=True), "true: document_mask"
        ),
        *left_out("completion_only_loss assistant_only_loss", TURNS, True),
        *left_out("eval_packing", "validation is packed as training is"),
        *left_out("dataset_num_proc", "tokenizing takes all cores that are of use"),
        *left_out("dataset_kwargs shuffle_dataset", "text_column, messages_column; shuffled"),
        *left_out("eos_token pad_token", "the tokenizer's own are taken"),
        *left_out("pad_to_multiple_of", "rows are all of block_size tokens"),
        *left_out("model_init_kwargs", "attn_implementation and dropout are arguments here"),
        *left_out("activation_offloading", "gradient_checkpointing saves memory"),
        *left_out("loss_type", "the loss is the plain cross-entropy", "nll"),
        *converted("lora_rank", "use_peft", _adapters("lora_r", 16), "true: lora_r, or 16"),
        *renamed("lora_rank", "lora_r"),
        *converted("frozen_dtype", "load_in_4bit", if_true(frozen_dtype="nf4"), "true: nf4"),
        *left_out("load_in_8bit use_bnb_nested_quant bnb_4bit_quant_type", QUANTIZED, "nf4"),
    ),
)

LLAMA_FACTORY = Tool(
    title="LLaMA-Factory",
    owner="LLaMA-Factory's",
    base=TRAINING_ARGUMENTS,
    names=(
        *converted("", "stage", _stage, "pt and sft; conversations are seen by their columns"),
        *converted(
            "lora_rank",
            "finetuning_type",
            _adapters("lora_rank", 8),
            "full, or lora: lora_rank, or 8",
        ),
        *left_out("dataset dataset_dir eval_dataset", WHAT_DATA),
        *left_out("template", "chat_template; null: the tokenizer's own", "default"),
        *renamed("block_size", "cutoff_len"),
        *left_out("max_samples", "name a part of a dataset: dataset_split train[:1000]"),
        *converted(
            "validation_split_percentage", "val_size", percent, "a share: times 100, in percent"
        ),
        *converted("attn_implementation", "flash_attn", _attention, "fa2: flash_attention_2"),
        *converted("packing", "packing", _packing, "true: best_fit"),
        *left_out("neat_packing", "document_mask keeps the documents of a row apart"),
        *left_out("train_on_prompt mask_history", TURNS),
        *left_out("plot_loss", "make review shows the curves"),
        *converted("lora_target_modules", "lora_target", _targets, "all: all-linear"),
        *renamed("lora_modules_to_save", "additional_target"),
        *converted("frozen_dtype", "quantization_bit", _bits, "4: nf4"),
        *converted("learning_rate_factors", "loraplus_lr_ratio", _lora_plus, LORA_PLUS),
        *left_out(
            "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
            "freeze_parameters names what stays, by patterns",
        ),
        *converted(
            "use_liger_kernel", "enable_liger_kernel", if_true(use_liger_kernel=True), "its name"
        ),
    ),
)

AXOLOTL = Tool(
    title="Axolotl",
    owner="Axolotl's",
    base=TRAINING_ARGUMENTS,
    names=(
        *renamed("model_name_or_path", "base_model"),
        *left_out("base_model_config model_type tokenizer_type", "the model's folder says it"),
        *renamed("tokenizer_name", "tokenizer_config"),
        *left_out("datasets test_datasets pretraining_dataset", WHAT_DATA),
        *renamed("cache_dir", "dataset_prepared_path"),
        *renamed("block_size", "sequence_len"),
        *converted(
            "packing document_mask",
            "sample_packing",
            _sample_packing,
            "true: best_fit, and documents do not see each other",
        ),
        *left_out("eval_sample_packing pad_to_sequence_len", "rows are all of block_size tokens"),
        *renamed("per_device_train_batch_size", "micro_batch_size"),
        *renamed("per_device_eval_batch_size", "eval_batch_size"),
        *renamed("num_train_epochs", "num_epochs"),
        *converted("optim", "optimizer", optimizer, "adamw_torch, ...: adamw; adamw_bnb_8bit"),
        *converted("lr_scheduler_type", "lr_scheduler", schedule),
        *converted("min_lr_ratio", "cosine_min_lr_ratio", lambda value, _: {"min_lr_ratio": value}),
        *converted("min_lr_ratio", "min_lr", share_of_peak, "min_lr / learning_rate"),
        *converted("mixed_precision", "bf16", half_precision("bf16"), "true: bf16; auto: auto"),
        *converted(
            "validation_split_percentage", "val_set_size", percent, "a share: times 100, in percent"
        ),
        *converted(
            "attn_implementation",
            "flash_attention",
            if_true(attn_implementation="flash_attention_2"),
            "true: flash_attention_2",
        ),
        *converted(
            "attn_implementation", "sdp_attention", if_true(attn_implementation="sdpa"), "true"
        ),
        *converted(
            "attn_implementation", "eager_attention", if_true(attn_implementation="eager"), "true"
        ),
        *left_out("xformers_attention", "attn_implementation has sdpa and flash_attention_2"),
        *converted("eval_steps", "evals_per_epoch", _times_a_pass, "set eval_steps"),
        *converted("save_steps", "saves_per_epoch", _times_a_pass, "set save_steps"),
        *left_out("train_on_inputs", TURNS),
        *converted("lora_rank", "adapter", _adapters("lora_r", None), "lora and qlora: lora_r"),
        *renamed("lora_rank", "lora_r"),
        *converted(
            "lora_target_modules",
            "lora_target_linear",
            if_true(lora_target_modules=["all-linear"]),
            "true: all-linear",
        ),
        *converted("learning_rate_factors", "loraplus_lr_ratio", _lora_plus, LORA_PLUS),
        *left_out("unfrozen_parameters", "freeze_parameters names what stays, by patterns"),
        *renamed("use_dora", "peft_use_dora"),
        *renamed("use_rslora", "peft_use_rslora"),
        *left_out("lora_model_dir", "name the adapter in model_name_or_path"),
        *converted("frozen_dtype", "load_in_4bit", if_true(frozen_dtype="nf4"), "true: nf4"),
        *left_out("load_in_8bit", QUANTIZED),
        *left_out("special_tokens", "the tokenizer's own are taken; ours names further ones"),
        *renamed("special_tokens", "tokens"),
        *renamed("model_revision", "revision_of_model"),
        *left_out("strict", "unknown arguments are refused, always"),
        *renamed("experiment_name", "wandb_project mlflow_experiment_name"),
        *renamed("tracking_uri", "mlflow_tracking_uri"),
        *renamed("run_name", "wandb_name wandb_run_id mlflow_run_name"),
        *left_out("wandb_entity wandb_watch wandb_log_model", "set WANDB_ENTITY outside"),
    ),
)
