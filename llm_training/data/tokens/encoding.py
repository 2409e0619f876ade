"""Documents into token ids, on all cores, large ones in pieces; what of them is learned."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from llm_training.data.errors import DataError
from llm_training.data.tokens.encoding_processes import EncodingProcesses, PlainEncoder
from llm_training.data.tokens.words import SEPARATOR, is_local_normalizer, known_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_training.data.documents.sources import Document

# A batch goes to all cores. Two are encoded at a time, so that no core waits for the last piece of
# one; small ones stay in the processor's cache. An encoding takes up to 100 times its text.
_BATCH_CHARACTERS = min(2**21, 2**16 * max(2, os.cpu_count() or 1))
_BATCHES_AT_A_TIME = 2
# Longer pieces leave the cache, and take a third more time in all. Shorter documents are joined
# to pieces of this length: one encoding for all costs less.
_PIECE_CHARACTERS = 2**11
# Longer texts are cut even where that may change a token; cuts are looked for in the reach after.
_WHOLE_CHARACTERS = 2**20
_CUT_REACH = 2**16
# ASCII only: which other characters are letters depends on the version of Unicode.
_WORD_AT_LINE_END = re.compile(r"[A-Za-z0-9](?=\n)")
_LINE_END = re.compile(r"\S(?=\r?\n)")
_WORD_END = re.compile(r"\S(?=\s)")


class HasDocument(Protocol):
    """What the encoder needs of the parts it is given; it gives them back beside their tokens."""

    @property
    def document(self) -> Document: ...


P = TypeVar("P", bound=HasDocument)


class _Piece(NamedTuple, Generic[P]):
    """What is encoded as one text: a piece of one part, or several whole parts that are joined."""

    parts: Sequence[P]
    text: str
    is_last: bool = True
    learned: tuple[tuple[int, int], ...] | None = None


class _Encoded(NamedTuple):
    ids: NDArray[np.uint32]
    learned: NDArray[np.uint8] | None = None


class _Tokens(NamedTuple):
    ids: NDArray[np.uint32]
    learned: NDArray[np.uint8] | None
    is_last: bool


class TextEncoder:
    """Turns documents into ids: plain text, and conversations with their special tokens.

    No special token is read from plain text, and none is added to any. The tokenizer itself stays
    as it was: what is set here is set on a copy.

    Args:
        tokenizer: any of transformers'.
        num_processes: how many processes encode, where that is worth it; 1: this one; 0: this one,
            which leaves as much as it can to the library, for the sake of its other threads.

    Attributes:
        documents_cut_unsure: documents so far that were encoded in pieces, to bound the memory,
            although a token or two at each cut may not be those of the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_processes: int = 0):
        self.documents_cut_unsure = 0
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = None
        self._may_cut = False
        self._is_cut_unsure = False
        self._last_character = ""  # of the piece before, where its document goes on
        self._separator_id: int | None = None
        self._num_processes = num_processes
        self._processes: EncodingProcesses | None = None
        if tokenizer.is_fast:
            self._backend = _plain_copy(tokenizer)
            self._backend.encode_special_tokens = True
            self._may_cut = may_cut_before_newline(self._backend)
            if self._may_cut and self._backend.token_to_id(SEPARATOR) is None:
                self._backend.add_tokens([AddedToken(SEPARATOR, normalized=False)])
                self._separator_id = self._backend.token_to_id(SEPARATOR)
            self._plain = PlainEncoder(self._backend, self._separator_id if num_processes else None)

    @cached_property
    def _plain_encoder_of_separators(self) -> PlainEncoder:
        """One without a separator, for texts that hold it; made when first needed."""
        backend = _plain_copy(self._tokenizer)
        backend.encode_special_tokens = True
        return PlainEncoder(backend, None)

    @cached_property
    def _conversation_backend(self) -> Tokenizer:
        """A copy that reads special tokens; made when first needed, as it may take seconds."""
        backend = _plain_copy(self._tokenizer)
        backend.encode_special_tokens = False
        # It adds no token here, but may take the spaces of words out of their character ranges.
        backend.post_processor = None
        return backend

    def encode(
        self, parts: Iterable[P]
    ) -> Iterator[tuple[P, NDArray[np.uint32], NDArray[np.uint8] | None]]:
        """Yields (part, ids, learned) for each part, in order.

        `ids` is (tokens,) uint32. `learned` is None for plain text; for conversations (tokens,)
        uint8, 1 for each token that is learned. Parts are taken ahead, some MB at a time, so that
        all cores work. A piece of a document that comes in several is encoded by itself.

        Raises:
            DataError: a conversation, and the tokenizer is not a fast one.
        """
        ids: list[NDArray[np.uint32]] = []
        for part, tokens in self._encode_ahead(_batches(self._pieces(parts))):
            if tokens.is_last and not ids:
                yield part, tokens.ids, tokens.learned
                continue
            ids.append(tokens.ids)
            if tokens.is_last:
                yield part, np.concatenate(ids), None
                ids = []

    def _encode_ahead(self, batches: Iterator[list[_Piece[P]]]) -> Iterator[tuple[P, _Tokens]]:
        """Each part with its tokens; batches are encoded while those before are taken away.

        Reading, converting and writing, which Python does on one core, cost no time of their own.
        """
        at_a_time = max(_BATCHES_AT_A_TIME, self._num_processes)
        with ExitStack() as stack:
            threads = ThreadPoolExecutor(at_a_time)
            # Left early, nobody wants the rest; and one of the threads may be what drops this.
            stack.callback(threads.shutdown, wait=False, cancel_futures=True)
            # The library uses all cores itself; words are looked up on one.
            if self._num_processes > 1 and self._backend is not None and self._plain.has_words:
                self._processes = stack.enter_context(
                    EncodingProcesses(self._plain, self._num_processes)
                )
            waiting: deque[tuple[list[_Piece[P]], Future[list[_Encoded]]]] = deque()
            for batch in batches:
                waiting.append((batch, threads.submit(self._encode_batch, batch)))
                if len(waiting) > at_a_time:
                    yield from self._with_tokens(*waiting.popleft())
            while waiting:
                yield from self._with_tokens(*waiting.popleft())

    def _pieces(self, parts: Iterable[P]) -> Iterator[_Piece[P]]:
        joined: list[P] = []
        num_characters = 0
        for part in parts:
            if self._may_join(part.document):
                joined.append(part)
                num_characters += len(part.document.text)
                if num_characters < _PIECE_CHARACTERS:
                    continue
            if joined:
                yield _join(joined)
                joined, num_characters = [], 0
            if not self._may_join(part.document):
                yield from self._pieces_of(part)
        if joined:
            yield _join(joined)

    def _may_join(self, document: Document) -> bool:
        """Whether this is a short, whole, plain text that its tokenizer keeps apart from others."""
        return (
            self._separator_id is not None
            and document.is_last
            and not self._last_character
            and document.learned is None
            and len(document.text) < _PIECE_CHARACTERS
            and SEPARATOR not in document.text
        )

    def _pieces_of(self, part: P) -> Iterator[_Piece[P]]:
        document = part.document
        if document.learned is not None:
            self._check_conversation(document)
            yield _Piece((part,), document.text, learned=document.learned)
            return
        texts = self._cut(document)
        for i, text in enumerate(texts, 1):
            yield _Piece((part,), text, is_last=i == len(texts))

    def _check_conversation(self, document: Document) -> None:
        assert document.is_last, "a conversation is one document"
        if self._backend is None:
            raise DataError(
                f"{document.where}: conversations need a fast tokenizer, but this one"
                f" ({type(self._tokenizer).__name__}) is written in Python and cannot say which"
                " characters a token stands for. Use a tokenizer that has a tokenizer.json."
            )

    def _cut(self, document: Document) -> list[str]:
        """The pieces of a plain document; counts it, once, if it is not sure to be cut well."""
        text = document.text
        surely = cut_before_newlines(text, _PIECE_CHARACTERS) if self._may_cut else [text]
        pieces = [piece for sure in surely for piece in cut_anyway(sure, _WHOLE_CHARACTERS)]
        is_unsure = len(pieces) > len(surely) or not self._goes_on_surely(text)
        if is_unsure and not self._is_cut_unsure:
            self._is_cut_unsure = True
            self.documents_cut_unsure += 1
        self._last_character = "" if document.is_last else text[-1]
        if document.is_last:
            self._is_cut_unsure = False
        return pieces

    def _goes_on_surely(self, text: str) -> bool:
        """Whether no token could have reached over the cut before this piece, if there is one."""
        before = self._last_character
        if not before:
            return True
        return self._may_cut and bool(_WORD_AT_LINE_END.match(before + text[:1]))

    def _encode_batch(self, batch: list[_Piece[P]]) -> list[_Encoded]:
        chosen: dict[Callable[[list[_Piece[P]]], list[_Encoded]], list[int]] = {}
        for i, piece in enumerate(batch):
            chosen.setdefault(self._way_to_encode(piece), []).append(i)
        encoded: dict[int, _Encoded] = {}
        for encode, places in chosen.items():
            encoded.update(zip(places, encode([batch[i] for i in places]), strict=True))
        return [encoded[i] for i in range(len(batch))]

    def _way_to_encode(self, piece: _Piece[P]) -> Callable[[list[_Piece[P]]], list[_Encoded]]:
        if piece.learned is not None:
            return self._encode_conversations
        if self._backend is None:
            return self._encode_in_python
        is_joined = len(piece.parts) > 1
        if self._separator_id is not None and not is_joined and SEPARATOR in piece.text:
            return self._encode_separators
        return self._encode_plain

    def _encode_conversations(self, pieces: list[_Piece[P]]) -> list[_Encoded]:
        texts = [piece.text for piece in pieces]
        encodings = self._conversation_backend.encode_batch(texts, add_special_tokens=False)
        return [
            _Encoded(
                _as_array(encoding.ids),
                learned_tokens(piece.text, encoding.offsets, piece.learned or ()),
            )
            for piece, encoding in zip(pieces, encodings, strict=True)
        ]

    def _encode_separators(self, pieces: list[_Piece[P]]) -> list[_Encoded]:
        return _encoded(self._plain_encoder_of_separators.encode([piece.text for piece in pieces]))

    def _encode_plain(self, pieces: list[_Piece[P]]) -> list[_Encoded]:
        return _encoded((self._processes or self._plain).encode([piece.text for piece in pieces]))

    def _encode_in_python(self, pieces: list[_Piece[P]]) -> list[_Encoded]:
        # Tokenizers that are written in Python have no batches and no copy to set.
        encoded = self._tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        return [_Encoded(_as_array(ids)) for ids in encoded["input_ids"]]

    def _with_tokens(
        self, batch: list[_Piece[P]], encoded: Future[list[_Encoded]]
    ) -> Iterator[tuple[P, _Tokens]]:
        for piece, (ids, learned) in zip(batch, encoded.result(), strict=True):
            if len(piece.parts) == 1:
                yield piece.parts[0], _Tokens(ids, learned, piece.is_last)
                continue
            start = 0
            stops = np.flatnonzero(ids == self._separator_id).tolist()
            for part, stop in zip(piece.parts, [*stops, len(ids)], strict=True):
                yield part, _Tokens(ids[start:stop], None, is_last=True)
                start = stop + 1


