"""Our steady tokens per second beside a bare PyTorch loop on the same model, rows and precision.

    python benchmarks/steady_state.py --rounds 4 --steps 20

Each round starts `train_llm.py` as a person would, logging every step, and then the bare loop below
in a fresh process, so that both meet the same machine; what is compared are their medians and the
ratio within each round. The first steps of each are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARMUP_STEPS = 5
MODEL = {"n_layer": 6, "n_embd": 384, "n_head": 6}
BATCH_SIZE, BLOCK_SIZE, VOCAB_SIZE = 8, 256, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs per precision")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--bare", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(bare_loop(Path(options.bare), options.steps, options.precisions[0]))
        return
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            compare(Path(folder), options.rounds, options.steps, precision)


def compare(folder: Path, rounds: int, steps: int, precision: str) -> None:
    """Prints the table of one precision."""
    ours, bare = [], []
    for number in range(rounds):
        ours.append(run_ours(folder, steps, precision, number))
        command = [sys.executable, __file__, "--bare", str(folder), "--steps", str(steps)]
        output = subprocess.run(
            [*command, "--precisions", precision], check=True, capture_output=True, text=True
        ).stdout
        bare.append(float(output.split()[-1]))
        print(f"{precision} round {number + 1}: ours {ours[-1]:,.0f}, bare {bare[-1]:,.0f}")
    ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
    print(
        f"{precision}: train_llm.py {statistics.median(ours):,.0f} tokens/s, bare loop"
        f" {statistics.median(bare):,.0f} tokens/s, ratio {statistics.median(ratios):.3f}"
        f" (from {ratios[0]:.3f} to {ratios[-1]:.3f} in {rounds} rounds)",
        flush=True,
    )


def run_ours(folder: Path, steps: int, precision: str, number: int) -> float:
    """Tokens per second of `train_llm.py`, by the clock of its own log, every step logged."""
    output = folder / f"{precision}-{number}"
    settings = {
        "model_type": "gpt2",
        "config_overrides": MODEL,
        "train_file": "${PYTHON_STDLIB}/*.py",
        "tokenizer_name": "bpe",
        "vocab_size": VOCAB_SIZE,
        "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_steps": WARMUP_STEPS + steps,
        "mixed_precision": precision,
        "eval_steps": None,
        "save_steps": None,
        "logging_steps": 1,
        "cache_dir": str(folder / "token_cache"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "output_dir": str(output),
    }
    (folder / "run.json").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "train_llm.py"), str(folder / "run.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    lines = (output / "train_log.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines][-(steps + 1) :]
    return steps * BATCH_SIZE * BLOCK_SIZE / (times[-1] - times[0])


def bare_loop(folder: Path, steps: int, precision: str) -> float:
    """Tokens per second of the plainest loop over the same rows, printing each loss."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    (store,) = (folder / "token_cache").glob("*/train.bin")
    tokens = np.memmap(store, np.uint16, "r")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_positions": BLOCK_SIZE, **MODEL}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    began = 0.0
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            began = time.perf_counter()
        start = step * BATCH_SIZE * BLOCK_SIZE % (len(tokens) - BATCH_SIZE * BLOCK_SIZE)
        rows = tokens[start : start + BATCH_SIZE * BLOCK_SIZE].astype(np.int64)
        ids = torch.from_numpy(rows).view(BATCH_SIZE, BLOCK_SIZE)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(step, loss.item())
    return steps * BATCH_SIZE * BLOCK_SIZE / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
