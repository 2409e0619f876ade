"""How long it takes until something happens: help, a refusal, and the first optimizer step.

    python benchmarks/start_up.py --rounds 5

Each round starts all three once in fresh processes. The first step is that of a small GPT-2 on a
small text with a byte tokenizer, everything else by default; the stages of its start are told apart
by the lines that it prints. The files of the libraries are in the system's cache after the first
round, which is left out.
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

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_llm.py")
# The first line that begins so ends the stage; the end is told to the person who waits for it.
STAGES = (
    ("imports and Accelerator", "New run in"),
    ("data, model and optimizer", "Model "),
    ("prepare, tracker and first step", "step "),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured starts of each kind")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            seconds = {
                "--help": time_of(["--help"], 0),
                "a wrong argument": time_of(["--learning_rat", "1e-3"], 2),
                **first_step(Path(folder) / str(number)),
            }
            for name, value in seconds.items() if number else ():
                found.setdefault(name, []).append(value)
    print("\n| until | median seconds | fastest | slowest |\n|---|---|---|---|")
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} | {min(values):.2f} | {max(values):.2f} |")


def time_of(words: list[str], code: int) -> float:
    """Seconds until `train_llm.py` has answered and ended, which it must with this code."""
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    if ended.returncode != code:
        sys.exit(f"{words} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return time.perf_counter() - began


def first_step(folder: Path) -> dict[str, float]:
    """Seconds of each stage until the first step is told, and of all together."""
    folder.mkdir()
    (folder / "text.txt").write_text("It was a bright cold day, and the clocks ran.\n" * 2000)
    settings = {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 2, "n_embd": 64, "n_head": 2},
        "train_file": str(folder / "text.txt"),
        "tokenizer_name": "byte",
        "block_size": 128,
        "max_steps": 1,
        "logging_steps": 1,
        "eval_steps": None,
        "save_steps": None,
        "device": "cpu",
    }
    (folder / "run.json").write_text(json.dumps(settings))
    command = [sys.executable, "-u", SCRIPT, str(folder / "run.json")]
    began = last = time.perf_counter()
    stages, seconds = list(STAGES), {}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # A line that is missing costs its stage, not the measurement.
            place = next((i for i, (_, begins) in enumerate(stages) if line.startswith(begins)), -1)
            if place >= 0:
                now = time.perf_counter()
                seconds[f"... {stages[place][0]}"] = now - last
                last = now
                del stages[: place + 1]
    if process.returncode or stages:
        sys.exit(f"{' '.join(command)} ended with {process.returncode} and told no step")
    return {"first step": last - began} | seconds


if __name__ == "__main__":
    main()
