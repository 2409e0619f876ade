"""The validation loss and what is measured beside it, as sums and counts over every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from llm_training.data.dataset import Batch
from llm_training.losses import count_predicted_tokens


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[Batch],
    metric_names: Sequence[str] = (),
) -> dict[str, float]:
    """Judges the model on `batches`; every rank must call this with equally many.

    No random number is drawn and no logits are kept, so a run with and without evaluations is
    the same run.

    Args:
        model: the prepared `CausalLMWithLoss`; it is left in training mode.
        metric_names: of `metrics.METRICS`, beside the loss.

    Returns:
        `eval/loss` in nats per predicted token, each token once, `eval/perplexity`, `eval/tokens`
        (how many were predicted), and `eval/<name>` for each metric.
    """
    model.eval()
    loss, tokens, correct = 0.0, 0, 0
    for batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        batch_loss, batch_correct = model(**batch, count_correct=bool(metric_names))
        loss += float(batch_loss)
        tokens += int(count_predicted_tokens(batch["labels"]))
        correct += 0 if batch_correct is None else int(batch_correct)
    model.train()
    loss, tokens, correct = sum_over_ranks(accelerator, loss, tokens, correct)
    mean_loss = loss / max(1, tokens)
    results = {
        "eval/loss": mean_loss,
        # Beyond any loss of a model that works, e to its power would overflow.
        "eval/perplexity": math.exp(mean_loss) if mean_loss < 700 else math.inf,
        "eval/tokens": int(tokens),
    }
    return results | _compute_metrics(metric_names, int(correct), int(tokens))


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all ranks, in double precision; every rank must call this."""
    if accelerator.num_processes == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return [float(total) for total in accelerator.reduce(totals, "sum")]


def _compute_metrics(names: Sequence[str], correct: int, tokens: int) -> dict[str, float]:
    if not names:
        return {}
    from llm_training.metrics import METRICS  # takes seconds, so only when asked for

    results = {}
    for name in names:
        metric = METRICS[name]()
        metric.add(correct=correct, total=tokens)
        results[f"eval/{name}"] = float(metric.compute()[name])
    return results
