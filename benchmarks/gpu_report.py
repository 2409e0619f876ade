"""What `gpu_training.py` found, as a page of Markdown, and the machine that it was found on."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.steady_state import Result, median_of, ratio_line

if TYPE_CHECKING:
    from benchmarks.gpu_training import Task

NAMED_PACKAGES = {
    **{name: name for name in ("torch", "triton", "accelerate", "transformers", "numpy", "psutil")},
    **{name: name for name in ("safetensors", "xxhash", "torchao", "bitsandbytes")},
    "liger_kernel": "liger-kernel",
}
COMPARED_WITH = ("nanogpt_like", "nanogpt_like_eager", "eager")
# In a process of its own, so that this one takes no memory on the card.
ASK_CARD = (
    "import torch; card = torch.cuda.get_device_properties(0);"
    "print(f'{card.name}|{card.total_memory / 2**30:.0f} GiB, compute capability"
    " {card.major}.{card.minor}, CUDA {torch.version.cuda}')"
)


@dataclass
class Findings:
    """All that is known so far: results by variant and round, and why others have none."""

    facts: dict[str, Any]
    task: Task
    options: argparse.Namespace
    failures: dict[str, str]
    results: dict[str, dict[int, Result]] = field(default_factory=dict)


def describe_machine(device: str) -> dict[str, Any]:
    """The device by the name that its driver gives it, and the versions of what is installed."""
    versions = {}
    for name, distribution in NAMED_PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    name, about = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", ""
    if device == "cuda":
        asked = subprocess.run([sys.executable, "-c", ASK_CARD], capture_output=True, text=True)
        if asked.returncode:
            sys.exit(
                "gpu_training.py: torch finds no CUDA device here:"
                f" {asked.stderr.strip().splitlines()[-1]}. --quick tries it out on a CPU."
            )
        name, _, about = asked.stdout.strip().partition("|")
    return {"device": name, "about": about, "versions": versions}


def report(findings: Findings) -> str:
    """The whole page."""
    task, options, facts = findings.task, findings.options, findings.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    tokens = task.micro_batch * task.accumulation * task.block_size
    name = "the trial's small sizes" if options.quick else options.model
    lines = [
        f"# Training on a GPU: {name}",
        "",
        f"`python {shlex.join(sys.argv)}`, {facts['device']}"
        + (f" ({facts['about']})" if facts["about"] else "")
        + f". Python {platform.python_version()}, {versions}.",
        "",
        f"{task.model_type} {task.sizes}, {task.vocab_size:,} tokens, no dropout. A step is"
        f" {task.micro_batch} rows x {task.accumulation} x {task.block_size} = {tokens:,} tokens;"
        f" {options.steps} steps are measured, after {options.warmup_steps}.",
        "",
        *rate_table(findings),
        *ratio_tables(findings),
        *failure_table(findings),
    ]
    return "\n".join(lines).rstrip() + "\n"


def rate_table(findings: Findings) -> list[str]:
    lines = ["| variant | tokens/s | MFU | peak memory | rounds |", "|---|---|---|---|---|"]
    for name, rounds in findings.results.items():
        found = list(rounds.values())
        rate, peak = median_of(found, "tokens_per_second"), median_of(found, "peak_bytes")
        mfu = utilization_of(findings, rate)
        lines.append(f"| {name} | {rate:,.0f} | {mfu} | {peak / 2**30:.2f} GiB | {len(found)} |")
    return lines


def utilization_of(findings: Findings, rate: float) -> str:
    """MFU at so many tokens per second; all variants train the same model."""
    from llm_training.flops import peak_flops

    known = (r.get("flops_per_token") for by in findings.results.values() for r in by.values())
    flops = next(filter(None, known), None)
    peak = peak_flops(findings.facts["device"], "bf16")
    return f"{rate * flops / peak:.3f}" if flops and peak else "unknown"


def ratio_tables(findings: Findings) -> list[str]:
    """Each of ours beside the peers and our own plain run, within the rounds that both had."""
    lines = []
    for other in COMPARED_WITH:
        theirs = findings.results.get(other, {})
        for name, ours in findings.results.items():
            shared = sorted(set(ours) & set(theirs))
            if shared and name not in (other, "nanogpt_like_eager"):
                mine = [ours[number] for number in shared]
                lines.append(ratio_line(name, other, mine, [theirs[number] for number in shared]))
    head = ["", "| variant | beside | tokens/s (ratio) | lowest | highest | peak memory (ratio) |"]
    return [*head, "|---|---|---|---|---|---|", *lines] if lines else []


def failure_table(findings: Findings) -> list[str]:
    if not findings.failures:
        return []
    lines = ["", "| failed or left out | why |", "|---|---|"]
    return lines + [f"| {name} | {why} |" for name, why in findings.failures.items()]
