"""Whether documents in one row really do not see each other: tried, not believed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_training.losses import IGNORE_INDEX
from llm_training.ranks import sum_over_ranks

NUM_DOCUMENTS = 3


class DocumentMaskError(RuntimeError):
    """The model's attention crosses the borders of documents; the message says what to do."""


@torch.no_grad()
def check_document_mask(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    batch_size: int,
    block_size: int,
    vocab_size: int,
    kernel: str,
) -> None:
    """Changes one document and looks whether the loss of the others in its row stays the same.

    It does so on the prepared model, with its kernel and precision and the shape of a training
    batch. The sums must be equal to the last bit: whoever sees nothing computes the same. Every
    rank must call this. No random number is drawn.

    Args:
        model: the prepared `CausalLMWithLoss`; it is left in training mode.
        batch_size, block_size: of a micro-batch.
        vocab_size: ids are below.
        kernel: how attention is computed, for the message.

    Raises:
        DocumentMaskError: some document sees another; on every rank.
    """
    length = block_size // NUM_DOCUMENTS
    if length < 2:
        raise DocumentMaskError(
            f"--block_size {block_size} is too short for rows of several documents. Give"
            f" {2 * NUM_DOCUMENTS} or more, or --document_mask false."
        )
    places = torch.arange(block_size).expand(batch_size, -1)
    document = (places // length).clamp(max=NUM_DOCUMENTS - 1)
    position_ids = places - document * length
    input_ids = (places * 7919 + torch.arange(batch_size)[:, None] * 104729) % vocab_size
    changed = torch.where(document == 1, (input_ids + 1) % vocab_size, input_ids)
    is_judged = (document != 1) & (position_ids > 0)
    labels = input_ids.masked_fill(~is_judged, IGNORE_INDEX)

    def loss_of(ids: Tensor) -> float:
        batch = {"input_ids": ids, "labels": labels, "position_ids": position_ids}
        return float(model(**{name: t.to(accelerator.device) for name, t in batch.items()})[0])

    model.eval()
    before, after = loss_of(input_ids), loss_of(changed)
    model.train()
    (num_crossed,) = sum_over_ranks(accelerator, float(before != after))
    if num_crossed:
        raise DocumentMaskError(
            "document_mask: a change in one document changed the loss of others in its row"
            f" ({before:.6f} became {after:.6f} with {kernel} attention), so they see each other."
            " Give another --attn_implementation (sdpa, eager) or another kind of model, or"
            " --document_mask false to let documents of a row see those before them."
        )
