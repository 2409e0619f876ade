"""Rows by position: every token once, and the same samples however a step is split."""

from typing import Any

import numpy as np
import pytest
import torch

from arguments import DataArguments
from llm_training.data import DataError, PreparedData
from llm_training.data.ledger import Ledger
from llm_training.data.rows.store_rows import IGNORE_INDEX, PackedRows, StreamRows
from llm_training.data.rows.windows import (
    TrainingWindows,
    evaluation_batches,
    validation_set_rows,
)
from llm_training.data.tokens.token_store import TokenArray

TOKENS = np.arange(100, 147, dtype=np.uint16)  # 11 rows of 4, 3 tokens left over


def make_windows(rank: int, num_ranks: int, micro: int, count: int, **changes: int) -> list:
    settings = {"seed": 3, "num_samples": 1000} | changes
    rows = StreamRows(TokenArray(TOKENS), 4)
    return [
        TrainingWindows(
            rows=rows, micro_batch_size=micro, num_micro_batches=count, rank=rank,
            num_ranks=num_ranks, **settings,
        ).window(position)
        for position in (0, 8, 16)
    ]  # fmt: skip


def samples(windows: list) -> list[list[list[int]]]:
    """The rows of each window."""
    return [[row for batch in w for row in batch["input_ids"].tolist()] for w in windows]


@pytest.mark.parametrize(
    ("num_ranks", "micro", "count"), [(1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 1, 2)]
)
def test_a_step_holds_the_same_samples_however_it_is_split(
    num_ranks: int, micro: int, count: int
) -> None:
    whole = samples(make_windows(0, 1, 8, 1))
    parts = [samples(make_windows(rank, num_ranks, micro, count)) for rank in range(num_ranks)]
    for of_whole, *of_parts in zip(whole, *parts, strict=True):
        assert sorted(row for rows in of_parts for row in rows) == sorted(of_whole)


@pytest.mark.parametrize(("num_ranks", "micro", "count"), [(1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_every_rank_knows_the_samples_of_the_whole_step(
    num_ranks: int, micro: int, count: int
) -> None:
    rows = StreamRows(TokenArray(TOKENS), 4)
    for rank in range(num_ranks):
        windows = TrainingWindows(rows, 3, 12, micro, count, rank, num_ranks)
        ids = windows.sample_ids(8)
        assert ids.tolist() == rows.at(np.arange(8, 12), 3).tolist()  # and none beyond the run


def test_windows_run_on_over_the_end_of_an_epoch() -> None:
    rows = [row for step in make_windows(0, 1, 8, 1) for batch in step for row in batch["labels"]]
    first_epoch = {tuple(row.tolist()) for row in rows[:11]}
    assert len(first_epoch) == 11  # every row once
    assert {tuple(row.tolist()) for row in rows[11:22]} == first_epoch


def test_positions_beyond_the_run_are_empty_rows() -> None:
    windows = make_windows(0, 1, 8, 1, num_samples=10)
    masked = (windows[1][0]["labels"] == IGNORE_INDEX).all(dim=1)
    assert masked.tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (1, 5), (2, 3), (3, 4), (4, 16)])
def test_evaluation_sees_every_row_once_on_equally_many_batches(
    num_ranks: int, batch_size: int
) -> None:
    rows = StreamRows(TokenArray(TOKENS), 4, keep_last=True)
    ranks = [
        list(evaluation_batches(rows, batch_size, rank=r, num_ranks=num_ranks, max_rows=None))
        for r in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch["labels"] for batches in ranks for batch in batches])
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == TOKENS.tolist()


def test_a_limited_evaluation_is_spread_and_the_same_however_it_is_split() -> None:
    rows = StreamRows(TokenArray(TOKENS), 4, keep_last=True)

    def seen(num_ranks: int, batch_size: int = 2) -> list[int]:
        ranks = [
            evaluation_batches(rows, batch_size, rank=r, num_ranks=num_ranks, max_rows=4)
            for r in range(num_ranks)
        ]
        labels = torch.cat([batch["labels"] for batches in ranks for batch in batches])
        return sorted(labels[labels[:, 0] != IGNORE_INDEX][:, 0].tolist())

    assert seen(1) == [100, 112, 124, 136]  # rows 0, 3, 6, 9 of 12
    assert seen(1) == seen(2) == seen(3) == seen(1, 3) == seen(2, 16)


# ------------------------------------------------------------------------------- validation sets


class Store(TokenArray):
    """Six documents of ten tokens; in conversations, the last five of each are learned."""

    has_learned: bool

    @classmethod
    def of(cls, *, is_conversation: bool) -> Any:
        ends = np.arange(10, 61, 10, dtype=np.uint64)
        learned = np.tile([0] * 5 + [1] * 5, 6).astype(np.uint8) if is_conversation else None
        store = cls(np.arange(60, dtype=np.uint16), ends, learned)
        object.__setattr__(store, "has_learned", is_conversation)
        return store


def data_of(train: Any, **sets: Any) -> PreparedData:
    def prepared(train: Any, validation: Any, parts: Any = None) -> PreparedData:
        return PreparedData(train, validation, None, 60, "", Ledger(), validation_sets=parts or {})

    return prepared(train, None, {name: prepared(None, store) for name, store in sets.items()})


@pytest.mark.parametrize("is_conversation", [False, True])
def test_sets_are_masked_as_training_is_and_keep_their_own_packing(is_conversation: bool) -> None:
    text, chat = Store.of(is_conversation=False), Store.of(is_conversation=True)
    data = data_of(chat if is_conversation else text, text=text, chat=chat)
    rows = validation_set_rows(data, DataArguments(), 20)
    assert (type(rows["text"]), type(rows["chat"])) == (StreamRows, PackedRows)
    assert [own.document_mask for own in rows.values()] == [is_conversation] * 2
    assert [own.num_rows for own in rows.values()] == [3, 3]
    unmasked = validation_set_rows(data, DataArguments(document_mask=False), 20)
    assert not any(own.document_mask for own in unmasked.values())


def test_beside_a_stream_the_columns_tell_what_is_masked() -> None:
    data = data_of(None, text=Store.of(is_conversation=False))
    for column in (None, "messages"):
        arguments = DataArguments(streaming=True, messages_column=column)
        (rows,) = validation_set_rows(data, arguments, 20).values()
        assert rows.document_mask is (column is not None)


def test_a_set_without_a_row_is_named() -> None:
    data = data_of(None, math=Store.of(is_conversation=False))
    with pytest.raises(DataError, match=r"^validation_sets, math: .* less than one row of 64"):
        validation_set_rows(data, DataArguments(), 64)
