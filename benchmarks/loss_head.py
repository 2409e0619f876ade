"""Time and memory of the loss in chunks beside whole logits: the last layer alone, both passes.

    python benchmarks/loss_head.py --rounds 5 [--positions 2048 --width 768 --vocab_size 50257]

Each round runs all ways one after the other, and what is compared is their time within it; the
first round is not counted. With one thread, time is that at work, so that others on the machine
disturb little; with several (`--threads 2`) it is that of the clock. `torch` is
`F.linear_cross_entropy` with the options it chooses by itself. Memory is that of a fresh process at
its highest, beyond what is left when the backward pass is over: weights and gradients. A whole step
has the blocks beside the head, so its ratios of time are nearer to 1.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from llm_training.chunked_loss import linear_token_loss_sum, positions_per_chunk  # noqa: E402
from llm_training.losses import token_loss_sum  # noqa: E402

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(options: argparse.Namespace) -> dict[str, Loss]:
    """Name to what computes the summed loss of `hidden` (N, H), `weight` (V, H), `tokens` (N,)."""
    sizes = options.chunks or [positions_per_chunk(options.vocab_size, "cpu")]

    def whole(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return token_loss_sum(F.linear(hidden, weight)[None], tokens[None])

    def in_chunks(size: int) -> Loss:
        return lambda h, w, tokens: linear_token_loss_sum(h, w, None, tokens, size)

    def by_torch(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # which torch's function does not heed
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        how = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, tokens, reduction="sum", options=how)

    found: dict[str, Loss] = {"whole": whole}
    found |= {f"chunks of {size}": in_chunks(size) for size in sizes}
    return found | ({"torch": by_torch} if options.with_torch else {})


def one_pass(options: argparse.Namespace, precision: str, compute: Loss) -> float:
    """Seconds of a forward and a backward pass; prints the memory it took, where asked for."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    hidden = torch.randn(options.positions, options.width, requires_grad=True)
    weight = nn.Parameter(torch.randn(options.vocab_size, options.width) * 0.02)
    tokens = torch.randint(options.vocab_size, (options.positions,))
    began = clock()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = compute(hidden, weight, tokens)
    (loss / options.positions).backward()
    seconds = clock() - began
    if options.memory_of:
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(highest - psutil.Process().memory_info().rss)
    return seconds


def peak_bytes(options: argparse.Namespace, precision: str, name: str) -> int:
    """What one pass takes in a process of its own."""
    script = Path(__file__).resolve()
    words = [sys.executable, str(script), *sys.argv[1:], "--memory_of", f"{precision}/{name}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=200)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--chunks", type=int, nargs="*", help="positions in a chunk, to try sizes")
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--with_torch", action="store_true")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = ways(options)
    if options.memory_of:
        precision, name = options.memory_of.split("/")
        one_pass(options, precision, known[name])
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print("| precision | loss | time | lowest | highest | memory | of whole logits |")
    print("|---|---|---|---|---|---|---|")
    # First of all: a process that is started counts the highest memory of the one that starts it.
    peaks = {(p, name): peak_bytes(options, p, name) for p in options.precisions for name in known}
    for precision in options.precisions:
        seconds: dict[str, list[float]] = {name: [] for name in known}
        for _ in range(options.rounds + 1):
            for name, compute in known.items():
                seconds[name].append(one_pass(options, precision, compute))
        for name in known:
            counted = zip(seconds[name][1:], seconds["whole"][1:], strict=True)
            ratios = sorted(a / b for a, b in counted)
            print(
                f"| {precision} | {name} | {statistics.median(ratios):.2f} | {ratios[0]:.2f}"
                f" | {ratios[-1]:.2f} | {peaks[precision, name] / 2**20:,.0f} MiB"
                f" | 1/{peaks[precision, 'whole'] / max(1, peaks[precision, name]):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
