"""What a run says of itself: before it begins, to its reviewers, and when it has ended."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator

from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data import PreparedData
from llm_training.data.rows.store_rows import Rows
from llm_training.flops import model_flops_per_token, peak_flops
from llm_training.hub_metadata import published_line
from llm_training.launch import describe_threads, has_bf16
from llm_training.model_state import StateForm
from llm_training.modeling import count_parameters, count_trained
from llm_training.resume_classes import effect_of_change
from llm_training.samples import Sample, summary_of


def model_line(accelerator: Accelerator, network: CausalLMWithLoss) -> str:
    """What is trained, in which precision, on what."""
    parameters, outside_embeddings = count_parameters(network)
    device = accelerator.device.type
    precision = precision_name(accelerator)
    if device == "cpu":
        if precision == "bf16" and not has_bf16(device):
            precision = "bf16 (emulated, slower than fp32)"
        device += f", {describe_threads()}"
    form = StateForm.of_run(accelerator)
    if form.backend != "single":
        device += f", {form}"
    return (
        f"Model    {network.config.model_type}, {parameters:,} parameters, {outside_embeddings:,}"
        f" of them outside of embeddings; {precision} on {device}"
    )


def row_lines(train: Rows | None, validation: Mapping[str, Rows]) -> list[str]:
    """What becomes of every token in the rows of one epoch.

    Args:
        validation: by the name of the set, "" for the main one.
    """
    lines = []
    splits = [("train", train), ("validation", validation.get(""))]
    splits += [(f"validation ({name})", rows) for name, rows in validation.items() if name]
    for split, rows in splits:
        for source, account in (rows.accounts() if rows else {}).items():
            lines.append(f"{split}{f' ({source})' if source else ''}: {account.line()}")
    return lines


def full_ledger(
    data: PreparedData, train: Rows | None, validation: Mapping[str, Rows]
) -> dict[str, Any]:
    """What became of every document, and of every token in rows, in plain values."""
    ledger = _ledger(data, train, validation.get(""))
    if data.validation_sets:
        ledger["validation_sets"] = {
            name: _ledger(part, None, validation.get(name))
            for name, part in data.validation_sets.items()
        }
    return ledger


def _ledger(data: PreparedData, train: Rows | None, validation: Rows | None) -> dict[str, Any]:
    parts = data.parts or {"": data}
    return {
        "documents": {name: part.ledger.to_dict() for name, part in parts.items()},
        "rows": {
            split: {name: dataclasses.asdict(a) for name, a in rows.accounts().items()}
            for split, rows in (("train", train), ("validation", validation))
            if rows
        },
        "leakage": dataclasses.asdict(data.leakage) if data.leakage else None,
    }


def resume_lines(path: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """Where the run goes on, with which other arguments than before, and what follows from them."""
    lines = [f"Resume   from {path} at step {step:,}"]
    for name, (old, new) in changed.items():
        effect = effect_of_change(name)
        said = f"Changed  {name}: {old} at the last start, now {new}"
        lines.append(f"{said}: {effect}" if effect else said)
    return lines


def provenance(
    accelerator: Accelerator, data: PreparedData, network: CausalLMWithLoss, block_size: int
) -> dict[str, Any]:
    """What a run was besides its arguments: data, sizes, hardware, versions and revision."""
    parameters, outside_embeddings = count_parameters(network)
    return {
        "data_fingerprint": data.fingerprint,
        "train_tokens": data.num_tokens("train"),
        "validation_tokens": data.num_tokens("validation"),
        **_set_provenance(data),
        **_model_provenance(network),
        "num_parameters": parameters,
        "num_parameters_outside_embeddings": outside_embeddings,
        "num_trained_parameters": count_trained(network),
        "flops_per_token": model_flops_per_token(network, network.config, block_size),
        "device_name": device_name(accelerator),
        "precision": precision_name(accelerator),
        "backend": StateForm.of_run(accelerator).backend,
        "zero_stage": StateForm.of_run(accelerator).zero_stage,
        "num_processes": accelerator.num_processes,
        "threads_per_process": torch.get_num_threads(),
        "platform": platform.platform(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "accelerate_version": accelerate.__version__,
        "transformers_version": transformers.__version__,
        "git_revision": git_revision(),
    }


def _set_provenance(data: PreparedData) -> dict[str, Any]:
    """Size and fingerprint of each further validation set, where there are any."""
    sets = data.validation_sets
    if not sets:
        return {}
    return {
        "validation_set_tokens": {n: own.num_tokens("validation") for n, own in sets.items()},
        "validation_set_fingerprints": {name: own.fingerprint for name, own in sets.items()},
    }


def _model_provenance(network: CausalLMWithLoss) -> dict[str, Any]:
    """The commit on the hub that the model came from, where it did."""
    commit = getattr(network.config, "_commit_hash", None)
    return {} if commit is None else {"model_commit": commit}


def device_name(accelerator: Accelerator) -> str:
    """What the driver calls the device, or its type."""
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_of_all(accelerator: Accelerator) -> float | None:
    """Operations per second that all devices of the run could do; None where they are unknown."""
    precision = precision_name(accelerator)
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    peak = peak_flops(device_name(accelerator), precision)
    return None if peak is None else peak * accelerator.num_processes


def precision_name(accelerator: Accelerator) -> str:
    """The precision as the argument spells it."""
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def git_revision() -> str | None:
    """Commit of the running code, with "+changes" where files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if commit.returncode != 0:
            return None
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def summary_lines(result: dict[str, Any]) -> list[str]:
    """How a run ended, read off its result.json."""
    early = ", stopped early" if result["stopped_early"] else ""
    lines = [f"Done     {result['step']:,} steps{early}, {result['tokens']:,} tokens predicted"]
    if result["best_loss"] is not None:
        lines.append(
            f"Loss     {result['first_loss']:.4f} at the start, {result['last_loss']:.4f} at the"
            f" end, {result['best_loss']:.4f} at best (step {result['best_step']}): validation,"
            " nats per token"
        )
    best = result.get("best")
    if best is not None and best["metric"] != "eval/loss":
        lines.append(f"Best     {best['metric']} {best['value']:.4f} at step {best['step']}")
    if samples := result.get("samples"):
        width = shutil.get_terminal_size((100, 24)).columns
        lines += summary_of([Sample(**sample) for sample in samples], width)
    elif result.get("sample") is not None:  # of a run before there were several
        lines += ["Sample", *("    " + line for line in result["sample"].splitlines())]
    lines.append(f"Model    {result['model']}")
    lines += [published_line(noted)] if (noted := result.get("hub")) else []
    return [*lines, f"Review   {result['review']}"]