def _join(parts: list[P]) -> _Piece[P]:
    return _Piece(parts, SEPARATOR.join(part.document.text for part in parts))


def _as_array(ids: list[int]) -> NDArray[np.uint32]:
    # By way of an array of Python's: three times as fast as numpy on a list.
    return np.frombuffer(array("I", ids), np.uint32)


def _encoded(arrays: list[array[int]]) -> list[_Encoded]:
    return [_Encoded(np.frombuffer(ids, np.uint32)) for ids in arrays]


def _plain_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def learned_tokens(
    text: str, offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]
) -> NDArray[np.uint8]:
    """Which tokens hold characters of `spans`: (tokens,) uint8 of 0 and 1.

    A token that reaches over the end of a span is learned: its beginning can only be generated.
    One that begins before a span is learned if all it has from there is whitespace, as " yes" after
    a prompt that ends in a space; if it has more, it is mostly the prompt's, and is not learned.

    Args:
        text: what was encoded.
        offsets: the range of characters [start, stop) of each token, in order.
        spans: ranges of characters.
    """
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), np.uint8)
    for start, stop in spans:
        earliest = start
        while earliest > 0 and text[earliest - 1].isspace():
            earliest -= 1
        learned[(starts >= earliest) & (stops > start) & (starts < stop)] = 1
    return learned


