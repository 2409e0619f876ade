"""Training rows from a stream: one process reads, every process gets its share of each step."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm_training.data.documents.stream_documents import DocumentStream
from llm_training.data.errors import DataError
from llm_training.data.progress import SECONDS_BETWEEN_LINES
from llm_training.data.rows.store_rows import NO_ROW, Batch, Rows
from llm_training.data.rows.stream_blocks import Block, BlockReader, BlockStart, gather_tokens
from llm_training.data.rows.windows import RowSettings
from llm_training.data.tokens.token_store import TokenArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Hands what the reading process gives it to every process, which call it together.
Share = Callable[[Batch | None], Batch]
Say = Callable[[str], None]

CLOSE_SECONDS = 10.0


def _own(batch: Batch | None) -> Batch:
    """Shares with nobody."""
    assert batch is not None, "the only process reads"
    return batch


class StreamWindows:
    """The micro-batches of one rank, step by step; what `TrainingWindows` is for a store.

    A stream cannot be seeked in: positions are asked for one step after the other. The samples of
    a step do not depend on how it is split, and are split as in `TrainingWindows`.

    Args:
        reader: on the one process that reads the stream; None on all others.
        position: the samples consumed so far, within or at the end of the reader's first block.
        num_samples: where the run ends, in samples; later positions are empty rows.
        micro_batch_size: rows of one forward pass on one rank.
        num_micro_batches: forward passes of each rank in a step.
        rank: this process among those that read different rows; num_ranks: all of them.
        document_mask: whether tokens see their own document alone, as the reader makes its rows.
        share: hands the rows of a whole step from the process that reads to all.
        say: takes a line every few seconds while a step waits for the stream.
    """

    def __init__(
        self,
        reader: BlockReader | None,
        *,
        position: int,
        num_samples: int,
        micro_batch_size: int,
        num_micro_batches: int,
        rank: int,
        num_ranks: int,
        document_mask: bool = False,
        share: Share = _own,
        say: Say = print,
    ):
        self.num_samples = num_samples
        self.document_mask = document_mask
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.rank = rank
        self.num_ranks = num_ranks
        self._share = share
        self._next = position
        self._step: Batch = {}
        self._blocks = _Blocks(reader, position, num_samples, say) if reader else None

    @property
    def _step_size(self) -> int:
        return self.num_ranks * self.num_micro_batches * self.micro_batch_size

    def window(self, position: int) -> list[Batch]:
        """The `num_micro_batches` batches of this rank, each (micro_batch_size, block_size).

        Every rank must call this.

        Raises:
            DataError: a fault in the data or in reading it, on the process that reads.
        """
        assert position == self._next, f"a stream stands at {self._next}, not at {position}"
        mine = self._blocks.step(position, self._step_size) if self._blocks else None
        self._step = self._share(mine)
        self._next = position + self._step_size
        return [self._micro_batch(g) for g in range(self.num_micro_batches)]

    def _micro_batch(self, g: int) -> Batch:
        start = (g * self.num_ranks + self.rank) * self.micro_batch_size
        part = slice(start, start + self.micro_batch_size)
        return {name: tensor[part] for name, tensor in self._step.items()}

    def sample_ids(self, position: int) -> NDArray[np.int64]:
        """What stands in for row numbers: a hash of the content of each sample of a step.

        Args:
            position: where the step begins that `window` gave last.

        Returns:
            (N,) int64, over all ranks; N is less than a whole step at the end of the run.
        """
        assert position == self._next - self._step_size, "only the last window is known"
        count = max(0, min(self._step_size, self.num_samples - position))
        arrays = [self._step[name][:count].cpu().numpy() for name in sorted(self._step)]
        hashes = [_hash([array[row] for array in arrays]) for row in range(count)]
        return np.array(hashes, np.int64)

    def run_until(self, num_samples: int) -> None:
        """Moves the end of the run, when samples were passed over and others take their place."""
        self.num_samples = num_samples
        if self._blocks:
            self._blocks.run_until(num_samples)

    def state(self, position: int) -> dict[str, Any] | None:
        """What a checkpoint at `position` must keep: plain values, for `BlockReader`.

        Args:
            position: samples consumed: within the step that `window` gave last, or at its end.

        Returns:
            None on a process that does not read.
        """
        return self._blocks.state(position) if self._blocks else None

    def account_lines(self) -> list[str]:
        """What was read and left out, to the end of the block being trained on; for a person."""
        return self._blocks.account_lines() if self._blocks else []

    def close(self) -> None:
        """Ends reading ahead; nothing can be read any more."""
        if self._blocks:
            self._blocks.close()


def _hash(arrays: list[NDArray[np.int64]]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


class _Blocks:
    """The block that is trained on, and the next, which a thread reads meanwhile."""

    def __init__(self, reader: BlockReader, position: int, num_samples: int, say: Say):
        assert reader.start.position <= position, "the state of the stream is of a later position"
        self._reader = reader
        self._num_samples = num_samples
        self._say = say
        self._blocks: deque[Block] = deque()
        # Where blocks begin that may hold the next sample, in order.
        self._starts: deque[BlockStart] = deque([reader.start])
        self._ahead: Future[Block] | None = None
        self._thread: threading.Thread | None = None
        if position < num_samples:
            self._read_ahead()

    def step(self, position: int, count: int) -> Batch:
        """The rows at `count` positions, (count, block_size) each; empty ones beyond the run."""
        assert position < self._num_samples, "the run is over"
        self._forget(position)
        parts: list[Batch] = []
        at, end = position, min(position + count, self._num_samples)
        while at < end:
            block = self._block_at(at)
            stop = min(end, block.end.position)
            rows = block.rows_at(np.arange(at, stop, dtype=np.int64))
            if stop == end:
                rows = np.append(rows, np.full(position + count - end, NO_ROW))
            parts.append(block.rows.batch(rows))
            at = stop
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def run_until(self, num_samples: int) -> None:
        """Moves the end of the run; reads on where the last block was taken for the end."""
        is_read = bool(self._blocks) and self._blocks[-1].end.position >= self._num_samples
        self._num_samples = num_samples
        if is_read and self._blocks[-1].end.position < num_samples:
            self._read_ahead()

    def _forget(self, position: int) -> None:
        """Drops what lies before `position`."""
        while self._blocks and self._blocks[0].end.position <= position:
            self._blocks.popleft()
        while len(self._starts) > 1 and self._starts[1].position <= position:
            self._starts.popleft()

    def _block_at(self, position: int) -> Block:
        while not self._blocks or self._blocks[-1].end.position <= position:
            block = self._wait()
            self._blocks.append(block)
            # Blocks without a row may lie between the last one's end and the start of this one.
            self._starts[-1] = block.start
            self._starts.append(block.end)
            if block.end.position < self._num_samples:
                self._read_ahead()
        return next(block for block in self._blocks if position < block.end.position)

    def _read_ahead(self) -> None:
        self._ahead = Future()
        # A daemon: the library may hang in the network, which must not keep the process from
        # ending.
        self._thread = threading.Thread(
            target=_fulfil, args=(self._ahead, self._reader.read), name="stream", daemon=True
        )
        self._thread.start()

    def _wait(self) -> Block:
        assert self._ahead is not None, "the stream is closed"
        began = time.monotonic()
        while not wait([self._ahead], SECONDS_BETWEEN_LINES).done:
            seconds = time.monotonic() - began
            self._say(f"Waiting for the stream, {seconds:,.0f} s so far: {self._reader.doing}")
        return self._ahead.result()

    def state(self, position: int) -> dict[str, Any]:
        fitting = [start for start in self._starts if start.position <= position]
        assert fitting, f"what stood at {position} is forgotten"
        return self._reader.state(fitting[-1])

    def account_lines(self) -> list[str]:
        # With the whole block that is being trained on, as it was read.
        return (self._blocks[0].end if self._blocks else self._starts[0]).lines()

    def close(self) -> None:
        self._reader.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        self._ahead = None


def _fulfil(future: Future[Block], work: Callable[[], Block]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)  # it is raised again where the block is waited for


def stream_validation(
    stream: DocumentStream | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    num_rows: int,
    *,
    share: Share = _own,
) -> Rows:
    """The first rows of a stream, in memory; every rank must call this.

    Args:
        stream: the validation split, on the one process that reads it; None on all others.
        num_rows: as many; fewer where the split ends before; with best_fit packing about as many.
        share: as of `StreamWindows`.

    Raises:
        DataError: a fault in the data, or not even one row.
    """
    wanted = num_rows * settings.block_size
    mine: Batch | None = None
    if stream is not None:
        found = gather_tokens(stream.rest_of_epoch(stream.begin()), tokenizer, wanted)
        mine = _to_batch(found)
    tokens = _to_tokens(share(mine))
    if settings.packing == "stream":
        tokens = _first(tokens, wanted)
    rows = settings.rows(tokens, keep_last=True)
    if rows.num_rows == 0:
        raise DataError(
            f"The validation split has {tokens.num_tokens:,} tokens, which make not one row of"
            f" {settings.block_size}. Use another split, a smaller --block_size, or --eval_steps"
            " null to train without."
        )
    return rows


def _to_batch(tokens: TokenArray) -> Batch:
    arrays = {"tokens": tokens.tokens, "ends": tokens.ends, "learned": tokens.learned}
    return {
        name: torch.from_numpy(array.astype(np.int64))
        for name, array in arrays.items()
        if array is not None
    }


def _to_tokens(batch: Batch) -> TokenArray:
    learned = batch.get("learned")
    return TokenArray(
        batch["tokens"].cpu().numpy().astype(np.uint32),
        batch["ends"].cpu().numpy().astype(np.uint64),
        None if learned is None else learned.cpu().numpy().astype(np.uint8),
    )


def _first(tokens: TokenArray, count: int) -> TokenArray:
    assert tokens.ends is not None
    if tokens.num_tokens <= count:
        return tokens
    ends = np.append(tokens.ends[tokens.ends < count], np.uint64(count))
    learned = None if tokens.learned is None else tokens.learned[:count]
    return TokenArray(tokens.tokens[:count], ends, learned)
