"""Time of a step with Muon beside AdamW: the update alone, and the step as a whole.

    python benchmarks/optimizers.py --rounds 10                # on a GPU too, where there is one
    python benchmarks/optimizers.py --models small --rounds 2 --micro_batch 4

Both train the same GPT-2, each its own copy, on the same random rows. Each round takes one step of
each, one after the other, and ratios are taken within it; the first two rounds are not counted. The
update does not depend on the number of tokens and the rest of the step does, so how much longer the
whole takes holds for the batch that is named.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from arguments import OptimizationArguments  # noqa: E402
from llm_training.causal_lm import CausalLMWithLoss  # noqa: E402
from llm_training.cpu_speed import fuse_gelu, keep_memory_warm  # noqa: E402
from llm_training.launch import has_bf16  # noqa: E402
from llm_training.optim import build_optimizer  # noqa: E402

MODELS = {
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6},
    "medium": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "large": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
}
VOCAB_SIZE, BLOCK_SIZE = 8192, 256
NOT_COUNTED = 2


class Trained:
    """A model with its optimizer, and how long its steps took in seconds."""

    def __init__(self, optim: Literal["adamw", "muon"], sizes: dict[str, int], device: str):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        more: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, **sizes}
        more |= {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
        config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=BLOCK_SIZE, **more)
        network = GPT2LMHeadModel(config).train()
        if device == "cpu":
            fuse_gelu(network)
        self.device = device
        self.model = CausalLMWithLoss(network).to(device)
        arguments = OptimizationArguments(optim=optim)
        self.optimizer = build_optimizer(self.model, arguments, device)
        self.update_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def step(self, ids: Tensor) -> None:
        """One step on the rows `ids` (B, T), as the script does it."""
        began = self.now()
        with torch.autocast(self.device, torch.bfloat16, enabled=has_bf16(self.device)):
            loss, _ = self.model(input_ids=ids, labels=ids)
        (loss / ids.numel()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before_update = self.now()
        self.optimizer.step()
        ended = self.now()
        self.optimizer.zero_grad()
        self.update_seconds.append(ended - before_update)
        self.step_seconds.append(ended - began)

    def now(self) -> float:
        """The clock, once the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of each")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small", "medium"])
    parser.add_argument("--micro_batch", type=int, default=8, help=f"rows of {BLOCK_SIZE} tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        keep_memory_warm()
    print(
        f"{device_words(device)}, torch {torch.__version__},"
        f" {'bf16' if has_bf16(device) else 'fp32'}, {options.micro_batch * BLOCK_SIZE:,} tokens a"
        f" step, {options.rounds} rounds\n"
    )
    print(
        "| model | parameters | what | Muon / AdamW | lowest | highest | AdamW's share | Muon's |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for line in compare(name, device, options.rounds, options.micro_batch):
            print(line, flush=True)


def device_words(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def compare(name: str, device: str, rounds: int, micro_batch: int) -> list[str]:
    """Lines of the table: the update alone, and the whole step."""
    adamw, muon = Trained("adamw", MODELS[name], device), Trained("muon", MODELS[name], device)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NOT_COUNTED + rounds):
        ids = torch.randint(VOCAB_SIZE, (micro_batch, BLOCK_SIZE), generator=generator).to(device)
        adamw.step(ids)
        muon.step(ids)
    parameters = sum(p.numel() for p in adamw.model.parameters())
    lines = []
    for what in ("update", "step"):
        mine, others = (getattr(t, f"{what}_seconds")[NOT_COUNTED:] for t in (muon, adamw))
        ratios = sorted(a / b for a, b in zip(mine, others, strict=True))
        shares = [f"{share_of_update(t):.3f}" if what == "update" else "" for t in (adamw, muon)]
        lines.append(
            f"| {name} | {parameters:,} | {what} | {statistics.median(ratios):.2f}"
            f" | {ratios[0]:.2f} | {ratios[-1]:.2f} | {shares[0]} | {shares[1]} |"
        )
    return lines


def share_of_update(trained: Trained) -> float:
    """Of the whole step's time."""
    both = zip(trained.update_seconds, trained.step_seconds, strict=True)
    return statistics.median(update / step for update, step in list(both)[NOT_COUNTED:])


if __name__ == "__main__":
    main()
