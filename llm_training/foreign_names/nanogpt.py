"""nanoGPT: the settings of its `train.py` and `sample.py`, which its config files assign."""

from __future__ import annotations

from typing import Any

from llm_training.foreign_names.conversions import (
    above_zero_or_null,
    end_of_decay,
    needed,
    number,
    precision,
    share_of_peak,
    switch,
    wandb,
    whole,
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


def _start(value: Any, settings: Settings) -> dict[str, Any]:
    if value == "scratch":
        # GELU in its exact form, as nanoGPT computes it; transformers' GPT-2 takes the tanh form.
        return {"model_type": "gpt2", "config_overrides": {"activation_function": "gelu"}}
    if value == "resume":
        raise CannotConvert(
            "--convert ckpt.pt --convert_to FOLDER makes a folder of it for model_name_or_path"
        )
    return {"model_name_or_path": value}


def _size(key: str) -> Conversion:
    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        from_scratch = settings.get("init_from", "scratch") == "scratch"
        return {"config_overrides": {key: value}} if from_scratch else {}

    return convert


def _biases(value: Any, settings: Settings) -> dict[str, Any]:
    if not switch(value) and settings.get("init_from", "scratch") == "scratch":
        raise CannotConvert("GPT-2 has biases here: about 0.1% more parameters")
    return {}


def _rows_of_a_step(value: Any, settings: Settings) -> dict[str, Any]:
    rows = needed(settings, "batch_size", "it needs batch_size: the rows of a step are its product")
    return {"global_batch_size": int(number(value) * rows)}


def _evaluated(value: Any, settings: Settings) -> dict[str, Any]:
    why = "a batch is global_batch_size rows here: divide it by gradient_accumulation_steps"
    accumulated = needed(settings, "gradient_accumulation_steps", why)
    return {"eval_max_batches": max(1, whole(number(value) / accumulated))}


def _evaluation_interval(value: Any, settings: Settings) -> dict[str, Any]:
    return {"eval_steps": value, "save_steps": value}  # a checkpoint may follow each evaluation


def _decays(value: Any, settings: Settings) -> dict[str, Any]:
    return {"lr_scheduler_type": "cosine" if switch(value) else "constant"}


def _if_it_decays(convert: Conversion) -> Conversion:
    def quiet(value: Any, settings: Settings) -> dict[str, Any]:
        return convert(value, settings) if settings.get("decay_lr", True) else {}

    return quiet


def _warmup(value: Any, settings: Settings) -> dict[str, Any]:
    return {"warmup_steps": value}


def _folder(value: Any, settings: Settings) -> dict[str, Any]:
    return {"train_file": [f"data/{value}"]}


def _device(value: Any, settings: Settings) -> dict[str, Any]:
    return {"device": str(value).partition(":")[0]}


NANOGPT = Tool(
    title="nanoGPT",
    owner="nanoGPT's",
    names=(
        *renamed("output_dir", "out_dir", "must not hold what nanoGPT wrote"),
        *converted(
            "eval_steps save_steps",
            "eval_interval",
            _evaluation_interval,
            "nanoGPT also saves when it evaluates",
        ),
        *renamed("logging_steps", "log_interval"),
        *converted(
            "eval_max_batches",
            "eval_iters",
            _evaluated,
            "eval_iters / gradient_accumulation_steps: batches are global_batch_size rows here",
        ),
        *renamed("eval_only", "eval_only"),
        *converted(
            "save_best",
            "always_save_checkpoint",
            lambda value, _: {"save_best": not switch(value)},
            "false: save_best; checkpoints to continue from are written beside the best",
        ),
        *converted(
            "model_type model_name_or_path",
            "init_from",
            _start,
            "scratch: model_type gpt2; gpt2, ...: model_name_or_path; resume: --convert ckpt.pt",
        ),
        *converted("report_to", "wandb_log", wandb, "true: wandb"),
        *renamed("experiment_name", "wandb_project"),
        *renamed("run_name", "wandb_run_name"),
        *converted(
            "train_file",
            "dataset",
            _folder,
            "the folder data/DATASET; its train.bin, val.bin and meta.pkl are read as they are",
        ),
        *converted(
            "global_batch_size",
            "gradient_accumulation_steps",
            _rows_of_a_step,
            "times batch_size: nanoGPT divides it by the number of processes",
        ),
        *renamed("per_device_train_batch_size", "batch_size"),
        *renamed("block_size", "block_size"),
        *converted("config_overrides", "n_layer", _size("n_layer"), "for new models"),
        *converted("config_overrides", "n_head", _size("n_head"), "for new models"),
        *converted("config_overrides", "n_embd", _size("n_embd"), "for new models"),
        *renamed("dropout", "dropout"),
        *converted("", "bias", _biases, "GPT-2 in transformers has biases; here too"),
        *renamed("learning_rate", "learning_rate"),
        *renamed("max_steps", "max_iters"),
        *renamed("weight_decay", "weight_decay", "embeddings are not decayed here"),
        *renamed("adam_beta1", "beta1"),
        *renamed("adam_beta2", "beta2"),
        *converted("max_grad_norm", "grad_clip", above_zero_or_null("max_grad_norm"), "0: null"),
        *converted("lr_scheduler_type", "decay_lr", _decays, "true: cosine; false: constant"),
        *converted(
            "warmup_steps",
            "warmup_iters",
            _if_it_decays(_warmup),
            "nanoGPT warms up only where the rate decays",
        ),
        *converted(
            "lr_decay_steps",
            "lr_decay_iters",
            _if_it_decays(end_of_decay),
            "minus warmup_iters: the decay is counted from the end of the warm-up; equal to"
            " max_iters: null",
        ),
        *converted(
            "min_lr_ratio", "min_lr", _if_it_decays(share_of_peak), "min_lr / learning_rate"
        ),
        *left_out("backend", "processes talk by NCCL on GPUs and by gloo on CPUs", "nccl"),
        *converted("device", "device", _device, "cuda:0 is cuda: accelerate launch picks GPUs"),
        *converted("mixed_precision", "dtype", precision, "bfloat16: bf16; float16: fp16"),
        *renamed("torch_compile", "compile"),
        *renamed("sample_prompt", "start", "of sample.py"),
        *renamed("sample_max_new_tokens", "max_new_tokens", "of sample.py"),
        *renamed("sample_temperature", "temperature", "of sample.py"),
        *left_out("num_samples", "of sample.py: one sample is drawn at the end of a run"),
        *left_out("top_k", "of sample.py: the sample at the end of a run draws from all tokens"),
    ),
    defaults={
        "eval_interval": 2000,
        "log_interval": 1,
        "eval_iters": 200,
        "always_save_checkpoint": True,
        "init_from": "scratch",
        "dataset": "openwebtext",
        "gradient_accumulation_steps": 40,
        "batch_size": 12,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": False,
        "learning_rate": 6e-4,
        "max_iters": 600_000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "decay_lr": True,
        "warmup_iters": 2000,
        "lr_decay_iters": 600_000,
        "min_lr": 6e-5,
        "compile": True,
    },
)
