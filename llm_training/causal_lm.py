"""A causal language model that returns its loss in place of its logits."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_training.chunked_loss import ChunkedHead
from llm_training.losses import likeliest_tokens, row_losses, shift_labels, token_loss_sum
from llm_training.neftune import EmbeddingNoise
from llm_training.packed_rows import rows_known
from llm_training.vocab_padding import num_tokens_of


class CausalLMWithLoss(nn.Module):
    """A causal language model whose forward pass ends in the summed token loss.

    Accelerate copies every output of the module it wraps to float32; the logits are the largest
    tensor of a step, so they stay inside.
    """

    def __init__(
        self, model: PreTrainedModel, *, chunked_loss: bool = False, label_smoothing: float = 0.0
    ):
        """Wraps `model`.

        Args:
            chunked_loss: whether its head judges by itself; `choose_chunked_loss` says whether it
                may.
            label_smoothing: as in `losses.token_loss_sum`: what is returned stays the plain loss.
        """
        super().__init__()
        self.model = model
        self.label_smoothing, self._num_tokens = label_smoothing, num_tokens_of(model)
        # In a tuple: a module here would be registered, and saved, a second time.
        self._chunked_heads = (
            (ChunkedHead.take_place(model, label_smoothing=label_smoothing),)
            if chunked_loss
            else ()
        )
        self.embedding_noise: EmbeddingNoise | None = None  # of `neftune.add_embedding_noise`
        # Sharding backends read from the wrapped module which blocks belong together.
        self._no_split_modules = model._no_split_modules
        self.config = model.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        next_tokens: Tensor | None = None,
        position_ids: Tensor | None = None,
        per_row: bool = False,
        with_guesses: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of a micro-batch.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, unshifted, -100 where nothing is predicted.
            next_tokens: (B, T) int64 in place of labels: they are shifted already, as they must be
                where ranks share the positions of a row.
            position_ids: (B, T) int64, where they are not 0 to T - 1: where ranks share a row, and
                under a document mask, where they begin at 0 in each document. Attention then stays
                within the documents: transformers tells them apart by these numbers.
            per_row: whether each row's loss is asked for, as in evaluation: without a gradient.
            with_guesses: whether the likeliest tokens are asked for, beside the loss of each row.

        Returns:
            The loss in nats summed over the predicted tokens, float32, a scalar or (B,); and the
            likeliest token of each position ((B, T) int64, anything where nothing is predicted) or
            None. Without labels the logits (B, T, V), minus infinity where they stand for no token,
            and None.
        """
        # Ranks that share a row hand over its positions as well: they part no documents.
        are_packed = position_ids is not None and next_tokens is None
        if labels is not None:
            next_tokens = shift_labels(labels)
        if next_tokens is not None and self._chunked_heads:
            (head,) = self._chunked_heads
            with head.judging(next_tokens, per_row=per_row, with_guesses=with_guesses):
                loss = self._head_output(input_ids, position_ids, are_packed)
            return loss, head.take_guesses()
        logits = self._head_output(input_ids, position_ids, are_packed)
        logits = logits.view(*input_ids.shape, -1)
        if next_tokens is None:
            return logits, None
        if per_row:
            guesses = likeliest_tokens(logits) if with_guesses else None
            return row_losses(logits, next_tokens), guesses
        loss = token_loss_sum(
            logits,
            next_tokens,
            label_smoothing=self.label_smoothing,
            num_tokens=self._num_tokens,
        )
        return loss, None

    def _head_output(
        self, input_ids: Tensor, position_ids: Tensor | None, are_packed: bool
    ) -> Tensor:
        if position_ids is not None and "flash" in self.config._attn_implementation:
            # Flash attention looks for documents in a single row only.
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        noise = self.embedding_noise
        documents = position_ids if are_packed else None
        # Without a mask and without a cache: with either, documents would see each other.
        with rows_known(are_packed), noise.in_documents(documents) if noise else nullcontext():
            outputs = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits: Tensor = outputs.logits
        return logits
