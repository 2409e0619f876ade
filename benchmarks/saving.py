"""How long training pauses for a checkpoint: saved in the loop, and with --async_save.

    python benchmarks/saving.py --rounds 5 [--layers 12]

One process with a GPT-2 and AdamW. Each round saves once in the loop and once asynchronously, both
after a step; `write` is the time after the pause until the checkpoint is whole on the disk. What is
compared is the pause within each round. `torch.save` is what a plain loop would do: weights and
optimizer in one file, not flushed, not checked.
"""

from __future__ import annotations

import argparse
import os
import platform
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

from llm_training.checkpointing import CheckpointFolder  # noqa: E402
from llm_training.modeling import CausalLMWithLoss  # noqa: E402
from llm_training.state import TrainState  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6, help="of GPT-2's width; 12 is its size")
    options = parser.parse_args()
    config = AutoConfig.for_model("gpt2", n_layer=options.layers)
    network = CausalLMWithLoss(AutoModelForCausalLM.from_config(config))
    accelerator = Accelerator(cpu=True)
    adamw = torch.optim.AdamW(network.parameters(), fused=True)
    model, optimizer = accelerator.prepare(network, adamw)
    rows = torch.randint(config.vocab_size, (1, 64))
    found: dict[str, list[float]] = {
        name: [] for name in ("torch.save", "in loop", "async", "write")
    }
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        saving = {
            is_async: CheckpointFolder(
                accelerator, folder / str(is_async), 1, {}, is_async=is_async
            )
            for is_async in (False, True)
        }
        for number in range(1, options.rounds + 1):
            loss, _ = model(rows, rows)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state = TrainState(seed=0, step=number)
            plain = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
            found["torch.save"].append(seconds(lambda: torch.save(plain, folder / "plain.pt")))  # noqa: B023
            found["in loop"].append(seconds(lambda: saving[False].save(state)))  # noqa: B023
            found["async"].append(seconds(lambda: saving[True].save(state)))  # noqa: B023
            found["write"].append(seconds(saving[True].wait))
            print(
                f"round {number}: "
                + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in found.items()),
                flush=True,
            )
        size = sum(path.stat().st_size for path in folder.glob("True/step-*/*"))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores; torch {torch.__version__}; {size / 1e6:,.0f} MB")
    for other in ("in loop", "torch.save"):
        ratios = sorted(a / b for a, b in zip(found["async"], found[other], strict=True))
        print(
            f"pause with --async_save / {other}: {statistics.median(ratios):.2f}"
            f" (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
