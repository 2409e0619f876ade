"""Stops a run before a broken number reaches the weights."""

from __future__ import annotations

import math


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm is NaN or infinite; the weights are those of the last step."""


def require_finite(name: str, value: float, step: int, first_sample: int) -> None:
    """Passes finite numbers.

    The value must already be the same on every rank, so that all of them stop together.

    Raises:
        NonFiniteError: anything else, naming the step, its samples and what usually helps.
    """
    if math.isfinite(value):
        return
    raise NonFiniteError(
        f"The {name} of step {step} (samples from {first_sample}) is {value}. The step was not"
        " applied, so what is saved is sound, and the same command continues from the newest"
        " checkpoint. What usually helps: a lower --learning_rate, more --warmup_steps,"
        " --max_grad_norm 1.0, or --mixed_precision bf16 or fp32 in place of fp16."
    )
