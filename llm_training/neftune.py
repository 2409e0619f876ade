"""NEFTune: noise on the embeddings while training, so that fine-tuning learns less by heart.

Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning"
(arXiv:2310.05914).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from llm_training.causal_lm import CausalLMWithLoss


class EmbeddingNoise:
    """Uniform noise of at most alpha / sqrt(L * H) on each number that an embedding returns.

    H is the width of the embedding. L is how many tokens see each other: those of the row, or of
    the token's own document where a row keeps its documents apart. Evaluation has no noise.
    """

    def __init__(self, alpha: float, *, num_parts: int = 1):
        """Noise of strength `alpha` for rows whose positions `num_parts` ranks share."""
        self.alpha, self.num_parts = alpha, num_parts
        self._position_ids: Tensor | None = None

    @contextmanager
    def in_documents(self, position_ids: Tensor | None) -> Iterator[None]:
        """Inside, `position_ids` (B, T) int64 tell where documents begin: at 0; None: one a row."""
        self._position_ids = position_ids
        try:
            yield
        finally:
            self._position_ids = None

    def __call__(self, module: nn.Module, _: Any, embeddings: Tensor) -> Tensor | None:
        """The forward hook of an embedding; `embeddings` are (B, T, H) in any floating type.

        The noise comes from torch's generator, whose state is part of every checkpoint, and is
        drawn in float32 whatever the type, so that it is the same in every precision.
        Compiled code draws other numbers from the same state, as it does for dropout.
        """
        if not module.training:
            return None
        num_positions, width = embeddings.shape[-2:]
        if self._position_ids is None:
            bound: Tensor | float = self.alpha / (num_positions * self.num_parts * width) ** 0.5
        else:
            lengths = document_lengths(self._position_ids)[..., None]
            bound = self.alpha / (lengths.float() * width).sqrt()
        noise = torch.rand(embeddings.shape, dtype=torch.float32, device=embeddings.device)
        noise = noise.mul_(2).sub_(1).mul_(bound)
        return embeddings + noise.to(embeddings.dtype)


def document_lengths(position_ids: Tensor) -> Tensor:
    """How many tokens the document of each position holds, without a question to the device.

    Args:
        position_ids: (B, T) int64; they begin at 0 and count on in each document of a row.

    Returns:
        (B, T) int64.
    """
    is_first = F.pad(position_ids[:, 1:] == 0, (1, 0), value=False)
    document = is_first.cumsum(-1)  # its number in its row, from 0 on
    counts = torch.zeros_like(document).scatter_add_(1, document, torch.ones_like(document))
    return counts.gather(1, document)


def add_embedding_noise(
    network: CausalLMWithLoss, alpha: float | None, *, num_parts: int = 1
) -> list[str]:
    """Lets the embedding of `network` add noise to what it returns while it trains.

    The noise is on the output of the embedding itself; a model that multiplies that afterwards, as
    gemma does, multiplies the noise with it. Ranks that hold one model between them are seeded
    alike and draw the same; all others draw each their own.

    Args:
        network: before any backend has seen it.
        alpha: `--neftune_noise_alpha`; None: no noise.
        num_parts: ranks that share the positions of a row, which stays one row for the noise.

    Returns:
        What the log says of it.
    """
    if alpha is None:
        return []
    table = network.model.get_input_embeddings()
    network.embedding_noise = EmbeddingNoise(alpha, num_parts=num_parts)
    table.register_forward_hook(network.embedding_noise)
    width = getattr(table, "embedding_dim", "width")
    return [
        f"NEFTune  noise of {alpha:g} / sqrt(tokens x {width}) on the embeddings while training"
    ]
