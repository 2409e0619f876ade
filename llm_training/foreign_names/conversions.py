"""Conversions that the tables of several tools share; each makes our values of a foreign one."""

from __future__ import annotations

import math
from typing import Any

from llm_training.foreign_names.form import CannotConvert, Conversion, Settings

# What tools call the length of a run in optimizer steps, and the peak learning rate.
STEPS = (
    "max_steps training.steps max_iters train_iters total_steps train_steps num_steps num_iters"
    " n_iters iterations n_steps num_train_steps steps max_iterations num_batches"
)
RATES = "learning_rate lr optimizer.lr max_lr peak_lr base_lr"
WARMUPS = "warmup_steps warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps warmup"

PRECISIONS = {
    "bf16": "bf16 bfloat16 torch.bfloat16 bf16-mixed bf16-true amp_bf16 bf16_mixed",
    "fp16": "fp16 float16 torch.float16 16 16-mixed 16-true half amp_fp16 fp16_mixed",
    "fp8": "fp8 amp_fp8 transformer-engine",
    "fp32": "fp32 float32 torch.float32 32 32-true float full no none",
    "auto": "auto",
}
OPTIMIZERS = {
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused fused_adamw adamw_fused"
    " torch.optim.adamw paged_adamw_32bit",
    "adamw_8bit": "adamw_8bit adamw8bit adamw_bnb_8bit paged_adamw_8bit"
    " bitsandbytes.optim.adamw8bit bitsandbytes.optim.pagedadamw8bit",
    "muon": "muon torch.optim.muon",
}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine cosine_with_min_lr cosine_annealing cosineannealinglr",
    "constant": "constant constant_with_warmup none",
    "warmup-stable-decay": "warmup-stable-decay warmup_stable_decay wsd trapezoidal",
}


def number(value: Any) -> float:
    """The value, if it is a number that one can compute with.

    Raises:
        CannotConvert: it is not.
    """
    if type(value) not in (int, float) or not abs(value) < 1e18:  # nor NaN
        raise CannotConvert(f"{value!r:.60} is no number that can be converted")
    return value


def literal(word: str) -> Any:
    """A word as a number, true, false or null, where it is one."""
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(word.strip().lower(), word)


def needed(settings: Settings, names: str, why: str) -> float:
    """The first number that the settings have under one of the names.

    Raises:
        CannotConvert: with `why`, where there is none.
    """
    for name in names.split():
        value: Any = settings.get(name)
        if type(value) in (int, float) and 0 < value < 1e18:
            return value
    raise CannotConvert(why)


def whole(value: float) -> int:
    """The least whole number that is not below, but for what floats leave behind."""
    return math.ceil(round(value, 6))


def above_zero_or_null(ours: str) -> Conversion:
    """0, a negative number and null all mean never, or no limit, which is null here."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        return {ours: value if value is not None and number(value) > 0 else None}

    return convert


def steps_or_share(ours: str) -> Conversion:
    """Whole numbers are steps; numbers below 1 are shares of all steps."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        if number(value) >= 1 or value == 0:
            return {ours: int(value)}
        return share_of_steps(ours)(value, settings)

    return convert


def share_of_steps(ours: str) -> Conversion:
    """A share of the run: times its steps."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        share = number(value)
        why = f"it is a share of the run, whose steps are not known: set {ours} to {share:g} x them"
        return {ours: whole(share * needed(settings, STEPS, why)) if share else 0}

    return convert


def share_of_peak(value: Any, settings: Settings) -> dict[str, Any]:
    """The lowest learning rate as a share of the highest."""
    low = number(value)
    why = "it needs the peak learning rate: set min_lr_ratio to the lowest rate / learning_rate"
    return {"min_lr_ratio": float(f"{low / needed(settings, RATES, why):.6g}") if low else 0.0}


def end_of_decay(value: Any, settings: Settings) -> dict[str, Any]:
    """The step at which the decay ends, counted from the start of the run."""
    end = number(value)
    why = "it counts from step 0; lr_decay_steps counts from the end of the warm-up"
    warmup = next((number(settings[name]) for name in WARMUPS.split() if name in settings), 0)
    total = needed(settings, STEPS, f"{why}: set it to {end:g} - warmup_steps")
    if end == total:
        return {"lr_decay_steps": None}
    if end > total or end <= warmup:
        raise CannotConvert(f"the decay would end at step {end:g}: here it lies within the run")
    return {"lr_decay_steps": int(end - warmup)}


def precision(value: Any, settings: Settings) -> dict[str, Any]:
    """A name of an arithmetic; weights stay in fp32 here, whatever it is."""
    return {"mixed_precision": _named(value, PRECISIONS, "mixed_precision")}


def optimizer(value: Any, settings: Settings) -> dict[str, Any]:
    """The name of an optimizer."""
    return {"optim": _named(value, OPTIMIZERS, "optim")}


def schedule(value: Any, settings: Settings) -> dict[str, Any]:
    """The name of a shape of the learning rate."""
    return {"lr_scheduler_type": _named(value, SCHEDULES, "lr_scheduler_type")}


def _named(value: Any, names: dict[str, str], ours: str) -> str:
    word = str(value).strip().lower()
    for name, synonyms in names.items():
        if word in synonyms.split():
            return name
    raise CannotConvert(f"{ours} has no {value!r:.60}: choose {', '.join(names)}")


def if_true(**ours: Any) -> Conversion:
    """A switch: these values where it is on, nothing where it is off."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        return dict(ours) if switch(value) else {}

    return convert


def switch(value: Any) -> bool:
    """The value of a switch.

    Raises:
        CannotConvert: it is not true or false.
    """
    if value is None or type(value) is bool:
        return bool(value)
    raise CannotConvert(f"{value!r:.60} is neither true nor false")


def half_precision(kind: str) -> Conversion:
    """The switches bf16 and fp16, of which one may be on; without either it is fp32."""
    other = "fp16" if kind == "bf16" else "bf16"

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        if value == "auto":
            return {"mixed_precision": "auto"}
        if switch(value):
            return {"mixed_precision": kind}
        return {} if settings.get(other) else {"mixed_precision": "fp32"}

    return convert


def betas(value: Any, settings: Settings) -> dict[str, Any]:
    """Adam's two decays in one list."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CannotConvert(f"{value!r:.60} is no pair: set adam_beta1 and adam_beta2")
    return {"adam_beta1": number(value[0]), "adam_beta2": number(value[1])}


def percent(value: Any, settings: Settings) -> dict[str, Any]:
    """A share of the documents in percent; a number above 1 would count samples."""
    if not 0 <= number(value) < 1:
        advice = "set validation_split_percentage to their percentage"
        raise CannotConvert(f"it counts samples, and here the share counts: {advice}")
    return {"validation_split_percentage": float(f"{value * 100:.6g}")}


def paths(ours: str) -> Conversion:
    """A path, or a list of paths."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(path, str) and path for path in listed):
            raise CannotConvert(f"{value!r:.60} is no path: name files in {ours}")
        return {ours: listed}

    return convert


def shape(key: str) -> Conversion:
    """A size of the model: a change to its configuration."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        return {"config_overrides": {key: value}}

    return convert


def minutes(ours: str) -> Conversion:
    """Minutes that are seconds here."""
    return lambda value, _: {ours: int(number(value) * 60)}


def wandb(value: Any, settings: Settings) -> dict[str, Any]:
    """A switch for Weights & Biases alone."""
    return {"report_to": ["wandb"]} if switch(value) else {}
