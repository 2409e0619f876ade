"""The plainest training loop, for others to stand beside: a model, rows, AdamW, and nothing else.

    python benchmarks/bare_loop.py '{"store": "token_cache/.../train.bin", "steps": 20}'

Reads its settings as one JSON object and prints one: tokens per second over the measured steps and
its peak memory. `same_kernels` gives it what `--cpu_fast_path` brings, by the same functions.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

WARMUP_STEPS = 5
MODEL = {"n_layer": 6, "n_embd": 384, "n_head": 6}
BATCH_SIZE, BLOCK_SIZE, VOCAB_SIZE = 8, 256, 8192


def main() -> None:
    if len(sys.argv) < 2:  # `make bench` starts every script of this folder
        print("benchmarks/steady_state.py starts this loop.")
        return
    print(json.dumps(run(**json.loads(sys.argv[1]))))


def run(
    store: str,
    steps: int,
    precision: str = "fp32",
    same_kernels: bool = False,
    dropout: float | None = None,
) -> dict[str, float]:
    """Trains on the first rows of a token store, printing each loss.

    Args:
        store: a uint16 file of tokens.
        steps: measured, after `WARMUP_STEPS`.
        same_kernels: fused GELU, dropout and loss as train_llm.py computes them, kept memory.
        dropout: None as the configuration says.
    """
    import numpy as np
    import torch

    from llm_training.cpu_dropout import speed_up_dropout
    from llm_training.cpu_speed import fuse_gelu, keep_memory_warm

    tokens = np.memmap(store, np.uint16, "r")
    torch.manual_seed(0)
    if same_kernels:
        keep_memory_warm()
    model = build_model(dropout)
    if same_kernels:
        fuse_gelu(model)
        speed_up_dropout(model)
    loss_of = our_loss if same_kernels else plain_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    began = 0.0
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            began = time.perf_counter()
        start = step * BATCH_SIZE * BLOCK_SIZE % (len(tokens) - BATCH_SIZE * BLOCK_SIZE)
        rows = tokens[start : start + BATCH_SIZE * BLOCK_SIZE].astype(np.int64)
        ids = torch.from_numpy(rows).view(BATCH_SIZE, BLOCK_SIZE)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(step, loss.item())
    rate = steps * BATCH_SIZE * BLOCK_SIZE / (time.perf_counter() - began)
    return {"tokens_per_second": rate, "peak_bytes": peak_bytes()}


def build_model(dropout: float | None) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_positions": BLOCK_SIZE, **MODEL}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if dropout is not None:
        sizes |= {name: dropout for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    return GPT2LMHeadModel(GPT2Config(**sizes)).train()


def plain_loss(model: Callable[..., Any], ids: Any) -> Any:
    """The loss as transformers computes it, which most loops call."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def our_loss(model: Callable[..., Any], ids: Any) -> Any:
    """The loss of train_llm.py: labels are shifted, logits are not copied for it."""
    from llm_training.losses import shift_labels, token_loss_sum

    logits = model(input_ids=ids, use_cache=False).logits
    return token_loss_sum(logits, shift_labels(ids)) / (ids.shape[0] * (ids.shape[1] - 1))


def peak_bytes() -> int:
    """The largest resident memory that this process ever had; a Mac counts in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
