"""How a model continues a text: by the likeliest token each time, or by one drawn at random.

A draw adds noise to the logits and takes the largest sum. The noise follows from the seed and the
token's place alone, and the random state of the run has no part in it. So a text is the same
whether one process computes it with a cache or many compute it together, up to rounding.

Source: E. J. Gumbel, Statistical Theory of Extreme Values (1954), for the noise that makes the
largest sum a draw from the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from llm_training.ranks import broadcast_batch
from llm_training.vocab_padding import num_tokens_of

# Computed at once by `continue_together`: half a gigabyte in float32.
MAX_LOGITS = 2**27
ENDED = -1  # in the place of a token
# What a model's own settings say of it would count otherwise.
PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class Task(NamedTuple):
    """A text to continue.

    Attributes:
        ids: its tokens, at least one.
        max_new_tokens: after so many it ends, unless an end token comes before.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws; the same seed gives the same text.
    """

    ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int


def never() -> bool:
    """For what is not to be broken off."""
    return False


def make_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Task:
    """The task to continue `prompt`, cut to the model's positions: the end of it counts.

    Text beyond the positions is not generated.
    """
    ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    if not ids:  # a model continues something: the sign that a text begins, or that one has ended
        start = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        ids = [next(token for token in start if token is not None)]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions > 0:  # -1: without an end
        ids = ids[-max(1, positions - 1) :]
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    return Task(ids, max_new_tokens, temperature, seed)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """The text of a conversation up to where the assistant begins to speak.

    Raises:
        Exception: whatever the template raises of turns that it does not take.
    """
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(text)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def add_end_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: int | None
) -> None:
    """Adds to the tokens that end a text of this model; None adds nothing.

    They are saved with the model (generation_config.json), and whatever serves it goes by them.
    """
    if token is not None and model.generation_config is not None:
        ends = dict.fromkeys([*end_tokens(model, tokenizer), token])
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else token


def text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], new: list[int]) -> str:
    """What the tokens `new` add to the text of `ids`: some tokenizers write a token by its place.

    Special tokens are left out.
    """
    before = str(tokenizer.decode(ids, skip_special_tokens=True))
    whole = str(tokenizer.decode([*ids, *new], skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


# ----------------------------------------------------------------------------- choosing a token


class Draw(LogitsProcessor):
    """Turns logits into scores of which the largest is the chosen token, one token after another.

    Args:
        task: its temperature, and the seed of the noise.
        num_tokens: of the vocabulary without padding, which must not move the noise.
    """

    def __init__(self, task: Task, num_tokens: int):
        self._temperature = task.temperature
        self._num_tokens = num_tokens
        self._noise = torch.Generator().manual_seed(task.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V) of the logits `scores`, the same shape; `input_ids` have no part in it."""
        if not self._temperature:
            return scores
        # Minus the logarithm of an exponential draw is a Gumbel draw. Always made on the CPU:
        # other devices draw other numbers.
        noise = torch.empty(1, self._num_tokens).exponential_(generator=self._noise).log().neg()
        noise = F.pad(noise, (0, scores.shape[-1] - self._num_tokens))
        return scores.float() / self._temperature + noise.to(scores.device)


# ------------------------------------------------------------------- by one process, with a cache


class _Over(StoppingCriteria):
    """Ends a text where somebody says so."""

    def __init__(self, is_over: Callable[[], bool]):
        self._is_over = is_over

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._is_over(), device=input_ids.device)


@torch.no_grad()
def continue_alone(
    model: PreTrainedModel, task: Task, ends: list[int], is_over: Callable[[], bool] = never
) -> list[int]:
    """The tokens with which a model that this process holds whole continues one text.

    Args:
        model: one that this process holds whole.
        task: the text; the random state of the run is left as it was.
        ends: tokens that end a text.
        is_over: asked after each token; where it is true, the text ends there.
    """
    ids = torch.tensor([task.ids], device=model.device)
    with _judging(model):
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.max_new_tokens,
            logits_processor=LogitsProcessorList([Draw(task, num_tokens_of(model))]),
            stopping_criteria=StoppingCriteriaList([_Over(is_over)]),
            # Under ZeRO-3, transformers would wait at each token for ranks that do not take part.
            synced_gpus=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **PLAIN,
        )
    new: list[int] = output[0, len(task.ids) :].tolist()
    return new[:-1] if new and new[-1] in ends else new


