"""The end of a step: judged, applied or left out, and counted in the position of the run.

Most backends must hear from the host whether to update. Where the device can decide alone, the host
goes on to the next step, and reads later what was decided: the same, by the same numbers.
"""

from __future__ import annotations

import math

from torch import Tensor

from llm_training.health import Kind, Verdict
from llm_training.ranks import sum_over_ranks
from llm_training.run import OpenStep, Run, StepResult
from llm_training.updates import (
    Limits,
    UnseenStep,
    can_finish_unseen,
    drop_gradients,
    finish_step,
    finish_step_unseen,
    norms_by_layer,
)

EMPTY = Verdict(Kind.EMPTY, "no token to predict")


def update_weights(run: Run, loss_sum: Tensor, num_tokens: int, learning_rate: float) -> OpenStep:
    """Applies the gradients of a step that deserves it, and moves the run behind its samples.

    Args:
        loss_sum: () float32, of this rank's part of the step, in nats.
        num_tokens: predicted tokens of the step over all ranks.
        learning_rate: of this step; the optimizer has it already.
    """
    state, first = run.state, run.state.samples
    sample_ids = run.windows.sample_ids(first)
    outcome: StepResult | UnseenStep
    if num_tokens and can_finish_unseen(run.accelerator, run.optimizer):
        outcome = finish_step_unseen(
            run.accelerator,
            run.model,
            run.optimizer,
            run.arguments.max_grad_norm,
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            limits=Limits(*run.health.ceilings()),
        )
    else:
        outcome = _finish_seen(run, loss_sum, num_tokens)
    state.note_samples(sample_ids)
    state.samples += min(run.plan.batch.global_batch, run.plan.num_samples - first)
    return OpenStep(first, sample_ids, num_tokens, learning_rate, outcome)


def read_step(run: Run, step: OpenStep) -> StepResult:
    """How a step ended; every rank must call this, and waits for its device where it must."""
    if isinstance(step.outcome, StepResult):
        return step.outcome
    loss_sum, loss, outcome = step.outcome.read()
    verdict = run.health.judge(loss, outcome.grad_norm)
    assert verdict.is_ok == outcome.is_applied, "host and device judge by the same numbers"
    layers = {} if verdict.is_ok else step.outcome.norms_by_layer(run.accelerator)
    return StepResult(loss_sum, outcome.grad_norm, outcome.is_applied, verdict, layers)


def _finish_seen(run: Run, loss_sum: Tensor, num_tokens: int) -> StepResult:
    """The host looks at the loss, then at the norm, and says what is done."""
    accelerator, health = run.accelerator, run.health
    (total_loss,) = sum_over_ranks(accelerator, float(loss_sum))
    verdict = health.judge_loss(total_loss / num_tokens) if num_tokens else EMPTY
    layers: dict[str, float] = {}
    if not verdict.is_ok:
        layers = norms_by_layer(accelerator, run.model) if num_tokens else {}
        drop_gradients(accelerator, run.model, run.optimizer)
        return StepResult(total_loss, math.nan, False, verdict, layers)

    def accept(grad_norm: float) -> bool:
        nonlocal verdict, layers
        verdict = health.judge_norm(grad_norm)
        layers = {} if verdict.is_ok else norms_by_layer(accelerator, run.model)
        return verdict.is_ok

    limit = run.arguments.max_grad_norm
    outcome = finish_step(accelerator, run.model, run.optimizer, limit, accept)
    return StepResult(total_loss, outcome.grad_norm, outcome.is_applied, verdict, layers)
