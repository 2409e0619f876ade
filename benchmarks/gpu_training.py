"""Our tokens per second and peak memory on a GPU, beside a compact loop with what nanoGPT does.

    python benchmarks/gpu_training.py --output benchmarks/results/gpu_training.md       # 9 minutes
    python benchmarks/gpu_training.py --model llama_1b --variants compile_blocks compile_model
    python benchmarks/gpu_training.py --quick                                  # a trial on a CPU

In each round every variant trains on the same random tokens in a fresh process, one after the
other on the same card: `nanogpt_like` and `nanogpt_like_eager` are `nanogpt_like.py`, all others
`python train_llm.py` with the flags in `VARIANTS`. The first steps, in which is compiled, are left
out, by the clock of each one's log; a run is ended as soon as it has logged what is measured. A
variant that fails is told with its reason, and the others go on. Rounds are repeated while there
is time. Peak memory is what torch had allocated (on a CPU: what the process held).

The peer exists for GPT-2 alone; of LLaMA, ours are compared with each other. MFU is the share of
the data sheet's bf16 peak (`llm_training/flops.py`), of variants in 8 bits too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.gpu_report import Findings, describe_machine, report  # noqa: E402
from benchmarks.peak_memory import last_peak  # noqa: E402
from benchmarks.steady_state import Result, last_json  # noqa: E402

COMPILED = ("--torch_compile", "true")
WHOLE = (*COMPILED, "--torch_compile_scope", "model")
# Flags of ours by variant, the most telling first: where time ends, the last are left out.
VARIANTS: dict[str, tuple[str, ...]] = {
    "compile_model": WHOLE,
    "compile_blocks": COMPILED,
    "eager": (),
    "compile_model_free": (*WHOLE, "--deterministic", "false"),
    "reduce_overhead": (*WHOLE, "--torch_compile_mode", "reduce-overhead"),
    "mask_flex": (*COMPILED, "--attn_implementation", "flex_attention", "--document_mask", "true"),
    "fp8": (*WHOLE, "--mixed_precision", "fp8"),
    "adamw_8bit": (*COMPILED, "--optim", "adamw_8bit"),
    "liger": ("--use_liger_kernel", "true"),
}
PEERS = ("nanogpt_like", "nanogpt_like_eager")
EXTRA_PACKAGES = {"liger": "liger_kernel", "fp8": "torchao", "adamw_8bit": "bitsandbytes"}
PACKAGES = ("torch", "accelerate", "transformers", "numpy", "psutil", "safetensors", "xxhash")


@dataclass(frozen=True)
class Task:
    """What is trained: a model type with its sizes, and how many tokens at once."""

    model_type: str
    sizes: dict[str, int]
    vocab_size: int
    block_size: int
    micro_batch: int
    accumulation: int


TASKS = {
    "gpt2_124m": Task("gpt2", {"n_layer": 12, "n_head": 12, "n_embd": 768}, 50257, 1024, 16, 4),
    "llama_1b": Task(
        "llama",
        {
            "num_hidden_layers": 22,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        *(32000, 2048, 8, 2),
    ),
}
QUICK = Task("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64}, 500, 64, 4, 2)


class RunFailed(Exception):
    """One run came to nothing; the message says why."""


def main() -> None:
    options = parse_options()
    task = task_of(options)
    facts = describe_machine(options.device)
    if missing := [name for name in PACKAGES if name not in facts["versions"]]:
        sys.exit(f"gpu_training.py: not installed, and needed: {', '.join(missing)}")
    findings = Findings(facts, task, options, missing_variants(options.variants, facts))
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), task, num_tokens=options.tokens)
        measure(Path(folder), task, options, findings)
    print(report(findings))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TASKS, default="gpt2_124m")
    parser.add_argument("--micro_batch", type=int, help="rows in one forward pass")
    parser.add_argument("--accumulation", type=int, help="forward passes of a step")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, at most")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run")
    parser.add_argument("--warmup_steps", type=int, default=10, help="steps before them")
    parser.add_argument("--logging_steps", type=int, default=5, help="divides both")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole measurement")
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=(*PEERS, *VARIANTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="in the file trained on")
    parser.add_argument("--output", type=Path, help="a Markdown file that gets the results, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, on a CPU")
    options = parser.parse_args()
    if options.quick:
        options.device, options.rounds, options.tokens = "cpu", 1, 100_000
        options.steps, options.warmup_steps, options.logging_steps = 4, 2, 2
        options.variants = options.variants or ["nanogpt_like_eager", "eager"]
    if options.variants is None:
        options.variants = [PEERS[0], *VARIANTS, PEERS[1]]
    if options.model != "gpt2_124m":
        options.variants = [name for name in options.variants if name not in PEERS]
    if options.steps % options.logging_steps or options.warmup_steps % options.logging_steps:
        parser.error("--logging_steps must divide --steps and --warmup_steps")
    return options


def task_of(options: argparse.Namespace) -> Task:
    task = QUICK if options.quick else TASKS[options.model]
    return Task(
        task.model_type,
        task.sizes,
        task.vocab_size,
        task.block_size,
        options.micro_batch or task.micro_batch,
        options.accumulation or task.accumulation,
    )


def missing_variants(variants: Sequence[str], facts: dict[str, Any]) -> dict[str, str]:
    """Variants that cannot run here, and why."""
    return {
        name: f"{EXTRA_PACKAGES[name]} is not installed"
        for name in variants
        if name in EXTRA_PACKAGES and EXTRA_PACKAGES[name] not in facts["versions"]
    }


def write_tokens(folder: Path, task: Task, num_tokens: int) -> None:
    """Random ids in documents of 512 tokens on average."""
    import numpy as np

    generator = np.random.default_rng(0)
    end = task.vocab_size - 1
    tokens = generator.integers(0, end, num_tokens).astype(np.uint16)
    tokens[generator.random(num_tokens) < 1 / 512] = end
    tokens.tofile(folder / "train.bin")
    meta = {"dtype": "uint16", "vocab_size": task.vocab_size, "eos_token_id": end}
    (folder / "meta.json").write_text(json.dumps(meta))


def measure(folder: Path, task: Task, options: argparse.Namespace, findings: Findings) -> None:
    """Runs all variants in rounds until time is up; what is known is written after each run."""
    deadline = time.monotonic() + 60 * options.minutes
    lasted: dict[str, float] = {}
    for number in range(options.rounds):
        for name in options.variants:
            if name in findings.failures:
                continue
            seconds_left = deadline - time.monotonic()
            if seconds_left < lasted.get(name, 45 if options.device == "cuda" else 0):
                if number == 0:
                    findings.failures[name] = "there was no time left for it"
                continue
            began = time.monotonic()
            try:
                result = run_variant(folder, name, task, options, seconds_left)
                findings.results.setdefault(name, {})[number] = result
                said = f"{result['tokens_per_second']:,.0f} tokens/s"
            except (RunFailed, OSError, ValueError, LookupError) as error:
                # Whatever it left or did not leave behind: the others go on.
                findings.failures[name] = said = str(error)
            lasted[name] = time.monotonic() - began
            print(f"round {number + 1}: {name}: {said}, {lasted[name]:.0f} s", flush=True)
            if options.output:
                options.output.write_text(report(findings), encoding="utf-8")


def run_variant(
    folder: Path, name: str, task: Task, options: argparse.Namespace, seconds: float
) -> Result:
    """One run in a process of its own, in a folder that is gone afterwards.

    Raises:
        RunFailed: it ended without what is measured, or took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if name in PEERS:
            return run_peer(folder, Path(place), name == PEERS[0], task, options, seconds)
        return run_ours(folder, Path(place), VARIANTS[name], task, options, seconds)


