"""Tokens that an existing model did not know: which they are, and their rows in its embedding.

An embedding grows only for a vocabulary that begins with the model's own. In any other, the ids
that the model has learned would mean something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from arguments import Arguments, ModelArguments
from llm_training.pretrained import ModelError, open_tokenizer
from llm_training.vocab_padding import why_not_padded
from llm_training.zero_init import gathered, whole_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SHOWN = 4


@dataclass(frozen=True)
class Growth:
    """What a tokenizer has beyond that of the model.

    Attributes:
        tokens: the new ones by their ids.
        num_ids: ids that are needed, from 0 on.
        difference: where the two disagree on an id that both have; "" where they do not.
    """

    tokens: dict[int, str]
    num_ids: int
    difference: str = ""

    def names(self) -> str:
        """The new tokens, the first ones by their text."""
        texts = [text for _, text in sorted(self.tokens.items())]
        shown = ", ".join(texts[:NUM_SHOWN])
        return shown if len(texts) <= NUM_SHOWN else f"{shown}, ..."


def fit_tokens(
    config: PretrainedConfig,
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> list[str]:
    """Gives the configuration of an existing model rows for all tokens of the data.

    Args:
        config: of the model as it is stored; its vocabulary grows where it must.
        tokenizer: of the data; None where that is token ids without one.
        vocab_size: of the data.

    Returns:
        What the log says of it.

    Raises:
        ModelError: the vocabulary is too large for the model and is none that continues its own,
            or adapters would not hold what grows.
    """
    text_config = config.get_text_config()
    num_rows = text_config.vocab_size
    growth = None if tokenizer is None else _growth(arguments, tokenizer, num_rows)
    needed = max(vocab_size, growth.num_ids if growth else 0)
    if needed <= num_rows:
        return [] if growth is None else _lines_of_fitting(growth, tokenizer, num_rows)
    if growth is None or growth.difference or growth.num_ids < needed or not growth.tokens:
        reason = growth.difference if growth else ""
        raise ModelError(
            f"The data uses a vocabulary of {needed} tokens, but the model embeds only"
            f" {num_rows}{f', and its ids mean something else: {reason}' if reason else ''}. Use"
            " the model's own tokenizer (--tokenizer_name), with --special_tokens for what it"
            " lacks, or train from scratch without vocab_size in --config_overrides."
        )
    text_config.vocab_size = needed
    if isinstance(arguments, Arguments) and arguments.lora_rank is not None:
        _check_adapters(config, arguments, growth, num_rows)
    return [
        f"Tokens   {len(growth.tokens):,} new ({growth.names()}): the embedding grows from"
        f" {num_rows:,} to {needed:,} rows, each new one the mean of the old"
    ]


def grow_embedding(model: PreTrainedModel, num_rows: int) -> None:
    """Gives embedding and head `num_rows` rows each; the new ones are the mean of the old.

    No random number is drawn, so all ranks have the same. Ties stay, and the model's configuration
    then tells `num_rows`.

    Raises:
        ModelError: the model has a table that cannot grow.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    if reason := why_not_padded(model):
        raise ModelError(f"The model has no place for new tokens: {reason}. Use another model.")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding) and isinstance(head, nn.Linear)
    is_tied = head.weight is table.weight
    table.weight = _with_mean_rows(table.weight, num_rows)
    head.weight = table.weight if is_tied else _with_mean_rows(head.weight, num_rows)
    if head.bias is not None:
        head.bias = _with_mean_rows(head.bias, num_rows)
    table.num_embeddings = head.out_features = num_rows
    model.config.get_text_config().vocab_size = num_rows


def _with_mean_rows(parameter: Tensor, num_rows: int) -> nn.Parameter:
    """A parameter that begins with the rows of this one; whole also where ZeRO-3 has cut it."""
    assert isinstance(parameter, nn.Parameter)
    with gathered(parameter), torch.no_grad():
        old = parameter.detach()
        new = old.mean(0, keepdim=True).expand(num_rows - len(old), *old.shape[1:])
        rows = torch.cat([old, new])
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _growth(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> Growth | None:
    """How the tokenizer continues that of the model; None where this has none to compare with."""
    vocabulary = {i: text for text, i in tokenizer.get_vocab().items()}
    num_ids = 1 + max(vocabulary)
    if _is_own(arguments, tokenizer):
        # Tokens that were put on top of a vocabulary may have no rows yet.
        added = tokenizer.added_tokens_decoder
        beyond = {i: text for i, text in vocabulary.items() if i >= num_rows}
        return Growth(beyond if all(i in added for i in beyond) else {}, num_ids)
    own_tokenizer = open_tokenizer(arguments)
    if own_tokenizer is None:
        return None
    own = {i: text for text, i in own_tokenizer.get_vocab().items()}
    new = {i: text for i, text in vocabulary.items() if i not in own}
    first = min((i for i, text in vocabulary.items() if own.get(i, text) != text), default=None)
    if first is None:
        return Growth(new, num_ids)
    difference = f"id {first} is {vocabulary[first]!r}, and {own[first]!r} in the model's tokenizer"
    return Growth(new, num_ids, difference)


def _is_own(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is the tokenizer of the model, without a token more."""
    is_same = str(tokenizer.name_or_path) == str(Path(str(arguments.model_name_or_path)))
    return is_same and not getattr(arguments, "special_tokens", [])


def _lines_of_fitting(growth: Growth, tokenizer: Any, num_rows: int) -> list[str]:
    """What is said where every token has a row already."""
    if growth.difference:
        return [
            f"WARNING: the tokenizer {str(tokenizer.name_or_path) or 'of the data'} is not the"
            f" model's: {growth.difference}. The embedding has learned the latter; give"
            " --tokenizer_name null to keep it"
        ]
    if not growth.tokens:
        return []
    first, last = min(growth.tokens), max(growth.tokens)
    return [
        f"Tokens   {len(growth.tokens):,} new ({growth.names()}) take rows {first:,} to {last:,},"
        f" which the embedding of {num_rows:,} has to spare"
    ]


def _check_adapters(
    config: PretrainedConfig, arguments: Arguments, growth: Growth, num_rows: int
) -> None:
    """Makes sure that what grows is trained, and that what is written fits a base.

    Raises:
        ModelError: it is not, or does not.
    """
    with torch.device("meta"), whole_models():
        plain: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=arguments.trust_remote_code
        )
    modules = (plain.get_input_embeddings(), plain.get_output_embeddings())
    names = [name for name, module in plain.named_modules() if module in modules]
    named = [name for name in names if _is_named(name, arguments.lora_modules_to_save)]
    is_trained = named == names or (named and modules[0].weight is modules[1].weight)
    if is_trained and arguments.merge_adapter:
        return
    short = " and ".join(name.rpartition(".")[2] for name in names)
    raise ModelError(
        f"--lora_rank {arguments.lora_rank} with {len(growth.tokens)} new tokens"
        f" ({growth.names()}): the embedding grows beyond its {num_rows} rows, and an adapter for"
        " a model of that size cannot hold the new ones. Name them in --lora_modules_to_save"
        f" ({short}) and give --merge_adapter true, which writes a whole model; or drop the new"
        " tokens (--special_tokens, --tokenizer_name)."
    )


def _is_named(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)