# --------------------------------------------------------------- by all processes, without a cache


@torch.no_grad()
def continue_together(
    accelerator: Accelerator,
    model: nn.Module,
    network: PreTrainedModel,
    tasks: Sequence[Task],
    ends: list[int],
    is_over: Callable[[], bool] = never,
) -> list[list[int]]:
    """The tokens with which a model that the processes hold between them continues each text.

    Every rank must call this. Rank 0's tasks count, it chooses every token, and it tells when all
    is done, so that no rank waits for a pass that the others do not make.

    Args:
        model: the prepared `CausalLMWithLoss`, which gives logits where it gets no labels.
        network: the Hugging Face model inside.
        is_over: asked on rank 0 before each token; where it is true, all texts end there.
    """
    own = rows_of(tasks) if accelerator.is_main_process else None
    rows = broadcast_batch(accelerator, own)
    num_rows, width = rows["ids"].shape
    if not num_rows:
        return []
    at_once = max(1, MAX_LOGITS // (width * network.config.get_text_config().vocab_size))
    draws = [Draw(task, num_tokens_of(network)) for task in tasks]
    found: list[list[int]] = []
    with _judging(model):
        for first in range(0, num_rows, at_once):
            part = slice(first, first + at_once)
            some = {name: tensor[part] for name, tensor in rows.items()}
            found += _continue_rows(accelerator, model, some, draws[part], ends, is_over)
    return found


def rows_of(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """The tasks as rows that hold their texts and what will come behind, filled up on the right.

    Returns:
        `ids` (R, W), `lengths` (R,) of the texts, and `limits` (R,) of what they may become, all
        int64.
    """
    lengths = [len(task.ids) for task in tasks]
    limits = [len(task.ids) + task.max_new_tokens for task in tasks]
    ids = torch.zeros(len(tasks), max(limits, default=0), dtype=torch.long)
    for row, task in enumerate(tasks):
        ids[row, : len(task.ids)] = torch.tensor(task.ids)
    return {"ids": ids, "lengths": torch.tensor(lengths), "limits": torch.tensor(limits)}


def choose(draw: Draw, logits: Tensor, ends: list[int]) -> int:
    """The next token by its logits (V,), or `ENDED`."""
    scores = draw(torch.empty(0), logits.float()[None])
    token = int(scores.argmax())
    return ENDED if token in ends else token


def _continue_rows(
    accelerator: Accelerator,
    model: nn.Module,
    rows: dict[str, Tensor],
    draws: Sequence[Draw],
    ends: list[int],
    is_over: Callable[[], bool],
) -> list[list[int]]:
    """The new tokens of each of some rows; causal attention hides what stands behind them."""
    ids, lengths = rows["ids"].clone(), rows["lengths"].clone()
    limits, began = rows["limits"].clone(), rows["lengths"].tolist()
    while (is_open := lengths < limits).any():
        logits = model(ids.to(accelerator.device))[0]
        last = logits[torch.arange(len(ids)), (lengths - 1).tolist()]  # (R, V)
        own = None
        if accelerator.is_main_process:
            tokens = torch.full_like(lengths, ENDED)
            for row in [] if is_over() else is_open.nonzero().flatten().tolist():
                tokens[row] = choose(draws[row], last[row], ends)
            own = {"tokens": tokens}
        tokens = broadcast_batch(accelerator, own)["tokens"]
        has_ended = is_open & (tokens == ENDED)
        limits[has_ended] = lengths[has_ended]
        for row in (is_open & ~has_ended).nonzero().flatten().tolist():
            ids[row, lengths[row]] = tokens[row]
            lengths[row] += 1
    ended = zip(ids, began, lengths.tolist(), strict=True)
    return [row[start:end].tolist() for row, start, end in ended]


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
