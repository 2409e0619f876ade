"""From text to a trained model, beside a script in the usual shape of Accelerate's example.

    python benchmarks/end_to_end.py --rounds 3 --steps 60

Both get Python's own library source as one text file, the same tokenizer, model, batch, number of
steps and bf16, start in fresh processes with empty caches, and are timed from start to exit. Ours
keeps its defaults: it also counts, checks, logs to MLflow, saves and exports. The other loads the
text row by row, maps a tokenizer and `group_texts` over it, and calls the model with labels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.bare_loop import (  # noqa: E402
    BATCH_SIZE,
    BLOCK_SIZE,
    MODEL,
    VOCAB_SIZE,
    build_model,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--dropout", type=float, help="of both; by default the model's own 0.1")
    parser.add_argument("--example", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.example:
        example(Path(options.example), options.steps, options.dropout)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        compare(Path(folder), options)


def write_corpus(folder: Path) -> None:
    from benchmarks.data_building import library_texts
    from llm_training.data.tokens.tokenizers import train_tokenizer

    texts = library_texts()
    (folder / "corpus.txt").write_text("".join(texts), encoding="utf-8", newline="")
    train_tokenizer("bpe", texts[::10], VOCAB_SIZE).save_pretrained(folder / "tokenizer")


def compare(folder: Path, options: argparse.Namespace) -> None:
    rounds, steps = options.rounds, options.steps
    dropout = [] if options.dropout is None else ["--dropout", str(options.dropout)]
    ratios = []
    for number in range(rounds):
        ours = time_of([*our_command(folder, number, steps), *dropout], folder)
        words = ["--example", str(folder), "--steps", str(steps), *dropout]
        theirs = time_of([sys.executable, __file__, *words], folder)
        ratios.append(theirs / ours)
        print(f"round {number + 1}: ours {ours:.1f} s, example {theirs:.1f} s", flush=True)
    print(
        f"example / ours: {statistics.median(ratios):.2f}"
        f" (from {min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds of {steps} steps)"
    )


def time_of(command: list[str], folder: Path) -> float:
    """Seconds from start to exit."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    began = time.perf_counter()
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    return time.perf_counter() - began


def our_command(folder: Path, number: int, steps: int) -> list[str]:
    settings: dict[str, Any] = {
        "model_type": "gpt2",
        "config_overrides": MODEL,
        "train_file": str(folder / "corpus.txt"),
        "tokenizer_name": str(folder / "tokenizer"),
        "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "mixed_precision": "bf16",
        "eval_steps": None,
        "device": "cpu",
        "cache_dir": str(folder / f"cache-{number}"),
        "tracking_uri": f"sqlite:///{folder}/mlflow-{number}.db",
        "output_dir": str(folder / f"ours-{number}"),
    }
    (folder / "run.json").write_text(json.dumps(settings))
    return [sys.executable, str(ROOT / "train_llm.py"), str(folder / "run.json")]


def example(folder: Path, steps: int, dropout: float | None) -> None:
    """The usual shape: rows of text, two maps, a DataLoader, a plain forward pass, AdamW."""
    import datasets
    import torch
    from accelerate import Accelerator
    from transformers import AutoTokenizer, default_data_collator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"]))

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        grouped = {
            name: [ids[start : start + BLOCK_SIZE] for start in range(0, total, BLOCK_SIZE)]
            for name, ids in joined.items()
        }
        return grouped | {"labels": [ids.copy() for ids in grouped["input_ids"]]}

    with tempfile.TemporaryDirectory() as cache:
        corpus = str(folder / "corpus.txt")
        text = datasets.load_dataset(
            "text", data_files=corpus, split="train", cache_dir=cache, keep_linebreaks=True
        )
        tokens = text.map(tokenize, batched=True, remove_columns=["text"])
        rows = tokens.map(group_texts, batched=True)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=BATCH_SIZE, shuffle=True, collate_fn=default_data_collator
        )
        network = build_model(dropout)
        adamw = torch.optim.AdamW(network.parameters(), lr=1e-4)
        model, optimizer, loader = accelerator.prepare(network, adamw, loader)
        for step, batch in enumerate(loader):
            if step == steps:
                break
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            print(step, loss.item(), flush=True)
    accelerator.unwrap_model(model).save_pretrained(folder / "example")


if __name__ == "__main__":
    main()
