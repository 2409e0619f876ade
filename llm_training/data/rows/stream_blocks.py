"""A stream of documents as blocks of rows; the place where each block begins can be saved."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from llm_training.data.documents.stream_documents import (
    DocumentStream,
    StreamedDocument,
    StreamPlace,
)
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger
from llm_training.data.rows.order import sample_rows
from llm_training.data.rows.row_account import RowAccount
from llm_training.data.rows.store_rows import Rows, StreamRows
from llm_training.data.rows.windows import RowSettings
from llm_training.data.tokens.encoding import TextEncoder
from llm_training.data.tokens.store_meta import dtype_for
from llm_training.data.tokens.token_store import TokenArray
from llm_training.data.tokens.tokenizers import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every block has an order of its own.
_SEED_STEP = 0x9E3779B97F4A7C15
_NO_TOKENS = TokenArray(np.empty(0, np.uint32), np.empty(0, np.uint64))


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins, and what was read before it; `to_dict` is what a checkpoint keeps.

    Attributes:
        position: of the block's first row, in samples.
        number: blocks before it.
        place: where its first document stands in the stream.
        carried: tokens of documents before that, which filled no row.
        documents: how many documents were read.
        account: what became of their tokens; those carried are not yet in it.
    """

    position: int
    number: int
    place: StreamPlace
    carried: TokenArray = _NO_TOKENS
    documents: int = 0
    account: RowAccount = field(default_factory=RowAccount)

    def to_dict(self) -> dict[str, Any]:
        """The start in plain values, for JSON."""
        carried = self.carried
        arrays = {"tokens": carried.tokens, "ends": carried.ends, "learned": carried.learned}
        return {
            "position": self.position,
            "number": self.number,
            "place": dataclasses.asdict(self.place),
            "carried": {name: None if a is None else a.tolist() for name, a in arrays.items()},
            "documents": self.documents,
            "account": dataclasses.asdict(self.account),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockStart:
        """The inverse of `to_dict`."""
        carried = values["carried"]
        learned = carried["learned"]
        return cls(
            position=values["position"],
            number=values["number"],
            place=StreamPlace.from_dict(values["place"]),
            carried=TokenArray(
                np.array(carried["tokens"], np.uint32),
                np.array(carried["ends"], np.uint64),
                None if learned is None else np.array(learned, np.uint8),
            ),
            documents=values["documents"],
            account=RowAccount(**values["account"]),
        )

    def lines(self) -> list[str]:
        """What was read before this block, for a person."""
        left_out = Ledger(left_out=dict(self.place.left_out)).lines()
        return [f"stream: {self.documents:,} documents, {self.account.line()}", *left_out]


@dataclass(frozen=True)
class Block:
    """Rows that lie in memory together and are taken in an order of their own.

    Attributes:
        start: where the block begins.
        end: where the next one does.
    """

    start: BlockStart
    end: BlockStart
    rows: Rows
    seed: int

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers in `rows` of the samples at these positions of the run, (N,) int64."""
        return sample_rows(positions - self.start.position, self.rows.num_rows, self.seed)


class BlockReader:
    """Reads a stream block by block, each of about `rows_in_block` rows.

    With stream packing, the tokens that fill no row are carried over into the next block. With
    best_fit, each block is packed by itself.

    Args:
        stream: the documents.
        tokenizer: makes them into tokens; plain text gets an end-of-text token.
        settings: makes the tokens into rows.
        rows_in_block: whole documents are read until there are tokens for so many rows.
        seed: of the order.
        state: what `state` gave, to go on from there; None: the stream's beginning.

    Attributes:
        start: where the next block begins.
        identity: plain values that change when the rows or their order may have changed.
        doing: what `read` is doing at the moment; for another thread to tell.

    Raises:
        DataError: `state` is of another stream, or of other settings.
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        settings: RowSettings,
        *,
        rows_in_block: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ):
        self._stream = stream
        self._tokenizer = tokenizer
        self._settings = settings
        self._rows_in_block = rows_in_block
        self._seed = seed
        self.identity = self._identify()
        if state is None:
            self.start = BlockStart(position=0, number=0, place=stream.begin())
        else:
            _check_same(state["of"], self.identity)
            self.start = BlockStart.from_dict(state["start"])
        self.doing = ""
        self._is_stopped = threading.Event()
        self._documents = TextEncoder(tokenizer).encode(self._parts(self.start.place))

    def _identify(self) -> dict[str, Any]:
        """What a state must share with the reader that goes on from it, as JSON gives it back."""
        import datasets

        identity = {
            "stream": self._stream.key(),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "rows": dataclasses.asdict(self._settings),
            "shuffle_buffer_size": self._rows_in_block,
            "seed": self._seed,
            # Its state, and the order of shards in later epochs, are the library's own affair.
            "datasets": datasets.__version__,
        }
        return cast(dict[str, Any], json.loads(json.dumps(identity)))

    def state(self, start: BlockStart) -> dict[str, Any]:
        """What goes on from `start`, in plain values for JSON."""
        return {"of": self.identity, "start": start.to_dict()}

    def stop(self) -> None:
        """Lets `read`, in another thread, come to an end at its next document."""
        self._is_stopped.set()

    def read(self) -> Block:
        """The next block that has at least one row.

        Raises:
            DataError: a fault in the data, or a whole epoch makes no row.
            StreamStopped: after `stop`.
        """
        first_epoch = self.start.place.epoch
        while True:
            block = self._read_block()
            self.start = block.end
            if block.rows.num_rows:
                return block
            # Two borders between epochs: there is a whole epoch between them.
            if self.start.place.epoch >= first_epoch + 2:
                raise DataError(
                    f"{self._stream.name} makes not one row in a whole epoch: no conversation has"
                    f" a learned token within a row of {self._settings.block_size}. Give other"
                    " data, or a larger --block_size."
                )

    def _parts(self, place: StreamPlace) -> Iterator[StreamedDocument]:
        if place.row:
            self.doing = (
                f"going on after row {place.row:,} of {self._stream.name}; the library reads the"
                " shard that it lies in from its beginning"
            )
        else:
            self.doing = f"reading the first row of {self._stream.name}"
        for streamed in self._stream.documents(place):
            if self._is_stopped.is_set():
                raise StreamStopped
            self.doing = f"reading {streamed.document.where}"
            yield streamed

    def _read_block(self) -> Block:
        start = self.start
        wanted = self._rows_in_block * self._settings.block_size
        gathered = _Gathered(self._tokenizer, start.carried)
        place, documents = start.place, start.documents
        for streamed, ids, learned in self._documents:
            gathered.add(ids, learned)
            place = streamed.after
            documents += 1
            if gathered.num_tokens >= wanted:
                break
        tokens = gathered.tokens()
        rows = self._settings.rows(tokens)
        carried = _NO_TOKENS
        if isinstance(rows, StreamRows):
            carried = _from(tokens, tokens.num_tokens - rows.num_leftover_tokens)
        end = BlockStart(
            position=start.position + rows.num_rows,
            number=start.number + 1,
            place=place,
            carried=carried,
            documents=documents,
            account=_add(start.account, rows.accounts()[""], carried.num_tokens),
        )
        seed = (self._seed + (start.number + 1) * _SEED_STEP) % 2**64
        return Block(start, end, rows, seed)