def precision(options: argparse.Namespace) -> str:
    return "bf16" if options.device == "cuda" else "fp32"


def run_peer(
    folder: Path,
    place: Path,
    is_compiled: bool,
    task: Task,
    options: argparse.Namespace,
    seconds: float,
) -> Result:
    settings = {
        "store": str(folder / "train.bin"),
        "sizes": task.sizes | {"vocab_size": task.vocab_size, "block_size": task.block_size},
        "micro_batch": task.micro_batch,
        "accumulation": task.accumulation,
        "steps": options.steps,
        "warmup_steps": options.warmup_steps,
        "logging_steps": options.logging_steps,
        "device": options.device,
        "precision": precision(options),
        "is_compiled": is_compiled,
    }
    words = [str(ROOT / "benchmarks" / "nanogpt_like.py"), json.dumps(settings)]
    return last_json(run_process(words, folder, place, seconds))


def run_ours(
    folder: Path,
    place: Path,
    flags: Sequence[str],
    task: Task,
    options: argparse.Namespace,
    seconds: float,
) -> Result:
    """`python train_llm.py`, which is ended once it has logged the last step that counts."""
    output, peaks = place / "run", place / "peaks"
    last_step = options.warmup_steps + options.steps
    settings = {
        "model_type": task.model_type,
        "config_overrides": {**task.sizes, "vocab_size": task.vocab_size}
        | {"bos_token_id": task.vocab_size - 1, "eos_token_id": task.vocab_size - 1},
        "dropout": 0.0,
        "train_file": str(folder / "train.bin"),
        "validation_split_percentage": 0,
        "block_size": task.block_size,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.accumulation,
        "learning_rate": 6e-4,
        "max_steps": 10 * last_step,  # it shall not come to its end, where it would save
        "eval_steps": None,
        "save_steps": None,
        "logging_steps": options.logging_steps,
        "mixed_precision": precision(options),
        "report_to": "none",
        "device": options.device,
        "cache_dir": str(folder / "token_cache"),
        "output_dir": str(output),
    }
    (place / "run.json").write_text(json.dumps(settings))
    watched = [str(ROOT / "benchmarks" / "peak_memory.py"), str(peaks), options.device]
    script = [str(ROOT / "train_llm.py"), str(place / "run.json"), *flags]

    def is_done() -> bool:
        return last_step in logged_times(output) and last_peak(peaks) > 0

    run_process([*watched, *script], folder, place, seconds, is_done)
    times = logged_times(output)
    if last_step not in times:
        raise RunFailed(f"it ended before step {last_step}, the last that is measured")
    rows = options.steps * task.micro_batch * task.accumulation
    taken = times[last_step] - times[options.warmup_steps]
    flops = json.loads((output / "provenance.json").read_text())["flops_per_token"]
    return {
        "tokens_per_second": rows * task.block_size / taken,
        "peak_bytes": last_peak(peaks),
        "flops_per_token": flops,
    }


