"""Windows read ahead: bit for bit those of the windows within, pinned, one ahead, and no more.

Pinning needs a GPU; in its place stands a copy that knows of it (`tests/gpu/test_ahead.py` pins).
"""

import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from llm_training.data.rows import ahead
from llm_training.data.rows.ahead import (
    PinnedWindows,
    WindowsAhead,
    prepare_for_device,
    to_device,
)
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import PackedRows, Rows, StreamRows
from llm_training.data.rows.streaming import StreamWindows
from llm_training.data.rows.windows import TrainingWindows
from llm_training.data.tokens.token_store import TokenArray

TOKENS = np.arange(100, 247, dtype=np.uint16)
ENDS = np.array([3, 4, 9, 40, 41, 60, 77, 100, 147], np.uint64)
STEP = 12  # 2 ranks x 2 micro-batches x 3 rows
SECONDS = 10.0  # as long as anything may take that takes no time


def make_rows(kind: str) -> Rows:
    store = TokenArray(TOKENS, ENDS)
    if kind == "stream":
        return StreamRows(store, 4, document_mask=True)
    if kind == "packed":
        return PackedRows(store, 16, document_mask=True)
    parts = {"a": StreamRows(store, 4), "b": StreamRows(TokenArray(TOKENS[:50] + 300), 4)}
    return MixtureRows(parts, {"a": 0.62, "b": 0.38})


def make_windows(rows: Rows | None = None, num_samples: int = 1000) -> TrainingWindows:
    return TrainingWindows(
        rows=rows or StreamRows(TokenArray(TOKENS), 4),
        seed=3,
        num_samples=num_samples,
        micro_batch_size=3,
        num_micro_batches=2,
        rank=1,
        num_ranks=2,
    )


@contextmanager
def open_ahead(windows: TrainingWindows) -> Iterator[WindowsAhead]:
    opened = WindowsAhead(windows, device=None)
    try:
        yield opened
    finally:
        opened.close()


class PinnedMemory:
    """The tensors that were pinned and still are in memory."""

    def __init__(self) -> None:
        self._alive: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self._alive[id(copy)] = copy
        return copy

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return self._alive.get(id(tensor)) is tensor

    def __len__(self) -> int:
        return len(self._alive)


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> PinnedMemory:
    memory = PinnedMemory()
    monkeypatch.setattr(ahead, "pin", memory.pin)
    return memory


class WatchedRows(StreamRows):
    """Notes who reads; reading can be held up, and fail."""

    def __init__(self) -> None:
        super().__init__(TokenArray(TOKENS), 4)
        self.readers: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def batch(self, rows: Any) -> Any:
        self.readers.append(threading.current_thread().name)
        if threading.current_thread().name == "windows":
            assert self.gate.wait(SECONDS)
        if self.error is not None:
            raise self.error
        return super().batch(rows)

    def wait_for(self, num_reads: int) -> None:
        """Each window is two reads, one a micro-batch."""
        until = time.monotonic() + SECONDS
        while len(self.readers) < num_reads:
            assert time.monotonic() < until
            time.sleep(0.001)


def assert_equal(got: list, wanted: list) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["stream", "packed", "mixture"])
def test_any_calls_in_any_order_give_what_the_windows_within_give(
    kind: str, pinned: PinnedMemory
) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        plain, position = make_windows(make_rows(kind), 60), 0
        with open_ahead(make_windows(make_rows(kind), 60)) as windows:
            for _ in range(40):
                match draw.choice(["on", "on", "on", "again", "jump", "end", "pause"]):
                    case "on":
                        position += STEP
                    case "jump":
                        position = draw.randrange(200)
                    case "end":  # often within the window that is being read
                        end = position + draw.choice([0, 1, STEP + 1, STEP + 7, 60])
                        plain.run_until(end)
                        windows.run_until(end)
                        position += STEP
                    case "pause":
                        time.sleep(0.0005)
                got = windows.window(position)
                assert_equal(got, plain.window(position))
                assert all(tensor in pinned for batch in got for tensor in batch.values())
                if draw.random() < 0.1:  # between the window and the numbers of its samples
                    plain.run_until(position + 5)
                    windows.run_until(position + 5)
                assert windows.sample_ids(position).tolist() == plain.sample_ids(position).tolist()


def test_what_was_read_before_the_end_of_the_run_moved_is_not_given() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows, num_samples=18)) as windows:
        windows.window(0)
        rows.wait_for(4)  # the window at 12 lies ready, half of its rows empty
        windows.run_until(24)
        assert_equal(windows.window(12), make_windows(num_samples=24).window(12))
        assert (windows.window(12)[1]["labels"] >= 0).all()


def test_the_next_window_is_read_by_the_thread_and_only_once() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows)) as windows:
        for number in range(5):
            windows.window(number * STEP)
            rows.wait_for(2 * (number + 2))
    assert rows.readers == ["MainThread"] * 2 + ["windows"] * 10


def test_the_sample_numbers_come_from_the_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, askers = WatchedRows(), []
    whole_step = TrainingWindows.sample_ids

    def watched(self: TrainingWindows, position: int) -> Any:
        askers.append(threading.current_thread().name)
        return whole_step(self, position)

    monkeypatch.setattr(TrainingWindows, "sample_ids", watched)
    with open_ahead(make_windows(rows, num_samples=5 * STEP)) as windows:
        for number in range(5):
            windows.window(number * STEP)
            windows.sample_ids(number * STEP)
    assert sorted(askers) == ["MainThread"] + ["windows"] * 4  # the first was not read ahead


