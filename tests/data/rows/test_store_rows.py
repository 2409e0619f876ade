"""Proves what a row is: which tokens, which are predicted, and that the account is of these."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llm_training.data.rows.store_rows import (
    IGNORE_INDEX,
    NO_ROW,
    PackedRows,
    Rows,
    StreamRows,
    sum_runs,
)
from llm_training.data.tokens.token_store import TokenArray
from llm_training.losses import count_predicted_tokens

TOKENS = np.arange(100, 147, dtype=np.uint16)  # 11 rows of 4, 3 tokens left over
# Documents of 3, 11, 1, 4, 9, 2 and 17 tokens.
ENDS = np.array([3, 14, 15, 19, 28, 30, 47], np.uint64)


def make_rows(kind: str, store: TokenArray, block_size: int, *, mask: bool) -> Rows:
    if kind == "best_fit":
        return PackedRows(store, block_size, document_mask=mask)
    return StreamRows(store, block_size, keep_last=kind == "all", document_mask=mask)


def learned_parts(seed: int) -> NDArray[np.uint8]:
    return (np.random.default_rng(seed).random(len(TOKENS)) < 0.3).astype(np.uint8)


def test_leftover_tokens_are_counted_and_their_labels_masked_where_kept() -> None:
    dropped = StreamRows(TokenArray(TOKENS), 4)
    assert (dropped.num_rows, dropped.num_leftover_tokens) == (11, 3)
    kept = StreamRows(TokenArray(TOKENS), 4, keep_last=True)
    assert (kept.num_rows, kept.num_leftover_tokens) == (12, 0)
    last = kept.batch(np.array([11]))
    assert last["labels"].tolist() == [[144, 145, 146, IGNORE_INDEX]]
    assert last["input_ids"].tolist() == [[144, 145, 146, 0]]


def test_a_single_token_makes_no_row() -> None:
    rows = StreamRows(TokenArray(TOKENS[:5]), 4, keep_last=True)
    assert (rows.num_rows, rows.num_leftover_tokens) == (1, 1)


def test_batches_are_int64_of_the_right_shape() -> None:
    batch = StreamRows(TokenArray(TOKENS), 4).batch(np.array([0, 2, 10]))
    assert batch["input_ids"].shape == (3, 4)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert "position_ids" not in batch


def test_under_a_document_mask_positions_begin_anew_and_first_tokens_are_not_predicted() -> None:
    rows = StreamRows(TokenArray(TOKENS, ENDS), 8, keep_last=True, document_mask=True)
    batch = rows.batch(np.array([1, 5, NO_ROW]))
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 0],
        [0, 1, 2, 3, 4, 5, 6, 0],  # the last row is one token short
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, 109, 110, 111, 112, 113, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, 141, 142, 143, 144, 145, 146, IGNORE_INDEX],
        [IGNORE_INDEX] * 8,
    ]
    assert batch["input_ids"][0].tolist() == TOKENS[8:16].tolist()


def test_best_fit_keeps_documents_whole_and_goes_on_with_long_ones() -> None:
    rows = PackedRows(TokenArray(TOKENS, ENDS), 12, document_mask=True)
    seen = sorted(run for row in range(rows.num_rows) for run in rows.runs(row))
    assert seen == [(0, 3), (3, 11), (14, 1), (15, 4), (19, 9), (28, 2), (30, 12), (42, 5)]
    assert rows.num_rows == 4


def test_of_conversations_the_beginning_is_taken_and_none_without_a_learned_token() -> None:
    learned = np.zeros(len(TOKENS), np.uint8)
    # Not the first token of a document, and none beyond the eighth.
    learned[[0, 5, 13, 16, 19, 40]] = 1
    rows = PackedRows(TokenArray(TOKENS, ENDS, learned), 8, document_mask=True)
    seen = sorted(run for row in range(rows.num_rows) for run in rows.runs(row))
    assert seen == [(3, 8), (15, 4)]
    (account,) = rows.accounts().values()
    assert (account.truncated, account.dropped, account.predicted) == (13, 22, 2)
    # Those of 11, 9 and 17 tokens are cut; of them the tokens 13 and 40 would be learned.
    assert (account.cut_conversations, account.learned_lost) == (3, 2)
    assert account.dropped_conversations == 5
    assert account.line().endswith(
        "; 3 conversations are cut at the end of a row, 2 tokens to be learned are lost by it"
        "; 5 conversations are left out, with nothing to be learned within a row"
    )


@pytest.mark.parametrize("mask", [False, True])
def test_rows_of_a_stream_without_a_learned_token_are_dropped(mask: bool) -> None:
    learned = np.zeros(len(TOKENS), np.uint8)
    learned[[4, 9, 30, 38]] = 1  # 4 begins a row, 30 a document
    rows = StreamRows(TokenArray(TOKENS, ENDS, learned), 4, keep_last=True, document_mask=mask)
    firsts = [rows.runs(row)[0][0] for row in range(rows.num_rows)]
    assert firsts == ([8, 36] if mask else [8, 28, 36])
    batch = rows.batch(np.arange(rows.num_rows))
    assert [int((row != IGNORE_INDEX).sum()) for row in batch["labels"][:, 1:]] == [1] * len(firsts)
    (account,) = rows.accounts().values()
    assert (account.dropped, account.padding) == (47 - 4 * len(firsts), 0)
    assert account.cut_conversations == 4
    assert rows.marks == ["document_mask"] * mask + ["learned"]
    # Where none is dropped, rows are what they were before some could be.
    assert "learned" not in StreamRows(TokenArray(TOKENS, ENDS, learned + 1), 4).marks


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("block_size", [2, 4, 7, 8, 47, 60])
@pytest.mark.parametrize("kind", ["stream", "all", "best_fit"])
def test_the_account_is_of_what_the_rows_hold(
    kind: str, block_size: int, chat: bool, mask: bool
) -> None:
    learned = learned_parts(block_size) if chat else None
    rows = make_rows(kind, TokenArray(TOKENS, ENDS, learned), block_size, mask=mask)
    batch = rows.batch(np.arange(rows.num_rows))
    (account,) = rows.accounts().values()
    assert account.rows == rows.num_rows
    assert account.predicted == int(count_predicted_tokens(batch["labels"]))
    assert account.predicted + sum(account.lost.values()) == account.tokens == len(TOKENS)
    assert account.padding == int((batch["input_ids"] == 0).sum())
    assert f"{account.predicted:,} predicted" in account.line()


@pytest.mark.parametrize("kind", ["stream", "all", "best_fit"])
def test_the_mask_leaves_the_input_as_it_is(kind: str) -> None:
    store = TokenArray(TOKENS, ENDS)
    plain, masked = (make_rows(kind, store, 8, mask=mask) for mask in (False, True))
    every = np.arange(plain.num_rows)
    assert torch.equal(plain.batch(every)["input_ids"], masked.batch(every)["input_ids"])
    assert plain.marks != masked.marks


def test_runs_are_summed_wherever_they_lie() -> None:
    values = np.arange(10, dtype=np.uint8)
    starts = np.array([7, 0, 3, 10, 3])
    lengths = np.array([3, 2, 4, 0, 0])
    assert sum_runs(values, starts, lengths).tolist() == [24, 1, 18, 0, 0]
    assert sum_runs(values, starts[:0], lengths[:0]).tolist() == []


def test_overlapping_ends_are_those_of_the_store() -> None:
    """A document mask cuts a stream exactly at the ends of documents."""
    rows = StreamRows(TokenArray(TOKENS, ENDS), 47, document_mask=True)
    assert rows.runs(0) == [(a, b - a) for a, b in pairwise([0, *ENDS.tolist()])]
