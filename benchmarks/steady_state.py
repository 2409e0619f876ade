"""Our steady tokens per second and peak memory beside bare loops and the Trainer of transformers.

    python benchmarks/steady_state.py                               # about six minutes
    python benchmarks/steady_state.py --rounds 7 --steps 40 --variants ours_bf16 bare_bf16

Each round starts every variant once, in a fresh process, as a person would, one after the other:

- `bare_fp32`, `bare_bf16`: the plain loop of `bare_loop.py` with the loss of transformers
- `kernels_fp32`, `kernels_bf16`: the same loop with the kernels of our CPU fast path
- `ours_fp32`, `ours_bf16`: `python train_llm.py`, every step logged to file, console and MLflow
- `launched_bf16`: ours by `accelerate launch --config_file accelerate_configs/single.yaml`
- `compiled_bf16`: ours with `--torch_compile true`; only where it is named
- `trainer_bf16`: the Trainer of transformers, logging every step to nothing but its console

What is compared are the ratios within each round. The first steps of each are left out.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.bare_loop import (  # noqa: E402
    BATCH_SIZE,
    BLOCK_SIZE,
    MODEL,
    VOCAB_SIZE,
    WARMUP_STEPS,
    build_model,
    peak_bytes,
)

Result = dict[str, float]
VARIANTS = (
    "ours_fp32",  # first: it builds the token store that all read
    "kernels_fp32",
    "bare_fp32",
    "ours_bf16",
    "kernels_bf16",
    "launched_bf16",
    "bare_bf16",
    "trainer_bf16",
)
COMPARED = (
    ("ours_fp32", "kernels_fp32"),
    ("ours_fp32", "bare_fp32"),
    ("ours_bf16", "kernels_bf16"),
    ("ours_bf16", "bare_bf16"),
    ("ours_bf16", "trainer_bf16"),
    ("ours_bf16", "ours_fp32"),
    ("launched_bf16", "ours_bf16"),
    ("compiled_bf16", "ours_bf16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, in turn")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each run")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="NAME")
    parser.add_argument("--dropout", type=float, help="of the model; by default GPT-2's own, 0.1")
    parser.add_argument("--trainer", nargs=2, metavar=("STORE", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        store, steps = options.trainer
        print(json.dumps(trainer_loop(store, int(steps), options.dropout)))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Runs all rounds; prints each, then medians and ratios."""
    write_settings(folder, options)
    prepare_tokens(folder)
    found: dict[str, list[Result]] = {name: [] for name in options.variants}
    for number in range(options.rounds):
        for name in options.variants:
            found[name].append(run_variant(folder, name, number, options))
            rate, peak = found[name][-1]["tokens_per_second"], found[name][-1]["peak_bytes"]
            print(f"round {number + 1}: {name} {rate:,.0f} tokens/s, peak {peak / 1e6:,.0f} MB")
            sys.stdout.flush()
    print("\n| variant | tokens/s | peak memory |\n|---|---|---|")
    for name, results in found.items():
        rate, peak = (median_of(results, k) for k in ("tokens_per_second", "peak_bytes"))
        print(f"| {name} | {rate:,.0f} | {peak / 1e6:,.0f} MB |")
    print("\n| variant | beside | tokens/s (ratio) | lowest | highest | peak memory (ratio) |")
    print("|---|---|---|---|---|---|")
    for mine, other in COMPARED:
        if mine in found and other in found:
            print(ratio_line(mine, other, found[mine], found[other]))


def ratio_line(mine: str, other: str, ours: list[Result], theirs: list[Result]) -> str:
    def ratios(key: str) -> list[float]:
        return sorted(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))

    speed, peak = ratios("tokens_per_second"), statistics.median(ratios("peak_bytes"))
    middle = statistics.median(speed)
    return f"| {mine} | {other} | {middle:.3f} | {speed[0]:.3f} | {speed[-1]:.3f} | {peak:.2f} |"


