"""Whether a model whose code came along sees what is still to come: tried, not believed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_training.pretrained import ModelError
from llm_training.ranks import sum_over_ranks

NUM_KEPT = 4  # tokens of the first row, which stay as they are
TIMES_NOISE = 10.0


def brings_its_code(model: PreTrainedModel) -> bool:
    """Whether a model is of no kind that transformers knows by itself.

    Of those it is known which look ahead (`pretrained.TWO_SIDED`).
    """
    return type(model).__module__.partition(".")[0] != "transformers"


@torch.no_grad()
def check_causality(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    batch_size: int,
    block_size: int,
    vocab_size: int,
) -> None:
    """Changes the later tokens of a row and looks whether the logits of the first stay the same.

    They do to the bit, but for experts: with which tokens one is computed at once depends on all
    of them, and rounding on that. So other rows, which nobody sees, are changed for comparison.

    It does so on the prepared model, with its kernel and precision and the shape of a training
    batch (of two rows at least). Every rank must call this. No random number is drawn.

    Args:
        model: the prepared `CausalLMWithLoss`; it is left in training mode.
        batch_size, block_size: of a micro-batch.
        vocab_size: ids are below; at least 2.

    Raises:
        ModelError: they do not; on every rank.
    """
    rows, places = torch.arange(max(2, batch_size))[:, None], torch.arange(block_size)
    input_ids = (places * 7919 + rows * 104729) % vocab_size

    def first_logits(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(accelerator.device))[0]
        return logits[0, :NUM_KEPT].float()

    def change_by(is_other: Tensor) -> float:
        changed = torch.where(is_other, (input_ids + 1) % vocab_size, input_ids)
        return float((first_logits(changed) - before).norm() / before.norm())

    model.eval()
    before = first_logits(input_ids)
    noise = change_by((rows > 0) & (places >= 0))
    change = change_by((rows == 0) & (places >= NUM_KEPT))
    model.train()
    (num_seeing,) = sum_over_ranks(accelerator, float(change > TIMES_NOISE * noise))
    if num_seeing:
        raise ModelError(
            "The model is no causal language model: its code lets a position see those behind it,"
            f" and so the token that it is to predict (other tokens behind the first {NUM_KEPT} of"
            f" a row changed their logits by {change:.2%}; rounding does by {noise:.2%}). Use a"
            " model, or a setting of it, that is made to continue text."
        )
