"""Proves that a stream gives every token once, the same rows on any split, and resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from llm_training.data.documents.formats import PlainText, Rendered
from llm_training.data.documents.stream_documents import (
    BAD_DOCUMENT,
    DocumentStream,
    StreamPlace,
    open_stream,
)
from llm_training.data.errors import DataError
from llm_training.data.rows import streaming
from llm_training.data.rows.store_rows import IGNORE_INDEX, NO_ROW, Batch
from llm_training.data.rows.stream_blocks import Block, BlockReader
from llm_training.data.rows.streaming import StreamWindows, stream_validation
from llm_training.data.rows.windows import RowSettings
from llm_training.data.tokens import encoding
from llm_training.data.tokens.tokenizers import train_tokenizer

KINDS = ["jsonl", "parquet"]
NUM_SHARDS, DOCUMENTS_IN_SHARD = 3, 30
PLAIN = RowSettings(block_size=32)
SETTINGS = {
    "stream": PLAIN,
    "document_mask": RowSettings(32, document_mask=True),
    "best_fit": RowSettings(32, "best_fit", document_mask=True),
}
ROWS_IN_BLOCK = 20


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder takes some documents ahead, not all of these small data sets many times."""
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(encoding, "_PIECE_CHARACTERS", 100)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("byte", (), 257)


def write_shards(folder: Path, kind: str, shards: list[list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True)
    for i, rows in enumerate(shards):
        path = folder / f"train-{i}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:  # several row groups
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=8)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """About 90 documents of up to 120 bytes in 3 shards: some 170 rows of 32 tokens."""
    chance = random.Random(5)
    shards = [
        [
            {"text": f"{s}/{i} " + "".join(chance.choices("abcdef \n", k=chance.randrange(120)))}
            for i in range(DOCUMENTS_IN_SHARD)
        ]
        for s in range(NUM_SHARDS)
    ]
    top = tmp_path_factory.mktemp("streams")
    return {kind: write_shards(top / kind, kind, shards) for kind in KINDS}


class Answers:
    """Rows as conversations: the first four characters are read, the rest is learned."""

    columns = ("text",)

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        text = row["text"] + "<|endoftext|>"
        return Rendered(text, ((4, len(text)),))

    def key(self) -> Any:
        return "answers"


def open_text(folder: Path, **options: Any) -> DocumentStream:
    return open_stream(str(folder), None, PlainText("text"), **options)


def make_reader(
    stream: DocumentStream, tokenizer: PreTrainedTokenizerBase, **changes: Any
) -> BlockReader:
    settings = changes.pop("settings", PLAIN)
    options = {"rows_in_block": ROWS_IN_BLOCK, "seed": 7} | changes
    return BlockReader(stream, tokenizer, settings, **options)


def make_windows(reader: BlockReader | None, **changes: Any) -> StreamWindows:
    options: dict[str, Any] = {
        "position": 0,
        "num_samples": 10_000,
        "micro_batch_size": 8,
        "num_micro_batches": 1,
        "rank": 0,
        "num_ranks": 1,
    }
    return StreamWindows(reader, **(options | changes))


def in_order(block: Block) -> list[list[int]]:
    """The tokens of the runs of a block, in the order of the stream."""
    tokens = block.rows.batch(np.arange(block.rows.num_rows))["input_ids"]
    return tokens.tolist()


def texts_of_epoch(folder: Path, epoch: int) -> list[str]:
    dataset = datasets.load_dataset(str(folder), split="train", streaming=True)
    dataset.set_epoch(epoch)
    return [row["text"] for row in dataset]


