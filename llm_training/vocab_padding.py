"""Rows without a token in embedding and head: GPUs multiply faster where sizes divide by 64.

The rows are zeros at the start and for ever. No id looks them up, and their logits are minus
infinity, so that no softmax gives them anything: their gradient is exactly zero, and what has
neither value nor gradient, no optimizer moves. Loss, gradients and guesses are those of the model
without them. Checkpoints hold the rows; models for others do not (`cut_padding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_training.zero_init import gathered, whole_shape

# On a parameter: how many of its rows stand for a token.
MARK = "num_tokens"


class PaddedHead(nn.Linear):
    """The last layer of a language model, in the place of a plain one, with its very parameters.

    Its outputs from `num_tokens` on stand for no token: they are minus infinity. An offset does it,
    which the product adds in passing; to write into the logits would copy them on the way back.
    """

    def __init__(self, head: nn.Linear, num_tokens: int):
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.num_tokens = num_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of `hidden` (..., H)."""
        num_padded = self.out_features - self.num_tokens
        if not num_padded:
            return super().forward(hidden)
        offset = F.pad(self.weight.new_zeros(self.num_tokens), (0, num_padded), value=-math.inf)
        return F.linear(hidden, self.weight, offset if self.bias is None else self.bias + offset)


def why_not_padded(model: PreTrainedModel) -> str | None:
    """Why `model` is not of the simple form that can be padded; None where it is.

    What comes behind its head is another question: `chunked_loss.why_not_chunked` answers it.
    """
    kind, vocab_size = model.config.model_type, model.config.get_text_config().vocab_size
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or table.num_embeddings != vocab_size:
        return f"the embedding of {kind} is no table with a row for each token"
    if type(head) is not nn.Linear or head.out_features != vocab_size:
        return f"the head of {kind} is no plain linear layer with an output for each token"
    ours = _names_with_rows(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in ours and whole_shape(parameter)[:1] == (vocab_size,):
            return f"{name} of {kind} has a row for each token too"
    return None


def pad_vocab(model: PreTrainedModel, num_rows: int) -> None:
    """Gives embedding and head `num_rows` rows each; `why_not_padded` must have no objection.

    No random number is drawn. Ties stay, and the model's configuration then tells `num_rows`.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding) and isinstance(head, nn.Linear)
    num_tokens, is_tied = head.out_features, head.weight is table.weight
    table.weight = _with_zero_rows(table.weight, num_rows)
    head.weight = table.weight if is_tied else _with_zero_rows(head.weight, num_rows)
    if head.bias is not None:
        head.bias = _with_zero_rows(head.bias, num_rows)
    table.num_embeddings = head.out_features = num_rows
    model.set_output_embeddings(PaddedHead(head, num_tokens))
    model.config.get_text_config().vocab_size = num_rows


def num_tokens_of(model: PreTrainedModel) -> int:
    """The vocabulary of `model` without padding."""
    head = model.get_output_embeddings()
    is_padded = isinstance(head, PaddedHead)
    return int(head.num_tokens if is_padded else model.config.get_text_config().vocab_size)


def trained_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that no backend has prepared yet, without padding."""
    shape, num_tokens = whole_shape(parameter), getattr(parameter, MARK, None)
    return shape if num_tokens is None else torch.Size((num_tokens, *shape[1:]))


def cut_padding(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """`weights`, whole and by the names of `model`, without the rows that stand for no token.

    Names of one tensor share one afterwards too. Nothing is copied.
    """
    num_tokens, padded = num_tokens_of(model), _names_with_rows(model)
    if num_tokens == model.config.get_text_config().vocab_size:
        return dict(weights)
    cut = {id(weights[name]): weights[name][:num_tokens] for name in padded & weights.keys()}
    return {name: cut.get(id(tensor), tensor) for name, tensor in weights.items()}


def _names_with_rows(model: PreTrainedModel) -> set[str]:
    """The parameters of embedding and head by name, a tied one by both its names."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if module is modules[0] or module is modules[1]
        for parameter in ("weight", "bias")
    }


def _with_zero_rows(parameter: Tensor, num_rows: int) -> nn.Parameter:
    """A parameter that begins with the rows of this one; whole also where ZeRO-3 has cut it."""
    assert isinstance(parameter, nn.Parameter)
    shape = whole_shape(parameter)
    with gathered(parameter):
        sides = (0, 0) * (len(shape) - 1)
        rows = F.pad(parameter.detach(), (*sides, 0, num_rows - shape[0]))
    padded = nn.Parameter(rows, requires_grad=parameter.requires_grad)
    setattr(padded, MARK, shape[0])
    return padded