def median_of(results: list[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


def write_settings(folder: Path, options: argparse.Namespace) -> None:
    settings = {
        "model_type": "gpt2",
        "config_overrides": MODEL,
        "dropout": options.dropout,
        "train_file": "${PYTHON_STDLIB}/*.py",
        "tokenizer_name": "bpe",
        "vocab_size": VOCAB_SIZE,
        "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_steps": WARMUP_STEPS + options.steps,
        "eval_steps": None,
        "save_steps": None,
        "logging_steps": 1,
        "device": "cpu",
        "cache_dir": str(folder / "token_cache"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
    }
    (folder / "run.json").write_text(json.dumps(settings))


def prepare_tokens(folder: Path) -> None:
    """Builds tokenizer, token store and MLflow's tables, so that no variant has to."""
    output = str(folder / "first")
    start([sys.executable, *our_words(folder, output, "fp32"), "--max_steps", "1"], folder)


def run_variant(folder: Path, name: str, number: int, options: argparse.Namespace) -> Result:
    kind, precision = name.rsplit("_", 1)
    if kind in ("ours", "launched", "compiled"):
        return run_ours(folder, kind, precision, number, options.steps)
    (store,) = (folder / "token_cache").glob("*/train.bin")
    if kind == "trainer":
        words = ["--trainer", str(store), str(options.steps)]
        if options.dropout is not None:
            words += ["--dropout", str(options.dropout)]
        return last_json(start([sys.executable, __file__, *words], folder)[0])
    settings = {
        "store": str(store),
        "steps": options.steps,
        "precision": precision,
        "same_kernels": kind == "kernels",
        "dropout": options.dropout,
    }
    bare = str(ROOT / "benchmarks" / "bare_loop.py")
    return last_json(start([sys.executable, bare, json.dumps(settings)], folder)[0])


def run_ours(folder: Path, kind: str, precision: str, number: int, steps: int) -> Result:
    """By the clock of its own log, every step logged; the peak of its largest process."""
    output = folder / f"{kind}-{precision}-{number}"
    command = [sys.executable]
    if kind == "launched":
        config = ROOT / "accelerate_configs" / "single.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += our_words(folder, str(output), precision)
    if kind == "compiled":
        command += ["--torch_compile", "true"]
    _, peak = start(command, folder)
    lines = (output / "train_log.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines if "train/loss" in line][-(steps + 1) :]
    rate = steps * BATCH_SIZE * BLOCK_SIZE / (times[-1] - times[0])
    return {"tokens_per_second": rate, "peak_bytes": peak}


def our_words(folder: Path, output: str, precision: str) -> list[str]:
    words = [str(ROOT / "train_llm.py"), str(folder / "run.json"), "--output_dir", output]
    return [*words, "--mixed_precision", precision]


def start(command: list[str], folder: Path) -> tuple[str, int]:
    """Runs a command; what it printed, and the peak memory of its largest process in bytes."""
    # A process in between, since the system counts the peak over all children that ever ended.
    code = (
        "import resource, subprocess, sys;"
        "code = subprocess.run(sys.argv[1:]).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    # The threads of a person's shell; `accelerate launch` sets one.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    output, _, peak = ended.stdout.rstrip().rpartition("\n")
    return output, int(peak) * (1 if sys.platform == "darwin" else 1024)


def last_json(output: str) -> Result:
    return dict(json.loads(output.splitlines()[-1]))


def trainer_loop(store: str, steps: int, dropout: float | None) -> dict[str, Any]:
    """The Trainer of transformers on the same rows, its defaults but for what we do too."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = np.memmap(store, np.uint16, "r")

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (WARMUP_STEPS + steps) * BATCH_SIZE

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE].astype(np.int64)
            return {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=WARMUP_STEPS + steps,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        )
        Trainer(build_model(dropout), settings, train_dataset=Rows(), callbacks=[Clock()]).train()
    seconds = ends[-1] - ends[WARMUP_STEPS - 1]
    rate = steps * BATCH_SIZE * BLOCK_SIZE / seconds
    return {"tokens_per_second": rate, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    main()