def logged_times(output: Path) -> dict[int, float]:
    """When each step was logged so far, in seconds."""
    log = output / "train_log.jsonl"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    whole_lines = text.rpartition("\n")[0].splitlines()
    lines = [json.loads(line) for line in whole_lines if "train/loss" in line]
    return {line["step"]: line["time"] for line in lines}


def run_process(
    words: list[str],
    folder: Path,
    place: Path,
    seconds: float,
    is_done: Callable[[], bool] = lambda: False,
) -> str:
    """Runs a script until it ends or is done; returns what it printed.

    Raises:
        RunFailed: it ended with an error or, with `is_done`, too early, or was not done in time.
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # for all rounds
    deadline = time.monotonic() + seconds
    with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=place,
            env=environment,
            stdout=out,
            stderr=err,
            process_group=0,
        )
        try:
            while process.poll() is None and not is_done():
                if time.monotonic() > deadline:
                    raise RunFailed(f"it was not done within {seconds:.0f} s")
                time.sleep(0.1)
        finally:
            end_with_children(process)
    if process.returncode and not is_done():
        raise RunFailed(reason(place / "err"))
    return (place / "out").read_text(errors="replace")


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the run's own process group: compilers, too."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reason(file: Path) -> str:
    """The last words of a run that failed, in one line."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines()]
    ours = [line for line in lines if line.startswith("train_llm.py:")]
    last = (ours or [line for line in lines if line] or ["it said nothing"])[-1]
    return last[:300].replace("|", "/")


if __name__ == "__main__":
    main()