def test_a_window_that_is_thrown_away_before_it_is_begun_is_never_read() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows, num_samples=144)) as windows:
        rows.gate.clear()
        windows.window(0)
        rows.wait_for(3)  # the window at 12 is being read
        windows.window(60)
        windows.window(120)  # that at 72 has not begun
        rows.gate.set()
        windows.window(132)
    assert rows.readers.count("windows") == 2 * 2  # at 12 and 132


def test_nothing_is_read_beyond_the_end_of_the_run() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows, num_samples=STEP + 1)) as windows:
        windows.window(0)
        windows.window(STEP)
    assert rows.readers == ["MainThread"] * 2 + ["windows"] * 2


def test_one_window_lies_ready_and_no_more(pinned: PinnedMemory) -> None:
    rows = WatchedRows()
    of_a_window = 2 * 2  # micro-batches x tensors
    with open_ahead(make_windows(rows, num_samples=5 * STEP)) as windows:
        for number in range(4):
            given = windows.window(number * STEP)
            rows.wait_for(2 * (number + 2))
            wait_until(lambda: len(pinned) == 2 * of_a_window)  # the one that was given, the next
            time.sleep(0.02)
            assert len(pinned) == 2 * of_a_window
        given = windows.window(4 * STEP)  # the last of the run
        wait_until(lambda: len(pinned) == of_a_window)
        del given
        wait_until(lambda: len(pinned) == 0)


def wait_until(holds: Any) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_an_error_of_the_thread_is_raised_where_its_window_is_asked_for() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows)) as windows:
        windows.window(0)
        rows.wait_for(4)
        rows.error = OSError("the file is gone")
        assert_equal(windows.window(STEP), make_windows().window(STEP))  # was read before
        rows.wait_for(5)
        rows.error = None
        with pytest.raises(OSError, match="the file is gone"):
            windows.window(2 * STEP)
        assert_equal(windows.window(2 * STEP), make_windows().window(2 * STEP))  # tried anew


def test_an_error_of_a_window_that_nobody_wants_is_nobodys() -> None:
    rows = WatchedRows()
    with open_ahead(make_windows(rows)) as windows:
        rows.gate.clear()
        windows.window(0)
        rows.wait_for(3)
        rows.error = OSError("the file is gone")
        rows.gate.set()
        wait_until(lambda: windows._ahead is not None and windows._ahead.result.done())
        rows.error = None
        assert_equal(windows.window(60), make_windows().window(60))


@pytest.mark.parametrize("hangs", [False, True])
def test_close_ends_within_a_second(hangs: bool) -> None:
    rows = WatchedRows()
    windows = WindowsAhead(make_windows(rows), device=None)
    if hangs:
        rows.gate.clear()
    windows.window(0)
    rows.wait_for(3)  # the thread is reading
    began = time.monotonic()
    windows.close()
    assert time.monotonic() - began < 1
    assert windows._thread.daemon  # so one that hangs does not keep the process
    assert windows._thread.is_alive() == hangs
    rows.gate.set()
    windows._thread.join(SECONDS)
    assert not windows._thread.is_alive()
    with pytest.raises(AssertionError, match="closed"):
        windows.window(STEP)


def test_no_random_number_is_drawn() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]

    before = states()
    with open_ahead(make_windows()) as windows:
        for number in range(5):
            windows.window(number * STEP)
    assert states() == before


def test_the_thread_stands_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str]] = []
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: calls.append((device, threading.current_thread().name)),
    )
    windows = WindowsAhead(make_windows(), device=3)
    windows.window(0)
    windows.window(STEP)
    windows.close()
    assert set(calls) == {(3, "windows")}


def test_a_stream_is_asked_by_the_calling_thread_alone(
    pinned: PinnedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    askers: list[str] = []

    def share(_: Any) -> Any:
        askers.append(threading.current_thread().name)
        return {"input_ids": torch.arange(STEP * 4).view(STEP, 4)}

    settings: dict[str, Any] = {"micro_batch_size": 3, "num_micro_batches": 2, "rank": 1}
    stream = StreamWindows(None, position=0, num_samples=99, num_ranks=2, share=share, **settings)
    windows = prepare_for_device(stream, torch.device("cuda"))
    assert isinstance(windows, PinnedWindows) and not isinstance(windows, WindowsAhead)
    for number in range(3):
        given = windows.window(number * STEP)
        assert [batch["input_ids"][0, 0].item() for batch in given] == [3 * 4, 9 * 4]
        assert all(tensor in pinned for batch in given for tensor in batch.values())
        assert (
            windows.sample_ids(number * STEP).tolist() == stream.sample_ids(number * STEP).tolist()
        )
    assert askers == ["MainThread"] * 3


def test_only_a_gpu_gets_other_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    plain = make_windows()
    assert prepare_for_device(plain, torch.device("cpu")) is plain
    assert prepare_for_device(plain, torch.device("mps")) is plain
    windows = prepare_for_device(plain, torch.device("cuda"))
    assert isinstance(windows, WindowsAhead)
    assert windows._device == 2
    windows.close()


def test_only_what_is_pinned_is_copied_without_waiting() -> None:
    pinned, plain = Mock(), Mock()
    pinned.is_pinned.return_value, plain.is_pinned.return_value = True, False
    device = torch.device("cuda")
    to_device({"a": pinned, "b": plain}, device)
    pinned.to.assert_called_once_with(device, non_blocking=True)
    plain.to.assert_called_once_with(device, non_blocking=False)


def test_a_batch_of_the_cpu_is_left_alone() -> None:
    batch = make_windows().window(0)[0]
    there = to_device(batch, torch.device("cpu"))
    assert all(there[name] is batch[name] for name in batch)
