"""How much of the validation data was trained on: whole documents, and runs of 13 tokens.

Source: the 13-gram overlap of Brown et al. 2020, "Language Models are Few-Shot Learners",
    appendix C, counted in tokens in place of words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llm_training.data.tokens.token_store import Tokens

NGRAM = 13
EXAMPLES_KEPT = 5
# More validation tokens than that are not looked at: their hashes are held in memory.
MOST_VALIDATION_TOKENS = 2**24
_CHUNK_TOKENS = 2**20
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 2**64)


@dataclass
class Leakage:
    """What training and validation data share. Places are counted in tokens, each from 0.

    Attributes:
        documents: validation documents looked at.
        tokens: their tokens.
        same_documents: of these, how many occur in training, word for word.
        overlapping_documents: how many hold a run of 13 tokens that occurs in training.
        overlapping_tokens: tokens that stand in such runs.
        is_complete: whether all of the validation data was looked at.
        examples: the first few overlaps: their place in the validation and the training data.
    """

    documents: int = 0
    tokens: int = 0
    same_documents: int = 0
    overlapping_documents: int = 0
    overlapping_tokens: int = 0
    is_complete: bool = True
    examples: list[dict[str, int]] = field(default_factory=list)

    def line(self) -> str:
        """The report for a person."""
        share = self.overlapping_tokens / max(1, self.tokens)
        first = f" (first at token {self.examples[0]['validation']:,})" if self.examples else ""
        limit = "" if self.is_complete else f" (only the first {self.tokens:,} tokens looked at)"
        return (
            f"Leakage: of {self.documents:,} validation documents, {self.same_documents:,} are also"
            f" in training, {self.overlapping_documents:,} share {NGRAM} tokens in a row with it:"
            f" {share:.2%} of the validation tokens{first}{limit}"
        )


def find_leakage(
    train: Sequence[Tokens], validation: Sequence[Tokens], on_tokens: Callable[[int], None]
) -> Leakage:
    """Looks for validation text in the training data.

    Memory: about 40 bytes for each validation token looked at, and a fixed amount beside that.

    Args:
        train, validation: token streams; places are counted over all of them, end to end.
        on_tokens: called with each number of training tokens gone through.
    """
    report = Leakage()
    known = _Validation(validation, report)
    if report.tokens == 0:
        return report
    first_token = 0
    for store in train:
        for start, hashes, chunk_ends in _hashed_chunks(store):
            known.mark(hashes, first_token + start)
            on_tokens(chunk_ends)
        known.mark_documents(store)
        first_token += store.num_tokens
    known.count(report)
    return report


class _Validation:
    """The runs and documents of the validation data, and which of them were met."""

    def __init__(self, stores: Sequence[Tokens], report: Leakage):
        places, hashes, borders = [], [], [0]
        self._documents: dict[bytes, list[int]] = {}
        first_token = 0
        for store in stores:
            room = MOST_VALIDATION_TOKENS - first_token
            for start, of_chunk, size in _hashed_chunks(store):
                if start >= room:
                    report.is_complete = False
                    break
                where = np.flatnonzero(of_chunk)
                places.append(where + first_token + start)
                hashes.append(of_chunk[where])
                report.tokens += size
            for begin, end in _documents(store):
                if begin < room:
                    digest = _digest(store, begin, end)
                    self._documents.setdefault(digest, []).append(len(borders) - 1)
                    borders.append(first_token + end)
            first_token += store.num_tokens
        self._borders = np.array(borders)
        report.documents = len(borders) - 1
        every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self._hashes = every[order]
        self._places = np.concatenate(places)[order] if places else np.zeros(0, np.int64)
        self._met = np.full(len(every), -1, np.int64)  # where in training it was met first
        self._met_documents: set[bytes] = set()
        # Most training runs are told apart from all of ours by some bits of their hash.
        bits = min(27, max(10, len(every).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def mark(self, hashes: NDArray[np.uint64], first_place: int) -> None:
        """Notes which validation runs are among these of the training data."""
        candidates = np.flatnonzero(self._filter[hashes >> self._shift])
        wanted = hashes[candidates]
        left = np.searchsorted(self._hashes, wanted, "left")
        is_ours = left < len(self._hashes)
        is_ours[is_ours] = self._hashes[left[is_ours]] == wanted[is_ours]
        left, places = left[is_ours], candidates[is_ours] + first_place
        is_new = self._met[left] < 0
        # Of several, the first counts: numpy keeps the last it writes.
        self._met[left[is_new][::-1]] = places[is_new][::-1]

    def mark_documents(self, store: Tokens) -> None:
        """Notes which validation documents are among those of a training store."""
        for begin, end in _documents(store):
            digest = _digest(store, begin, end)
            if digest in self._documents:
                self._met_documents.add(digest)

    def count(self, report: Leakage) -> None:
        """Sums up what was met."""
        report.same_documents = sum(len(self._documents[d]) for d in self._met_documents)
        # Equal runs lie side by side; the first of them was marked for all.
        first = np.searchsorted(self._hashes, self._hashes, "left")
        met = self._met[first]
        order = np.argsort(self._places)
        places, met = self._places[order], met[order]
        places, met = places[met >= 0], met[met >= 0]
        if len(places) == 0:
            return
        gaps = np.diff(places, append=places[-1] + NGRAM)
        report.overlapping_tokens = int(np.minimum(gaps, NGRAM).sum())
        of_document = np.searchsorted(self._borders, places, "right") - 1
        documents, firsts = np.unique(of_document, return_index=True)
        report.overlapping_documents = len(documents)
        report.examples = [
            {"validation": int(places[i]), "train": int(met[i])} for i in firsts[:EXAMPLES_KEPT]
        ]


def _hashed_chunks(store: Tokens) -> Iterator[tuple[int, NDArray[np.uint64], int]]:
    """(start, hashes, tokens) of each chunk of a store.

    The hash at i is that of the run that begins at token start + i; it is 0 where the run would
    reach into another document, or to the end-of-text token.
    """
    ends = store.ends
    powers = _powers(_MULTIPLIER, _CHUNK_TOKENS + NGRAM)
    inverse = _powers(_INVERSE, _CHUNK_TOKENS)
    for start in range(0, store.num_tokens, _CHUNK_TOKENS):
        size = min(_CHUNK_TOKENS, store.num_tokens - start)
        tokens = np.asarray(store.tokens[start : start + size + NGRAM]).astype(np.uint64)
        # The sum over a run, brought to the same power wherever it begins; all modulo 2**64.
        sums = np.concatenate(
            (np.zeros(1, np.uint64), np.cumsum(_mix(tokens) * powers[: len(tokens)]))
        )
        num_runs = max(0, len(tokens) - NGRAM + 1)
        hashes = np.zeros(size, np.uint64)
        count = min(size, num_runs)
        hashes[:count] = (sums[NGRAM : NGRAM + count] - sums[:count]) * inverse[:count]
        hashes[:count] |= np.uint64(1)  # 0 is none
        if ends is not None:
            _blank_borders(hashes, ends, start)
        yield start, hashes, size


def _blank_borders(hashes: NDArray[np.uint64], ends: NDArray[np.uint64], start: int) -> None:
    """Sets to 0 where a run of the chunk would reach to the last token of a document."""
    first, last = np.searchsorted(ends, [start + 1, start + len(hashes) + NGRAM], "left")
    near = ends[first:last].astype(np.int64) - start
    for offset in range(1, NGRAM + 1):
        places = near - offset
        hashes[places[(places >= 0) & (places < len(hashes))]] = 0


def _documents(store: Tokens) -> Iterator[tuple[int, int]]:
    if store.ends is not None:
        yield from pairwise([0, *store.ends.tolist()])


def _digest(store: Tokens, begin: int, end: int) -> bytes:
    # As uint32: the two stores may be of different types.
    content = np.asarray(store.tokens[begin:end]).astype(np.uint32).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads small numbers over 64 bits (the finalizer of SplitMix64)."""
    values = (values + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """1, base, base ** 2, ... modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
