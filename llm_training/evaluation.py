"""The validation loss and what is measured beside it, as sums over groups of rows and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn

from arguments import BatchSizes, EvaluationArguments
from llm_training.data.rows.ahead import to_device
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import Batch, Rows
from llm_training.data.rows.windows import evaluation_batches
from llm_training.losses import IGNORE_INDEX, shift_labels
from llm_training.metrics import (
    IdMetrics,
    MetricError,
    TokenSums,
    are_guesses_needed,
    local_values,
    names_of_others,
)
from llm_training.ranks import (
    data_parallel,
    split_positions,
    sum_over_data,
    sum_over_ranks,
    tensor_parallel_size,
)
from llm_training.uncertainty import ratio_and_error

BATCHES_BETWEEN_QUESTIONS = 8
# A GPU that is asked for its sums stands still for a moment; those of so many batches wait.
BATCHES_BETWEEN_READINGS = 64
# Rows are summed in so many groups of neighbours, so that memory is bounded whatever their number.
MAX_GROUPS = 1024


@dataclass(frozen=True)
class Judgement:
    """What one evaluation came to.

    Attributes:
        metrics: by name, without `eval/`: `loss` in nats per predicted token, `loss_stderr` (its
            standard error; absent where less than two groups are judged), `tokens` (how many were
            predicted), and what `eval_metrics` asks for. For rows of several sources, also
            SOURCE/loss and so on for each that has tokens.
        group_losses: (G,) nats summed over the tokens of each group of neighbouring rows.
        group_tokens: (G,) how many these are.
    """

    metrics: dict[str, float]
    group_losses: NDArray[np.float64]
    group_tokens: NDArray[np.int64]


def evaluate_sets(
    accelerator: Accelerator,
    model: nn.Module,
    sets: Mapping[str, Rows],
    arguments: EvaluationArguments,
    batch_sizes: BatchSizes,
    *,
    token_bytes: NDArray[np.int32] | None = None,
    is_stopped: Callable[[], bool] | None = None,
) -> dict[str, Judgement] | None:
    """Judges the model on each set of rows by itself, as `evaluate` does; "" names the main set."""
    judgements = {}
    for name, rows in sets.items():
        judgement = evaluate(
            accelerator,
            model,
            rows,
            arguments,
            batch_sizes,
            token_bytes=token_bytes,
            is_stopped=is_stopped,
        )
        if judgement is None:
            return None
        judgements[name] = judgement
    return judgements


def metrics_of(judgements: Mapping[str, Judgement]) -> dict[str, float]:
    """The results of all sets as they are logged: `eval/loss` of the main one, `eval/NAME/loss`.

    Without a main set, `eval/loss`, `eval/loss_stderr` and `eval/tokens` are those of all sets
    together, each token once.
    """
    found: dict[str, float] = {}
    if "" not in judgements:
        losses = np.concatenate([judged.group_losses for judged in judgements.values()])
        tokens = np.concatenate([judged.group_tokens for judged in judgements.values()])
        found = {f"eval/{name}": value for name, value in _loss_of(losses, tokens).items()}
    for name in sorted(judgements, key=lambda name: name != ""):
        prefix = f"eval/{name}/" if name else "eval/"
        found |= {f"{prefix}{key}": value for key, value in judgements[name].metrics.items()}
    return found


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    rows: Rows,
    arguments: EvaluationArguments,
    batch_sizes: BatchSizes,
    *,
    token_bytes: NDArray[np.int32] | None = None,
    is_stopped: Callable[[], bool] | None = None,
) -> Judgement | None:
    """Judges the model on `rows`, or on `eval_max_batches` of them; every rank must call this.

    The rows do not depend on how the batch is split over ranks, and neither do the results. No
    random number is drawn and no logits are kept, so a run with and without evaluations is
    the same run.

    Args:
        model: the prepared `CausalLMWithLoss`; it is left in training mode.
        token_bytes: (V,) bytes of the text that each token stands for, where they are known;
            without them there are no bits per byte.
        is_stopped: asked before every few batches, on all ranks; they must get the same answer.

    Returns:
        What it came to, the same on every rank. None: it was stopped.

    Raises:
        MetricError: a metric of `evaluate` failed; on every rank.
    """
    names, limit = arguments.eval_metrics, arguments.eval_max_batches
    num_rows = rows.num_rows
    if limit is not None:
        num_rows = min(num_rows, limit * batch_sizes.global_batch)
    batch_size = arguments.per_device_eval_batch_size or batch_sizes.per_device
    rank, num_ranks = data_parallel(accelerator)
    batches = evaluation_batches(
        rows, batch_size, rank=rank, num_ranks=num_ranks, max_rows=num_rows
    )
    sums = _GroupSums(rows, num_rows, token_bytes if "bits_per_byte" in names else None)
    others = _OtherMetrics(accelerator, names_of_others(names))
    with _judging(model):
        for number, batch in enumerate(batches):
            if is_stopped is not None and number % BATCHES_BETWEEN_QUESTIONS == 0 and is_stopped():
                others.discard()
                return None
            first = (number * num_ranks + rank) * batch_size
            places = np.arange(first, first + batch_size)
            sums.count(places, batch)
            batch = to_device(batch, accelerator.device)
            with split_positions(accelerator, batch) as share:
                losses, guesses = model(
                    **share, per_row=True, with_guesses=are_guesses_needed(names)
                )
                found = _found_of_rows(losses, guesses, share)
                others.take(guesses, share)
            sums.take(places, found)
    totals = sums.over_ranks(accelerator)
    return _judgement(totals, sums.sources, names, others.compute())


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def _found_of_rows(losses: Tensor, guesses: Tensor | None, share: Mapping[str, Any]) -> Tensor:
    """(2, B) float32: the loss of each row, and how many of its tokens were guessed right.

    A copy: where the model is a CUDA graph, its next pass writes over what it returned.
    """
    if guesses is None:
        return torch.stack((losses, torch.zeros_like(losses)))
    correct = (guesses == _next_tokens(share)).sum(1)
    return torch.stack((losses, correct.to(losses.dtype)))


def _next_tokens(share: Mapping[str, Any]) -> Tensor:
    """What each position is to predict, (B, T), of the part of the rows that this rank has."""
    shifted = share.get("next_tokens")
    return shift_labels(share["labels"]) if shifted is None else shifted


@dataclass(frozen=True)
class _Totals:
    """Sums of (S, G) each: of every source, over groups of neighbouring rows."""

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]
    text_bytes: NDArray[np.int64]

    def of_source(self, number: int) -> _Totals:
        """Those of one source alone."""
        rows = slice(number, number + 1)
        return _Totals(
            self.losses[rows], self.tokens[rows], self.correct[rows], self.text_bytes[rows]
        )

    def measure(self, names: Sequence[str]) -> dict[str, float]:
        """The loss over all of them, and the local metrics among `names`."""
        found = _loss_of(self.losses.sum(0), self.tokens.sum(0))
        sums = TokenSums(
            loss=float(self.losses.sum()),
            tokens=int(self.tokens.sum()),
            correct=int(self.correct.sum()),
            text_bytes=int(self.text_bytes.sum()),
        )
        return found | local_values(names, sums)


class _GroupSums:
    """What this rank sums up over groups of neighbouring rows, of each source by itself.

    A row is known by its place in the evaluation, 0 to `num_rows` - 1; neighbours are of one
    document more often than others, and count as one observation.
    """

    def __init__(self, rows: Rows, num_rows: int, token_bytes: NDArray[np.int32] | None):
        self.sources = rows.names if isinstance(rows, MixtureRows) else [""]
        self._rows, self._num_rows = rows, num_rows
        self._num_groups = min(MAX_GROUPS, num_rows)
        self._token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)
        shape = (len(self.sources), self._num_groups)
        self._losses, self._correct, self._tokens, self._bytes = np.zeros((4, *shape))
        # What the device found is read later: a GPU that is asked would stand still.
        self._unread: list[tuple[NDArray[np.int64], Tensor]] = []

    def count(self, places: NDArray[np.int64], batch: Batch) -> None:
        """Counts what is known without the model: tokens to predict, and the bytes of their text.

        Args:
            places: (B,) of the rows; those beyond the last are empty.
            batch: as the rows gave it, on the host.
        """
        labels = batch["labels"][:, 1:]
        is_predicted = labels != IGNORE_INDEX
        self._add(self._tokens, places, is_predicted.sum(1))
        if self._token_bytes is not None:
            # A token file may hold ids that the tokenizer does not have: they stand for no text.
            last = len(self._token_bytes) - 1
            num_bytes = self._token_bytes[labels.clamp(0, last)]
            self._add(self._bytes, places, (num_bytes * (is_predicted & (labels <= last))).sum(1))

    def take(self, places: NDArray[np.int64], found: Tensor) -> None:
        """Takes in what `_found_of_rows` returns for the rows at `places`, (2, B)."""
        self._unread.append((places, found))
        if len(self._unread) == BATCHES_BETWEEN_READINGS:
            self._read()

    def over_ranks(self, accelerator: Accelerator) -> _Totals:
        """The sums over all ranks; every rank must call this, with all batches taken in."""
        self._read()
        found = np.stack((self._losses, self._correct))
        counted = np.stack((self._tokens, self._bytes))
        # Ranks that share a row find something in their part each, and count all of it.
        found[:] = np.reshape(sum_over_ranks(accelerator, *found.ravel().tolist()), found.shape)
        counted[:] = np.reshape(sum_over_data(accelerator, *counted.ravel().tolist()), found.shape)
        correct, tokens, text_bytes = (
            np.rint(sums).astype(np.int64) for sums in (found[1], counted[0], counted[1])
        )
        return _Totals(found[0], tokens, correct, text_bytes)

    def _read(self) -> None:
        if self._unread:
            all_found = torch.stack([found for _, found in self._unread]).cpu()
            for (places, _), found in zip(self._unread, all_found, strict=True):
                self._add(self._losses, places, found[0])
                self._add(self._correct, places, found[1])
            self._unread.clear()

    def _add(self, sums: NDArray[np.float64], places: NDArray[np.int64], values: Tensor) -> None:
        is_row = places < self._num_rows
        places = places[is_row]
        groups = places * self._num_groups // self._num_rows
        sources = np.zeros_like(groups)
        if isinstance(self._rows, MixtureRows):
            sources = self._rows.source_of(places * self._rows.num_rows // self._num_rows)
        np.add.at(sums, (sources, groups), values.double().numpy()[is_row])


class _OtherMetrics:
    """Metrics that need the token ids of all ranks; rank 0 computes them, for all."""

    def __init__(self, accelerator: Accelerator, names: Sequence[str]):
        self._accelerator, self._names = accelerator, names
        is_here = bool(names) and accelerator.is_main_process
        self._metrics = IdMetrics(names) if is_here else None
        self._problem: str | None = None  # the other ranks wait until rank 0 may tell it

    def take(self, guesses: Tensor | None, share: Mapping[str, Any]) -> None:
        """Takes in a batch of each rank; every rank must call this with a batch of one size."""
        if not self._names:
            return
        assert guesses is not None, "they were asked for"
        ids = torch.stack((guesses, _next_tokens(share)))
        of_ranks = self._accelerator.gather(ids[None])
        # Ranks of one tensor-parallel group hold the same: each token counts once.
        of_ranks = of_ranks[:: tensor_parallel_size(self._accelerator)]
        if self._metrics is not None and self._problem is None:
            guesses, targets = of_ranks.transpose(0, 1).flatten(1).cpu()
            is_predicted = targets != IGNORE_INDEX
            try:
                self._metrics.add(guesses[is_predicted].numpy(), targets[is_predicted].numpy())
            except Exception as error:  # a full disk, or what scripts of other people do
                told = f"{type(error).__name__}: {error}"
                self._problem = f"eval_metrics: {', '.join(self._names)}: {told}"

    def compute(self) -> dict[str, float]:
        """The results by their names, on every rank, all of which must call this.

        Raises:
            MetricError: one of them failed, on every rank.
        """
        if not self._names:
            return {}
        results: dict[str, float] = {}
        problem = self._problem
        if self._metrics is not None and problem is None:
            try:
                results = self._metrics.compute()
            except MetricError as error:
                problem = str(error)
        results, problem = broadcast_object_list([results, problem])
        if problem is not None:
            raise MetricError(problem)
        return results

    def discard(self) -> None:
        """Forgets what was taken in."""
        if self._metrics is not None:
            self._metrics.discard()


def _judgement(
    totals: _Totals, sources: Sequence[str], names: Sequence[str], others: dict[str, float]
) -> Judgement:
    metrics = totals.measure(names) | others
    for number, source in enumerate(sources):
        of_source = totals.of_source(number)
        if source and of_source.tokens.any():
            found = of_source.measure(names)
            metrics |= {f"{source}/{name}": value for name, value in found.items()}
    return Judgement(metrics, totals.losses.sum(0), totals.tokens.sum(0))


def _loss_of(losses: NDArray[np.float64], tokens: NDArray[np.int64]) -> dict[str, float]:
    """The loss of some groups, its standard error where it has one, and the number of tokens."""
    loss, error = ratio_and_error(losses, tokens)
    errors = {} if math.isnan(error) else {"loss_stderr": error}
    return {"loss": loss, **errors, "tokens": int(tokens.sum())}
