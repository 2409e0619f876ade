"""A compact GPT-2 and a compact loop for GPUs, for others to stand beside; own words, no packages.

    python benchmarks/nanogpt_like.py '{"store": "train.bin", "sizes": {...}, "steps": 20}'

What nanoGPT does is done here: one attention kernel with a causal mask, a head tied to the
embedding, a vocabulary padded to a multiple of 64, bf16 autocast, AdamW in one kernel, clipped
gradients, the whole model compiled, accumulation, rows copied from pinned memory while the device
computes, and a loss that is fetched only where it is logged. It counts, checks and saves nothing.
The function is that of GPT-2 in transformers without dropout: biases, GELU's tanh form.

Reads its settings as one JSON object and prints one: tokens per second and its peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.bare_loop import peak_bytes  # noqa: E402

EMBEDDING_MULTIPLE = 64
LEARNING_RATE, MAX_GRAD_NORM = 6e-4, 1.0


@dataclass(frozen=True)
class Sizes:
    """Of the model: blocks, heads of a block, its width, tokens, and positions of a row."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int


@dataclass(frozen=True)
class Settings:
    """Of a run; `micro_batch` rows go through the model at once, `accumulation` times a step."""

    store: str
    sizes: dict[str, int]
    micro_batch: int
    accumulation: int
    steps: int
    warmup_steps: int
    logging_steps: int
    device: str = "cuda"
    precision: str = "bf16"
    is_compiled: bool = True


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to what went in."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.n_embd
        self.num_heads = sizes.n_head
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.forward_norm = nn.LayerNorm(width)
        self.forward_in = nn.Linear(width, 4 * width)
        self.forward_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        parts = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(self.forward_in(self.forward_norm(hidden)), approximate="tanh")
        return hidden + self.forward_out(inner)


class Model(nn.Module):
    """GPT-2, whose head is its embedding."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        rows = -(-sizes.vocab_size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
        self.tokens = nn.Embedding(rows, sizes.n_embd)
        self.positions = nn.Embedding(sizes.block_size, sizes.n_embd)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layer))
        self.norm = nn.LayerNorm(sizes.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("attention_out.weight", "forward_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * sizes.n_layer) ** (0.5 * is_residual))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, () in nats, of the (B, T) `targets`, each the token after its id."""
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    if len(sys.argv) < 2:
        print("benchmarks/gpu_training.py starts this loop.")
        return
    print(json.dumps(run(Settings(**json.loads(sys.argv[1])))))


def run(settings: Settings) -> dict[str, float]:
    """Trains; the rate is that of the steps after the warm-up."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = Sizes(**settings.sizes)
    model = Model(sizes).to(settings.device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    compute = torch.compile(model) if settings.is_compiled else model
    batches = read_batches(settings, sizes)
    autocast = partial(
        torch.autocast, settings.device, torch.bfloat16, enabled=settings.precision == "bf16"
    )

    times: dict[int, float] = {}
    batch = next(batches)
    for step in range(1, settings.warmup_steps + settings.steps + 1):
        for _ in range(settings.accumulation):
            loss, batch = forward_backward(compute, batch, batches, autocast, settings)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % settings.logging_steps == 0:
            # Fetching the loss waits for the device.
            print(f"step {step} | loss {loss.item():.4f}", file=sys.stderr, flush=True)
            times[step] = time.perf_counter()
    seconds = times[settings.warmup_steps + settings.steps] - times[settings.warmup_steps]
    rows = settings.steps * settings.accumulation * settings.micro_batch
    on_gpu = settings.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return {"tokens_per_second": rows * sizes.block_size / seconds, "peak_bytes": peak}


def forward_backward(
    compute: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[None]],
    settings: Settings,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One micro-batch: its detached loss, and the next batch, read while the device computes."""
    with autocast():
        loss = compute(*batch)
    following = next(batches)
    (loss / settings.accumulation).backward()
    return loss.detach(), following


def read_batches(settings: Settings, sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows from anywhere in the file and the tokens after each of theirs, (B, T) int64 both."""
    tokens = np.memmap(settings.store, np.uint16, "r")
    length = sizes.block_size
    while True:
        starts = torch.randint(len(tokens) - length, (settings.micro_batch,)).tolist()
        rows = np.stack([tokens[start : start + length + 1] for start in starts])
        whole = torch.from_numpy(rows.astype(np.int64))
        pair = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
        if settings.device == "cuda":
            pair = pair[0].pin_memory(), pair[1].pin_memory()
        yield (
            pair[0].to(settings.device, non_blocking=True),
            pair[1].to(settings.device, non_blocking=True),
        )


if __name__ == "__main__":
    main()