def _batches(pieces: Iterable[_Piece[P]]) -> Iterator[list[_Piece[P]]]:
    batch: list[_Piece[P]] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def cut_before_newlines(text: str, piece_characters: int) -> list[str]:
    """Pieces of about `piece_characters`, each ending in a letter or digit before a newline."""
    pieces = []
    start = 0
    while len(text) - start > piece_characters:
        match = _WORD_AT_LINE_END.search(text, start + piece_characters)
        if match is None:
            break
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return pieces


def cut_anyway(text: str, piece_characters: int) -> list[str]:
    """Pieces of about `piece_characters`: cut at a line end, else at whitespace, else anywhere.

    A cut is made before the whitespace, to which many tokenizers join what follows it.
    """
    pieces = []
    start = 0
    while len(text) - start > piece_characters:
        earliest = start + piece_characters
        reach = earliest + _CUT_REACH
        match = _LINE_END.search(text, earliest, reach) or _WORD_END.search(text, earliest, reach)
        stop = match.end() if match else earliest
        pieces.append(text[start:stop])
        start = stop
    pieces.append(text[start:])
    return pieces


def may_cut_before_newline(backend: Tokenizer) -> bool:
    """Whether pieces of `cut_before_newlines` are sure to give the same tokens as the whole text.

    True only for tokenizers that we know enough of; False costs speed on large documents, and a
    token or two at each cut of those that are too long to be encoded whole.
    """
    content = json.loads(backend.to_str())
    return (
        is_local_normalizer(content["normalizer"])
        and all("\n" not in t["content"] and not t["rstrip"] for t in content["added_tokens"])
        and (
            known_pattern(content["pre_tokenizer"]) is not None
            or _has_no_merges(content["model"], content["pre_tokenizer"])
        )
    )


def _has_no_merges(model: dict[str, Any], pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether every character or byte is a token of its own."""
    is_plain = pre_tokenizer is None or (
        pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]
    )
    return (
        is_plain
        and model["type"] == "BPE"
        and not model["merges"]
        and not (model["fuse_unk"] or model["continuing_subword_prefix"])
        and not (model["end_of_word_suffix"] or model["ignore_merges"])
    )
