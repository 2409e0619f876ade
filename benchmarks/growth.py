"""How speed grows with the model, the rows, the processes, the corpus and the vocabulary.

    python benchmarks/growth.py [--parts model block processes corpus vocabulary paper]
                                [--megabytes 10 100] [--steps 6]

Every part but `paper` is measured here, on a CPU, each point by a run of `train_llm.py` (or of its
data preparation) in a process of its own; tokens per second are those of its log without the first
steps. `paper` computes what 8, 64 and 1,024 GPUs would need, by the formulas of
`llm_training/footprint.py` and `llm_training/flops.py`; nothing of it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from llm_training.footprint import (  # noqa: E402
    ModelShape,
    activation_bytes,
    exchanged_bytes,
    state_bytes_per_parameter,
    working_bytes,
)

WARMUP_STEPS = 3
BYTES = 257  # the vocabulary of the byte tokenizer

# Layers, width, heads, and the vocabulary that the model embeds.
MODELS = {
    "1M": (4, 128, 4, 1024),
    "5M": (6, 256, 4, 2048),
    "14M": (6, 384, 6, 8192),
    "45M": (8, 512, 8, 32768),
    "124M": (12, 768, 12, 50257),
}
BLOCKS = (128, 256, 512, 1024, 2048)
PROCESSES = (1, 2)
VOCABULARIES = (512, 4096, 16384, 32768)

# Llama's shapes: layers, width, feed-forward width, vocabulary, parameters.
GPU_MODELS = {
    "1B": ModelShape(1_236_000_000, 16, 2048, 8192, 3, 128_256),
    "8B": ModelShape(8_030_000_000, 32, 4096, 14336, 3, 128_256),
    "70B": ModelShape(70_550_000_000, 80, 8192, 28672, 3, 128_256),
}
GPU_COUNTS = (8, 64, 1024)
GPU_TOKENS = 8192  # of a micro-batch on one GPU: two rows of 4,096
GPU_BLOCK = 4096
GPU_FLOPS = 0.5 * 989.5e12  # half of an H100's peak in bf16: an assumption, not a measurement
# Bytes a second that one GPU sends: NVLink 4 within a machine, and 400 Gbit/s InfiniBand between.
LINKS = {8: 450e9, 64: 50e9, 1024: 50e9}


def main() -> None:
    parts: dict[str, Callable[[Path, argparse.Namespace], None]] = {
        "model": over_models,
        "block": over_blocks,
        "processes": over_processes,
        "corpus": over_corpora,
        "vocabulary": over_vocabularies,
        "paper": on_paper,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100], help="of the corpus")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), options)


def over_models(folder: Path, options: argparse.Namespace) -> None:
    """Parameters, with 8 rows of 256 tokens."""
    table("model", "parameters", "tokens/s", "ms a step", "operations a second")
    for name, (layers, width, heads, vocabulary) in MODELS.items():
        model = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary}
        speed, facts = train(folder, options.steps, config_overrides=model)
        flops = speed * facts["flops_per_token"]
        row(name, f"{facts['num_parameters']:,}", *speeds(speed, 8 * 256), f"{flops / 1e9:,.0f}e9")


def over_blocks(folder: Path, options: argparse.Namespace) -> None:
    """Row length, 4,096 tokens in every step, 14M parameters."""
    table("block size", "rows", "tokens/s", "ms a step")
    for block in BLOCKS:
        rows = 4096 // block
        speed, _ = train(folder, options.steps, block_size=block, per_device_train_batch_size=rows)
        row(f"{block}", f"{rows}", *speeds(speed, 4096))


def over_processes(folder: Path, options: argparse.Namespace) -> None:
    """Processes that share the machine's cores, the same 8 rows in a step."""
    table("processes", "backend", "tokens/s", "ms a step")
    for count in PROCESSES:
        for backend in ("single",) if count == 1 else ("ddp", "fsdp", "zero2"):
            speed, _ = train(
                folder,
                options.steps,
                launch=None if count == 1 else (backend, count),
                per_device_train_batch_size=8 // count,
                device="cpu",
            )
            row(f"{count}", backend, *speeds(speed, 8 * 256))


def over_corpora(folder: Path, options: argparse.Namespace) -> None:
    """Bytes of text that become a token store, BPE of 4,096 tokens trained on it."""
    table("text", "seconds", "MB a second")
    for megabytes in options.megabytes:
        text = folder / f"{megabytes}.txt"
        write_text(text, megabytes * 10**6)
        began = time.perf_counter()
        train(folder, 0, train_file=str(text), tokenizer_name="bpe", vocab_size=4096)
        seconds = time.perf_counter() - began
        row(f"{megabytes} MB", f"{seconds:.1f}", f"{megabytes / seconds:.1f}")
        text.unlink()