# ------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("kind", KINDS)
def test_documents_go_on_from_every_border(folders: dict[str, Path], kind: str) -> None:
    per_epoch = NUM_SHARDS * DOCUMENTS_IN_SHARD
    stream = open_text(folders[kind])
    documents = list(itertools.islice(stream.documents(stream.begin()), 2 * per_epoch + 9))
    texts = [streamed.document.text for streamed in documents]
    assert sorted(texts[:per_epoch]) == sorted(texts[per_epoch : 2 * per_epoch])
    assert documents[per_epoch].document.where.endswith("[train], row 1 of epoch 2")
    borders = {1, 29, 30, 31, 59, 60, 88, 89, 90, 91, 119, 120, 121, 179, 180, *range(3, 190, 8)}
    for border in sorted(borders):
        place = documents[border - 1].after
        for hop in (0, 9, 18):  # a resumed run is itself resumed
            values = json.loads(json.dumps(dataclasses.asdict(place)))
            rest = open_text(folders[kind]).documents(StreamPlace.from_dict(values))
            found = list(itertools.islice(rest, 9))
            place = found[-1].after
            expected = texts[border + hop : border + hop + 9]
            assert [streamed.document.text for streamed in found][: len(expected)] == expected


def test_rows_without_a_document_are_left_out_or_refused(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("a", None, "b", "", "c", None)]
    folder = write_shards(tmp_path / "data", "parquet", [rows])
    stream = open_text(folder, skip_bad_documents=True)
    documents = list(itertools.islice(stream.documents(stream.begin()), 6))
    assert [streamed.document.text for streamed in documents] == list("abcabc")
    counts = {
        reason: (entry.count, entry.names) for reason, entry in documents[3].after.left_out.items()
    }
    name = f"{folder} [train]"
    assert counts == {
        BAD_DOCUMENT: (2, [f"{name}, row 2", f"{name}, row 6"]),
        "empty documents": (1, [f"{name}, row 4"]),
    }
    tokenizer = train_tokenizer("byte", (), 257)
    windows = make_windows(make_reader(stream, tokenizer), micro_batch_size=ROWS_IN_BLOCK)
    windows.window(0)
    windows.window(ROWS_IN_BLOCK)
    lines = windows.account_lines()
    assert lines[0].startswith("stream: 640 documents, 1,280 tokens = 1,240 predicted + 40 first")
    assert lines[2].startswith(f"left out: 426 {BAD_DOCUMENT} ({name}, row 2, {name}, row 6, ")
    windows.close()
    # Gone on with from its middle, the count does not begin anew, nor is anything counted twice.
    again = list(itertools.islice(stream.documents(documents[1].after), 4))
    assert again[-1].after == documents[5].after
    strict = open_text(folder)
    with pytest.raises(DataError, match=r"\[train\], row 2: 'text' holds nothing"):
        list(itertools.islice(strict.documents(strict.begin()), 3))


def test_faults_are_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    empty = write_shards(tmp_path / "empty", "parquet", [[{"text": ""}] * 5])
    stream = open_text(empty)
    with pytest.raises(DataError, match="has no document: of 5 rows"):
        next(stream.documents(stream.begin()))
    with pytest.raises(DataError, match="no split 'test'; it has 'train'"):
        open_text(folders["jsonl"], split="test")
    with pytest.raises(DataError, match="has no 'body'; it has 'text'"):
        open_stream(str(folders["jsonl"]), None, PlainText("body"))
    with pytest.raises(DataError, match=r"cannot be opened for streaming.*reachable hub"):
        open_text(tmp_path / "nowhere")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="leave out streaming"):
        open_text(tmp_path / "saved")


