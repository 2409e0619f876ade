"""Streamed data in a run of one or many processes: rank 0 reads, every rank gets its share."""

from __future__ import annotations

import hashlib
import json
from functools import partial

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from arguments import Arguments, BatchSizes, holds_conversations
from llm_training.data import DataError, PreparedData
from llm_training.data.documents.stream_documents import DocumentStream, open_stream
from llm_training.data.recipe import make_format
from llm_training.data.rows.store_rows import Rows
from llm_training.data.rows.stream_blocks import BlockReader
from llm_training.data.rows.streaming import StreamWindows, stream_validation
from llm_training.data.rows.windows import RowSettings, row_settings
from llm_training.ranks import broadcast_batch, data_parallel
from llm_training.state import TrainState


class TrainingStream:
    """The training split of a streamed dataset, at the place where a run begins or goes on.

    Every rank must make one, and call its methods together.

    Attributes:
        fingerprint: of all that decides the rows but the data's own content.
    """

    def __init__(
        self,
        arguments: Arguments,
        accelerator: Accelerator,
        data: PreparedData,
        block_size: int,
        *,
        seed: int,
        state: TrainState,
    ):
        self._accelerator = accelerator
        self._position = state.samples
        self._settings = _settings(arguments, block_size)
        self._reader: BlockReader | None = None
        if accelerator.is_main_process:
            assert data.tokenizer is not None, "argument checks see to it"
            self._reader = BlockReader(
                _open(arguments, data, arguments.dataset_split),
                data.tokenizer,
                self._settings,
                rows_in_block=arguments.shuffle_buffer_size,
                seed=seed,
                state=state.stream,
            )
        identity = self._reader.identity if self._reader else None
        (identity,) = broadcast_object_list([identity])
        content = json.dumps([identity, data.fingerprint], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def windows(self, batch: BatchSizes, num_samples: int) -> StreamWindows:
        """This rank's share of every step."""
        rank, num_ranks = data_parallel(self._accelerator)
        return StreamWindows(
            self._reader,
            position=self._position,
            num_samples=num_samples,
            micro_batch_size=batch.per_device,
            num_micro_batches=batch.accumulation,
            rank=rank,
            num_ranks=num_ranks,
            document_mask=self._settings.document_mask,
            share=partial(broadcast_batch, self._accelerator),
            say=self._accelerator.print,
        )


def streamed_validation(
    arguments: Arguments,
    accelerator: Accelerator,
    data: PreparedData,
    block_size: int,
    num_rows: int,
) -> Rows:
    """The first rows of the dataset's validation split, in memory; every rank must call this."""
    split = arguments.dataset_validation_split or "validation"
    accelerator.print(f"Reading the first {num_rows:,} rows of {arguments.dataset_name} [{split}]")
    assert data.tokenizer is not None, "argument checks see to it"
    return stream_validation(
        _open(arguments, data, split) if accelerator.is_main_process else None,
        data.tokenizer,
        _settings(arguments, block_size),
        num_rows,
        share=partial(broadcast_batch, accelerator),
    )


def _settings(arguments: Arguments, block_size: int) -> RowSettings:
    return row_settings(arguments, block_size, is_conversation=holds_conversations(arguments))


def _open(arguments: Arguments, data: PreparedData, split: str) -> DocumentStream:
    if arguments.dataset_name is None:
        raise DataError("streaming needs dataset_name.")
    return open_stream(
        arguments.dataset_name,
        arguments.dataset_config_name,
        make_format(arguments, data.tokenizer),
        split=split,
        revision=arguments.dataset_revision,
        skip_bad_documents=arguments.skip_bad_documents,
    )