def over_vocabularies(folder: Path, options: argparse.Namespace) -> None:
    """Seconds of the whole command with one step, its tokenizer and tokens made before."""
    table("vocabulary", "parameters", "seconds from the command's start to its end")
    text = folder / "text.txt"
    write_text(text, 4 * 10**6)
    for size in VOCABULARIES:
        own: dict[str, Any] = {"tokenizer_name": "bpe", "vocab_size": size, "train_file": str(text)}
        train(folder, 0, **own)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            _, facts = train(folder, 0, **own)
            seconds.append(time.perf_counter() - began)
        row(f"{size:,}", f"{facts['num_parameters']:,}", f"{statistics.median(seconds):.1f}")


def on_paper(folder: Path, options: argparse.Namespace) -> None:
    """What no machine at hand can show: computed, not measured."""
    del folder, options
    print(
        f"\nComputed, not measured: bf16, {GPU_TOKENS:,} tokens on each GPU in a step, gradient"
        f" checkpointing, {GPU_FLOPS / 1e12:,.0f}e12 operations a second reached on each"
        f" GPU; links of {LINKS[8] / 1e9:,.0f} GB/s up to 8 GPUs, {LINKS[64] / 1e9:,.0f} GB/s"
        " beyond."
    )
    table(
        *("model", "backend", "GPUs", "weights, gradients, moments", "all memory of a GPU"),
        *("sent in a step", "seconds to send", "seconds to compute"),
    )
    for name, shape in GPU_MODELS.items():
        for backend in ("ddp", "zero1", "fsdp", "zero3"):
            for count in GPU_COUNTS:
                row(name, backend, f"{count:,}", *paper_cells(shape, backend, count))


def paper_cells(shape: ModelShape, backend: Any, count: int) -> Iterator[str]:
    state = shape.parameters * state_bytes_per_parameter(backend, count)
    kept = activation_bytes(shape, GPU_TOKENS, checkpointing=True)
    total = state + working_bytes(shape, backend) + kept
    sent = exchanged_bytes(shape, backend, count)
    attention = 12 * shape.layers * shape.hidden * GPU_BLOCK
    compute = (
        GPU_TOKENS * (8 / 6 * 6 * shape.parameters + attention) / GPU_FLOPS
    )  # one more forward
    yield f"{state / 1e9:,.1f} GB"
    yield f"{total / 1e9:,.1f} GB"
    yield f"{sent / 1e9:,.1f} GB"
    yield f"{sent / LINKS[count]:.2f}"
    yield f"{compute:.2f}"


def train(
    folder: Path, steps: int, *, launch: tuple[str, int] | None = None, **own: Any
) -> tuple[float, dict[str, Any]]:
    """A run of `train_llm.py`: its tokens per second (0 for a single step), and its facts."""
    output = Path(tempfile.mkdtemp(dir=folder))
    settings: dict[str, Any] = {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 8192},
        "dropout": 0.0,
        "train_file": "${PYTHON_STDLIB}/*.py",
        "tokenizer_name": "byte",
        "block_size": 256,
        "per_device_train_batch_size": 8,
        "max_steps": WARMUP_STEPS + steps if steps else 1,
        "logging_steps": 1,
        "eval_steps": None,
        "save_steps": None,
        "report_to": ["none"],
        "cache_dir": str(folder / "token_cache"),
        "output_dir": str(output),
    } | own
    if settings["tokenizer_name"] == "bpe":
        settings["config_overrides"] = {"n_layer": 6, "n_embd": 384, "n_head": 6}
    path = output.with_suffix(".json")
    path.write_text(json.dumps(settings))
    command = [sys.executable]
    if launch:
        config = ROOT / "accelerate_configs" / f"{launch[0]}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(launch[1])]
    command += [str(ROOT / "train_llm.py"), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stdout}\n{ended.stderr}")
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    facts = json.loads((output / "provenance.json").read_text())
    times = [line["time"] for line in lines if "train/loss" in line][WARMUP_STEPS - 1 :]
    if len(times) < 2:
        return 0.0, facts
    tokens = settings["block_size"] * settings["per_device_train_batch_size"]
    tokens *= launch[1] if launch else 1
    return tokens * (len(times) - 1) / (times[-1] - times[0]), facts


def write_text(path: Path, num_bytes: int) -> None:
    """Python's own library source, over and over until it is long enough."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    with path.open("wb") as file:
        while True:
            for source in sources:
                file.write(source.read_bytes()[: num_bytes - file.tell()])
                if file.tell() >= num_bytes:
                    return


def speeds(tokens_per_second: float, tokens: int) -> tuple[str, str]:
    return f"{tokens_per_second:,.0f}", f"{1000 * tokens / tokens_per_second:,.0f}"


def table(*heads: str) -> None:
    print()
    row(*heads)
    row(*("---" for _ in heads))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
