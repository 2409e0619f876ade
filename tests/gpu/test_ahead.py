"""On a GPU: windows really are pinned, equal the plain ones, and are copied without waiting."""

import threading

import numpy as np
import pytest
import torch

from llm_training.data.rows.ahead import WindowsAhead, prepare_for_device, to_device
from llm_training.data.rows.store_rows import StreamRows
from llm_training.data.rows.windows import TrainingWindows
from llm_training.data.tokens.token_store import TokenArray

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

GPU = torch.device("cuda")
STEP = 64


def make_windows() -> TrainingWindows:
    tokens = np.arange(512 * 1000, dtype=np.uint32) % 50_000
    rows = StreamRows(TokenArray(tokens), 512)
    return TrainingWindows(
        rows, 3, num_samples=20 * STEP, micro_batch_size=16, num_micro_batches=4, rank=0,
        num_ranks=1,
    )  # fmt: skip


def test_windows_are_pinned_and_reach_the_gpu_as_they_are() -> None:
    plain, windows = make_windows(), prepare_for_device(make_windows(), GPU)
    assert isinstance(windows, WindowsAhead)
    try:
        for position in [0, STEP, 2 * STEP, 7 * STEP + 5, 8 * STEP + 5, 0, 19 * STEP, 20 * STEP]:
            given, wanted = windows.window(position), plain.window(position)
            for batch, of_plain in zip(given, wanted, strict=True):
                assert all(tensor.is_pinned() for tensor in batch.values())
                there = to_device(batch, GPU)
                assert all(torch.equal(there[name].cpu(), of_plain[name]) for name in of_plain)
    finally:
        windows.close()
    assert not any(thread.name == "windows" for thread in threading.enumerate())


def test_the_host_does_not_wait_for_what_the_gpu_still_computes() -> None:
    batch = {name: tensor.pin_memory() for name, tensor in make_windows().window(0)[0].items()}
    to_device(batch, GPU)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second of clock cycles
    done = torch.cuda.Event()
    to_device(batch, GPU)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_pinned_memory_is_not_used_again_before_it_is_copied() -> None:
    windows, plain = prepare_for_device(make_windows(), GPU), make_windows()
    try:
        windows.window(0)
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        # No window outlives its turn of this loop, while all of the copies wait.
        there = [
            to_device(batch, GPU)
            for position in range(0, 10 * STEP, STEP)
            for batch in windows.window(position)
        ]
    finally:
        windows.close()
    wanted = [batch for at in range(0, 10 * STEP, STEP) for batch in plain.window(at)]
    for batch, of_plain in zip(there, wanted, strict=True):
        assert all(torch.equal(batch[name].cpu(), of_plain[name]) for name in of_plain)