def test_a_shard_that_cannot_be_read_is_an_error_with_its_row(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", "jsonl", [[{"text": "a"}] * 3] * 2)
    (folder / "train-1.jsonl").write_text('{"text": "a"}\n{"text": \n')
    stream = open_text(folder)
    with pytest.raises(DataError, match=r"\[train\] cannot be read on after row 3: .*last check"):
        list(itertools.islice(stream.documents(stream.begin()), 9))


# ---------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_hold_every_token_once(
    folders: dict[str, Path], kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = texts_of_epoch(folders[kind], 0) + texts_of_epoch(folders[kind], 1)
    whole = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    reader = make_reader(open_text(folders[kind]), tokenizer)
    found: list[int] = []
    while len(found) < len(whole):
        block = reader.read()
        found += [token for row in in_order(block) for token in row]
        carried = reader.start.carried.tokens.tolist()
        assert reader.start.account.tokens == len(found)
        assert (found + carried)[: len(whole)] == whole[: len(found) + len(carried)]
    order = block.rows_at(np.arange(block.start.position, block.end.position))
    assert sorted(order.tolist()) == list(range(block.rows.num_rows))
    assert order.tolist() != sorted(order.tolist())


def test_best_fit_packs_every_document_whole(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = RowSettings(160, "best_fit", document_mask=True)
    reader = make_reader(open_text(folders["jsonl"]), tokenizer, settings=settings, rows_in_block=5)
    found: list[str] = []
    while reader.start.documents < 180:
        rows = reader.read().rows
        batch = rows.batch(np.arange(rows.num_rows))
        for tokens, is_start in zip(batch["input_ids"], batch["position_ids"] == 0, strict=True):
            borders = [*is_start.nonzero().flatten().tolist(), settings.block_size]
            pieces = [tokens[a:b].tolist() for a, b in itertools.pairwise(borders)]
            # What fills up a row has no end-of-text.
            found += [tokenizer.decode(p[:-1]) for p in pieces if p[-1] == tokenizer.eos_token_id]
    texts = [text for epoch in range(3) for text in texts_of_epoch(folders["jsonl"], epoch)]
    assert sorted(found) == sorted(texts[: reader.start.documents])
    account = reader.start.account
    assert account.truncated == account.dropped == account.leftover == 0
    assert account.tokens == sum(len(text) + 1 for text in found)


def test_conversations_bring_their_end_of_text_and_their_labels(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    stream = open_stream(str(folders["jsonl"]), None, Answers())
    batch = make_reader(stream, tokenizer).read().rows.batch(np.arange(ROWS_IN_BLOCK))
    texts = texts_of_epoch(folders["jsonl"], 0)
    tokens = [
        (token, is_learned)
        for text in texts
        for token, is_learned in zip(
            [*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
            [False] * 4 + [True] * (len(text) - 3),
            strict=True,
        )
    ][: ROWS_IN_BLOCK * 32]
    assert batch["input_ids"].flatten().tolist() == [token for token, _ in tokens]
    expected = [token if is_learned else IGNORE_INDEX for token, is_learned in tokens]
    assert batch["labels"].flatten().tolist() == expected


def test_every_row_of_a_stream_of_conversations_has_something_to_learn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class LastWords(Answers):
        def render(self, row: Mapping[str, Any], where: str) -> Rendered:
            text = row["text"] + "<|endoftext|>"
            return Rendered(text, ((len(text) - len("<|endoftext|>"), len(text)),))

    texts = [f"{i} " + "a" * (i * 37 % 150) for i in range(60)]
    folder = write_shards(tmp_path / "data", "jsonl", [[{"text": text} for text in texts]])
    stream = open_stream(str(folder), None, LastWords())
    reader = make_reader(stream, tokenizer, rows_in_block=6)
    ends = 0
    while reader.start.place.epoch == 0:
        rows = reader.read().rows
        labels = rows.batch(np.arange(rows.num_rows))["labels"][:, 1:] != IGNORE_INDEX
        assert labels.any(dim=1).all()
        ends += int(labels.sum())
    account = reader.start.account
    assert account.predicted == ends
    assert account.dropped > 0
    assert account.predicted + sum(account.lost.values()) == account.tokens
    # What fills no row is carried over, once.
    assert account.leftover == 0
    assert account.tokens == account.rows * 32 + account.dropped


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_data_without_a_row_is_refused(
    packing: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Unlearned(Answers):
        def render(self, row: Mapping[str, Any], where: str) -> Rendered:
            return Rendered(row["text"], ())

    folder = write_shards(tmp_path / "data", "jsonl", [[{"text": "abcdefgh"}] * 100])
    stream = open_stream(str(folder), None, Unlearned())
    reader = make_reader(stream, tokenizer, settings=SETTINGS[packing])
    with pytest.raises(DataError, match="not one row in a whole epoch"):
        reader.read()


def test_a_state_of_other_settings_is_refused(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = make_reader(open_text(folders["jsonl"]), tokenizer)
    state = json.loads(json.dumps(reader.state(reader.start)))
    make_reader(open_text(folders["jsonl"]), tokenizer, state=state)
    with pytest.raises(DataError, match="of shuffle_buffer_size 20, but this run has 21"):
        make_reader(open_text(folders["jsonl"]), tokenizer, state=state, rows_in_block=21)
    with pytest.raises(DataError, match="is of stream"):
        make_reader(open_text(folders["parquet"]), tokenizer, state=state)


# --------------------------------------------------------------------------------------- windows


def rows_of(window: list[Batch]) -> list[tuple[Any, ...]]:
    whole = {name: torch.cat([batch[name] for batch in window]) for name in window[0]}
    return list(zip(*(whole[name].tolist() for name in sorted(whole)), strict=True))


@pytest.mark.parametrize(
    ("num_ranks", "micro", "count"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 1, 2)]
)
def test_a_step_holds_the_same_rows_however_it_is_split(
    num_ranks: int,
    micro: int,
    count: int,
    folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = make_windows(make_reader(open_text(folders["jsonl"]), tokenizer), num_samples=260)
    shared: list[Batch] = []

    def share(batch: Batch | None) -> Batch:
        if batch is not None:
            shared.append(batch)
        return shared[-1]

    ranks = [
        make_windows(
            make_reader(open_text(folders["jsonl"]), tokenizer) if rank == 0 else None,
            num_samples=260,
            micro_batch_size=micro,
            num_micro_batches=count,
            rank=rank,
            num_ranks=num_ranks,
            share=share,
        )
        for rank in range(num_ranks)
    ]
    for position in range(0, 260, 8):
        expected = rows_of(whole.window(position))
        windows = [windows.window(position) for windows in ranks]
        # Micro-batch g of every rank, then g + 1: the order of positions.
        found = [row for g in range(count) for window in windows for row in rows_of([window[g]])]
        assert found == expected
        for windows_of_rank in ranks:
            ids = windows_of_rank.sample_ids(position)
            assert ids.dtype == np.int64
            assert ids.tolist() == whole.sample_ids(position).tolist()
            assert len(ids) == min(8, 260 - position)
    is_empty = [set(labels) == {IGNORE_INDEX} for _, labels in expected]
    assert is_empty == [False] * 4 + [True] * 4  # the run ends within its last step
    assert ranks[0].state(260) is not None
    assert all(rank.state(260) is None for rank in ranks[1:])
    for windows_of_rank in (whole, *ranks):
        windows_of_rank.close()


def without_the_librarys(state: dict[str, Any] | None) -> dict[str, Any]:
    """A state but for the library's part, which has several forms of one place in the data."""
    copy: dict[str, Any] = json.loads(json.dumps(state))
    del copy["start"]["place"]["dataset_state"]
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", SETTINGS)
def test_resuming_twice_is_the_same_run(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, kind: str, packing: str
) -> None:
    def start(position: int, state: Any) -> StreamWindows:
        reader = make_reader(
            open_text(folders[kind]), tokenizer, settings=SETTINGS[packing], state=state
        )
        return make_windows(reader, position=position)

    num_steps = 60  # of 8 rows: more than two epochs
    whole = start(0, None)
    expected, states = [], []
    for step in range(num_steps):
        expected.append(rows_of(whole.window(step * 8)))
        states.append(without_the_librarys(whole.state(step * 8 + 8)))
    assert states[-1]["start"]["place"]["epoch"] >= 2
    chance = random.Random(packing)
    cuts = [(3, 7)] + [tuple(sorted(chance.sample(range(1, 58), 2))) for _ in range(4)]
    for first, second in cuts:
        found, state = [], None
        for begin, stop in [(0, first), (first, second), (second, second + 9)]:
            windows = start(begin * 8, state)
            for step in range(begin, min(stop, num_steps)):
                found.append(rows_of(windows.window(step * 8)))
                state = windows.state(step * 8 + 8)
                assert without_the_librarys(state) == states[step]
            state = json.loads(json.dumps(state))
            windows.close()
        assert found == expected[: len(found)]
    whole.close()


def test_resuming_at_and_beside_every_kind_of_border(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    one_row = {"micro_batch_size": 1}
    whole = make_windows(make_reader(open_text(folders["parquet"]), tokenizer), **one_row)
    states, ids, starts, epochs = [], [], set(), []
    for position in range(400):
        states.append(json.dumps(whole.state(position)))
        whole.window(position)
        ids.append(int(whole.sample_ids(position)[0]))
        start = json.loads(states[-1])["start"]
        starts.add(start["position"])
        epochs.append(start["place"]["epoch"])
    whole.close()
    ends_of_epochs = [at for at in range(1, 400) if epochs[at] != epochs[at - 1]]
    assert len(ends_of_epochs) >= 2
    cuts = {at + by for at in (0, *sorted(starts)[1:4], *ends_of_epochs) for by in (-1, 0, 1)}
    for cut in sorted(cut for cut in cuts if 0 <= cut < 370):
        state = json.loads(states[cut])
        reader = make_reader(open_text(folders["parquet"]), tokenizer, state=state)
        # The rows do not depend on the size of the steps either.
        windows = make_windows(reader, position=cut, micro_batch_size=30)
        windows.window(cut)
        assert windows.sample_ids(cut).tolist() == ids[cut : cut + 30]
        windows.close()


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_resuming_among_blocks_that_have_no_row(
    packing: str, folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    class FewAnswers(Answers):
        def render(self, row: Mapping[str, Any], where: str) -> Rendered:
            is_learned = row["text"].startswith("1/1")  # 11 of 90 documents
            return super().render(row, where) if is_learned else Rendered(row["text"], ())

    def start(position: int, state: Any) -> StreamWindows:
        stream = open_stream(str(folders["jsonl"]), None, FewAnswers())
        settings = SETTINGS[packing]
        reader = make_reader(stream, tokenizer, settings=settings, rows_in_block=4, state=state)
        return make_windows(reader, position=position, micro_batch_size=1)

    def ids(windows: StreamWindows, positions: range) -> list[int]:
        found = []
        for position in positions:
            windows.window(position)
            found += windows.sample_ids(position).tolist()
        return found

    whole = start(0, None)
    expected, states = [], []
    for position in range(30):
        states.append(json.loads(json.dumps(whole.state(position))))
        expected += ids(whole, range(position, position + 1))
    whole.close()
    numbers = [state["start"]["number"] for state in states]
    assert max(b - a for a, b in itertools.pairwise(numbers)) > 1  # there are such blocks
    for position in range(25):
        windows = start(position, states[position])
        assert ids(windows, range(position, 30)) == expected[position:]
        windows.close()


def test_no_random_number_is_drawn(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    windows = make_windows(make_reader(open_text(folders["jsonl"]), tokenizer))
    for position in range(0, 240, 8):
        windows.window(position)
    windows.close()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_positions_must_follow_each_other(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    windows = make_windows(make_reader(open_text(folders["jsonl"]), tokenizer))
    windows.window(0)
    with pytest.raises(AssertionError, match="stands at 8, not at 16"):
        windows.window(16)
    windows.close()


class Hooked(PlainText):
    """Calls a function before each row."""

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        type(self).hook(where)
        return super().render(row, where)

    hook: Callable[[str], None]


def hooked_reader(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    hook: Callable[[str], None],
    state: dict[str, Any] | None = None,
) -> BlockReader:
    kind = type("HookedHere", (Hooked,), {"hook": staticmethod(hook)})
    return make_reader(open_stream(str(folder), None, kind("text")), tokenizer, state=state)


def test_an_error_while_reading_ahead_surfaces_in_the_step_that_needs_the_rows(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    def fail(where: str) -> None:
        if where.endswith("row 40"):
            raise DataError(f"{where} is bad")

    windows = make_windows(hooked_reader(folders["jsonl"], tokenizer, fail))
    windows.window(0)
    windows.window(8)
    with pytest.raises(DataError, match="row 40 is bad"):
        for position in range(16, 200, 8):
            windows.window(position)
    windows.close()


def test_waiting_is_told_and_close_does_not_wait_for_ever(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(streaming, "CLOSE_SECONDS", 0.2)
    goes_on = threading.Event()
    lines: list[str] = []

    def hang(where: str) -> None:
        if where.endswith("row 30"):
            time.sleep(0.3)
        if where.endswith("row 60"):
            goes_on.wait(30)

    windows = make_windows(hooked_reader(folders["jsonl"], tokenizer, hang), say=lines.append)
    while not lines:
        windows.window(windows._next)
    assert lines[0].startswith("Waiting for the stream, 0 s so far: ")
    assert "[train], row" in lines[0]
    began = time.monotonic()
    windows.close()
    assert time.monotonic() - began < 5
    with pytest.raises(AssertionError, match="the stream is closed"):
        for _ in range(50):
            windows.window(windows._next)
    goes_on.set()


def test_close_ends_the_thread(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = make_reader(open_text(folders["jsonl"]), tokenizer, rows_in_block=10**7)
    windows = make_windows(reader)
    windows.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]


def test_what_takes_long_after_a_resume_is_told(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    first = make_reader(open_text(folders["jsonl"]), tokenizer)
    first.read()
    told: list[str] = []

    def look(where: str) -> None:
        told.append(reader.doing)

    state = first.state(first.start)
    reader = hooked_reader(folders["jsonl"], tokenizer, look, state=state)
    reader.read()
    row = first.start.place.row
    assert told[0].startswith(
        f"going on after row {row} of {folders['jsonl']} [train]; the library"
    )
    assert told[1] == f"reading {folders['jsonl']} [train], row {row + 1}"


@pytest.mark.parametrize("packing", SETTINGS)
def test_validation_takes_the_first_rows(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, packing: str
) -> None:
    stream = open_text(folders["jsonl"])
    settings = SETTINGS[packing]
    rows = stream_validation(stream, tokenizer, settings, 10)
    text = "\0".join(texts_of_epoch(folders["jsonl"], 0)).encode()
    if packing == "best_fit":
        assert rows.num_rows >= 10
    else:
        assert rows.num_rows == 10
        found = rows.batch(np.arange(10))["input_ids"].flatten().tolist()
        eos = tokenizer.eos_token_id
        assert bytes(0 if token == eos else token for token in found) == text[:320]
    everything = stream_validation(stream, tokenizer, PLAIN, 10_000)
    assert everything.num_rows == -(-(len(text) + 1) // 32)
    assert everything.batch(np.array([NO_ROW]))["labels"].unique().tolist() == [IGNORE_INDEX]
    given: list[Batch] = []

    def share(batch: Batch | None) -> Batch:
        given.extend([batch] if batch is not None else [])
        return given[0]

    mine = stream_validation(stream, tokenizer, settings, 10, share=share)
    others = stream_validation(None, tokenizer, settings, 10, share=share)
    chosen = np.arange(10)
    for name, tensor in mine.batch(chosen).items():
        assert torch.equal(tensor, others.batch(chosen)[name])