class StreamStopped(Exception):
    """The reader was told to stop."""


class _Gathered:
    """Documents end to end, as in a token store."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, carried: TokenArray = _NO_TOKENS):
        self.num_tokens = carried.num_tokens
        self._vocab_size = len(tokenizer)
        self._eos = np.array([cast(int, tokenizer.eos_token_id)], np.uint32)
        self._ids = [carried.tokens]
        self._learned = [] if carried.learned is None else [carried.learned]
        self._ends: list[int] = [] if carried.ends is None else carried.ends.tolist()

    def add(self, ids: NDArray[np.uint32], learned: NDArray[np.uint8] | None) -> None:
        """Appends a document; a conversation brings its own end-of-text token, as in a store."""
        self._ids.append(ids)
        self.num_tokens += len(ids)
        if learned is None:
            self._ids.append(self._eos)
            self.num_tokens += 1
        else:
            self._learned.append(learned)
        self._ends.append(self.num_tokens)

    def tokens(self) -> TokenArray:
        """All of them; raises DataError for an id that is not in the vocabulary."""
        ids = np.concatenate(self._ids)
        largest = int(ids.max(initial=0))
        if largest >= self._vocab_size:
            raise DataError(
                f"The tokenizer gave id {largest:,}, but its vocabulary has only"
                f" {self._vocab_size:,} tokens (ids from 0). Its files do not belong together; use"
                " another tokenizer."
            )
        return TokenArray(
            ids.astype(dtype_for(self._vocab_size)),
            np.array(self._ends, np.uint64),
            np.concatenate(self._learned) if self._learned else None,
        )


def gather_tokens(
    documents: Iterable[StreamedDocument], tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> TokenArray:
    """The first documents that have together `num_tokens` tokens, or all of them."""
    gathered = _Gathered(tokenizer)
    for _, ids, learned in TextEncoder(tokenizer).encode(documents):
        gathered.add(ids, learned)
        if gathered.num_tokens >= num_tokens:
            break
    return gathered.tokens()


def _from(tokens: TokenArray, first: int) -> TokenArray:
    """The tokens from `first` on."""
    assert tokens.ends is not None
    return TokenArray(
        tokens.tokens[first:].copy(),
        tokens.ends[tokens.ends > first] - np.uint64(first),
        None if tokens.learned is None else tokens.learned[first:].copy(),
    )


def _add(before: RowAccount, block: RowAccount, num_carried: int) -> RowAccount:
    """The sum of two accounts; the tokens that the block carries over are the next one's."""
    totals = {
        each.name: getattr(before, each.name) + getattr(block, each.name)
        for each in dataclasses.fields(RowAccount)
    }
    totals["tokens"] -= num_carried
    totals["leftover"] -= num_carried
    return RowAccount(**totals)


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [name for name in now if saved.get(name) != now[name]]
    if different:
        name = different[0]
        raise DataError(
            f"The stream's state in the checkpoint is of {name} {saved.get(name)!r}, but this run"
            f" has {now[name]!r}: it would go on with other rows. Start with the same"
            " settings and packages, or train anew in another output_dir."
        )
