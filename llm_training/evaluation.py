"""The validation loss and what is measured beside it, as sums and counts over every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arguments import BatchSizes, EvaluationArguments
from llm_training.data.rows.ahead import to_device
from llm_training.data.rows.store_rows import Rows
from llm_training.data.rows.windows import evaluation_batches
from llm_training.losses import count_predicted_tokens
from llm_training.ranks import data_parallel, split_positions, sum_over_data, sum_over_ranks

BATCHES_BETWEEN_QUESTIONS = 8


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Rows,
    arguments: EvaluationArguments,
    batch_sizes: BatchSizes,
    *,
    is_stopped: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """Judges the model on `rows`, or on `eval_max_batches` of them; every rank must call this.

    The rows do not depend on how the batch is split over ranks, and neither do the results. No
    random number is drawn and no logits are kept, so a run with and without evaluations is
    the same run.

    Args:
        model: the prepared `CausalLMWithLoss`; it is left in training mode.
        is_stopped: asked before every few batches, on all ranks; they must get the same answer.

    Returns:
        `eval/loss` in nats per predicted token, each token once, `eval/perplexity`, `eval/tokens`
        (how many were predicted), and `eval/<name>` for each metric. None: it was stopped.
    """
    limit = arguments.eval_max_batches
    rank, num_ranks = data_parallel(accelerator)
    batches = evaluation_batches(
        rows,
        arguments.per_device_eval_batch_size or batch_sizes.per_device,
        rank=rank,
        num_ranks=num_ranks,
        max_rows=None if limit is None else limit * batch_sizes.global_batch,
    )
    model.eval()
    # Sums of each batch, read at the end: a GPU that is asked in between would stand still.
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    tokens = 0
    for number, batch in enumerate(batches):
        if is_stopped is not None and number % BATCHES_BETWEEN_QUESTIONS == 0 and is_stopped():
            model.train()
            return None
        tokens += int(count_predicted_tokens(batch["labels"]))
        batch = to_device(batch, accelerator.device)
        with split_positions(accelerator, batch) as share:
            batch_loss, batch_correct = model(**share, count_correct=bool(arguments.eval_metrics))
        # Copies: where the model is a CUDA graph, its next pass writes over what it returned.
        losses.append(batch_loss.clone())
        counts += [] if batch_correct is None else [batch_correct.clone()]
    model.train()
    loss, correct = sum_over_ranks(accelerator, _sum(losses), _sum(counts))
    tokens = int(sum_over_data(accelerator, tokens)[0])
    mean_loss = loss / max(1, tokens)
    results: dict[str, float] = {
        "eval/loss": mean_loss,
        # Beyond any loss of a model that works, e to its power would overflow.
        "eval/perplexity": math.exp(mean_loss) if mean_loss < 700 else math.inf,
        "eval/tokens": tokens,
    }
    return results | _compute_metrics(arguments.eval_metrics, int(correct), tokens)


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


def _sum(values: Sequence[Tensor]) -> float:
    """Of scalars, in double precision and their order."""
    return float(sum(torch.stack(list(values)).tolist())) if values else 0.0
