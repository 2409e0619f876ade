"""What a checkpoint costs beside the plainest way to bring as many bytes to the same disk.

    python benchmarks/saving.py --rounds 7 [--layers 6]

One process, a GPT-2 (12 layers: 124M parameters) and AdamW. Every round takes its turn at each way:

- `raw`: the bytes of a checkpoint, in files of the same sizes, by `write()` in blocks of 16 MiB and
  one `fsync` for each file, after which older ones go; `raw, not flushed` is the same without
- `torch.save`: weights and optimizer in one file, not flushed, not hashed
- `in the loop`: our save, flushed and with the checksum of every file
- `pause`: what `--async_save` keeps the loop waiting; `write` is the time after it until the
  checkpoint is whole on the disk, while nothing else runs
- `steps`: as many steps without a save, with one in the loop, and with an asynchronous one that is
  whole before the clock stops: the difference is what a save takes from the loop, all in all

Ratios are taken within a round. What a way left to be flushed is flushed before the next begins.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from llm_training.causal_lm import CausalLMWithLoss  # noqa: E402
from llm_training.checkpointing import CheckpointFolder  # noqa: E402
from llm_training.state import TrainState  # noqa: E402

BLOCK_BYTES = 2**24


class Bench:
    """A model, its optimizer, and two folders of checkpoints that it is saved to."""

    def __init__(self, folder: Path, layers: int):
        config = AutoConfig.for_model("gpt2", n_layer=layers)
        self.network = CausalLMWithLoss(AutoModelForCausalLM.from_config(config))
        self.accelerator = Accelerator(cpu=True)
        adamw = torch.optim.AdamW(self.network.parameters(), fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.network, adamw)
        self.rows = torch.randint(config.vocab_size, (1, 128))
        self.folder, self.step = folder, 0
        self.in_loop, self.async_ = (
            CheckpointFolder(self.accelerator, folder / str(value), 1, {}, is_async=value)
            for value in (False, True)
        )

    def train(self, num_steps: int, save: CheckpointFolder | None = None) -> None:
        """Some steps, with a save after the first."""
        for number in range(num_steps):
            loss, _ = self.model(self.rows, self.rows)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if save is not None and number == 0:
                self.save(save)
        if save is not None:
            save.wait()

    def save(self, folder: CheckpointFolder) -> None:
        self.step += 1
        folder.save(TrainState(seed=0, step=self.step))

    def save_plainly(self) -> None:
        state = {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / "plain.pt")

    def write_raw(self, blocks: dict[str, memoryview], *, is_flushed: bool) -> None:
        """Beside the former ones, which go afterwards, as an older checkpoint does."""
        before = list(self.folder.glob("raw-*"))
        self.step += 1
        target = self.folder / f"raw-{self.step}"
        target.mkdir()
        for name, content in blocks.items():
            with (target / name).open("wb", buffering=0) as file:
                for begin in range(0, len(content), BLOCK_BYTES):
                    file.write(content[begin : begin + BLOCK_BYTES])
                if is_flushed:
                    os.fsync(file.fileno())
        for folder in before:
            shutil.rmtree(folder)

    def bytes_of_checkpoint(self) -> dict[str, memoryview]:
        """As many random bytes as each file of a checkpoint has."""
        files = list((self.folder / "False" / "last").resolve().iterdir())
        sizes = {path.name: path.stat().st_size for path in files}
        return {
            name: torch.randint(256, (size,), dtype=torch.uint8).numpy().data
            for name, size in sizes.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2's width")
    parser.add_argument("--steps", type=int, default=8, help="beside a save; 0: leave that out")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        bench = Bench(Path(name), options.layers)
        bench.train(1, bench.in_loop)
        bench.train(1, bench.async_)  # takes its memory, which later ones keep
        blocks = bench.bytes_of_checkpoint()
        ways: dict[str, Callable[[], object]] = {
            "raw": lambda: bench.write_raw(blocks, is_flushed=True),
            "raw, not flushed": lambda: bench.write_raw(blocks, is_flushed=False),
            "torch.save": bench.save_plainly,
            "in the loop": lambda: bench.save(bench.in_loop),
            "pause": lambda: bench.save(bench.async_),
            "write": bench.async_.wait,
        }
        if options.steps:
            ways["steps"] = lambda: bench.train(options.steps)
            ways["steps, in the loop"] = lambda: bench.train(options.steps, bench.in_loop)
            ways["steps, async"] = lambda: bench.train(options.steps, bench.async_)
        for number in range(1, options.rounds + 1):
            for way, work in ways.items():
                if way != "write":
                    os.sync()
                found.setdefault(way, []).append(seconds(work))
            times = ", ".join(f"{way} {values[-1]:.2f} s" for way, values in found.items())
            print(f"round {number}: {times}", flush=True)
            (bench.folder / "plain.pt").unlink()
    report(found, sum(len(content) for content in blocks.values()))


def report(found: dict[str, list[float]], num_bytes: int) -> None:
    machine = platform.processor() or platform.machine()
    print(
        f"{machine}, {os.cpu_count()} cores; torch {torch.__version__}; {num_bytes / 1e6:,.0f} MB"
    )
    for way in ("in the loop", "pause", "torch.save"):
        for base in ("raw", "raw, not flushed", "in the loop"):
            if way != base:
                say_ratio(f"{way} / {base}", found[way], found[base])
    for way in ("in the loop", "async") if "steps" in found else ():
        pairs = zip(found[f"steps, {way}"], found["steps"], strict=True)
        say_ratio(f"steps take longer, {way} / raw", [a - b for a, b in pairs], found["raw"])


def say_ratio(what: str, ours: list[float], base: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(ours, base, strict=True))
    print(f"{what}: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
