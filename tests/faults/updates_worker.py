"""Trains a few steps, once as Accelerate would and once with steps in between that are left out.

    accelerate launch --config_file accelerate_configs/ddp.yaml updates_worker.py CASES OUTPUT

CASES and OUTPUT are those of `resume_worker.py`, with further actions: `plain` applies the good
steps alone, by Accelerate's own calls; `healthy` meets every fault of `FAULTS` between them;
`unseen` does the same with the device deciding alone; and `overflow` does so in fp16 under
DeepSpeed, whose loss scaler then has its say.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

import train_llm
from llm_training import updates
from llm_training.outputs import OutputFolder
from llm_training.ranks import gradient_factor, leave, sum_over_ranks
from tests.distributed.resume_worker import ACTIONS, main, read

GOOD_STEPS = 5
SAMPLES = 8  # of a step
BAD_POSITION = 80  # other samples than those of the good steps
# On one rank alone: a loss that is NaN, and a gradient that is infinite while the loss is not. On
# all: a healthy gradient that is not wanted. And where gradients lie in the parameters: a number of
# one rank's that turns into NaN after they have been exchanged.
FAULTS = ("loss", "gradient", "unwanted", "flipped")
Attempt = tuple[float, updates.StepOutcome, dict[str, float]]
# Where DeepSpeed's optimizers keep this rank's share of the weights in fp32.
MASTERS = (
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
    "single_partition_of_fp32_groups",
)


def build(words: list[str]) -> train_llm.Run:
    """A run at its first step."""
    arguments = read(words)
    run = train_llm.build_run(arguments, OutputFolder(str(arguments.output_dir)))
    train_llm.resume(run)
    return run


def plain(words: list[str]) -> dict[str, Any]:
    """The good steps, clipped and applied by Accelerate."""
    run = build(words)
    accelerator, limit = run.accelerator, run.arguments.max_grad_norm or math.inf
    options = {"scale_wrt_gas": False} if hasattr(run.model, "zero_optimization") else {}
    record: dict[str, Any] = {"losses": [], "norms": [], "states": []}
    for step in range(GOOD_STEPS):
        total = torch.zeros(())
        micro_batches, factor, _ = step_of(run, step * SAMPLES)
        for micro_batch in micro_batches:
            with accelerator.accumulate(run.model):
                loss, _ = run.model(**micro_batch)
                total += loss.detach()
                accelerator.backward(loss * factor, **options)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(run.model.parameters(), limit))
                run.optimizer.step()
                run.optimizer.zero_grad()
        record["losses"] += sum_over_ranks(accelerator, float(total))
        record["norms"].append(norm)
        record["states"].append(digest(run))
    return over_ranks(record)


def healthy(words: list[str], *, is_unseen: bool = False) -> dict[str, Any]:
    """The good steps, with one that is left out after each of them but the last."""
    run = build(words)
    attempt = attempt_unseen if is_unseen else attempt_seen
    record: dict[str, Any] = {name: [] for name in ("losses", "norms", "states", "left_out")}
    record["layers"] = []
    for step in range(GOOD_STEPS):
        loss, outcome, layers = attempt(run, step * SAMPLES)
        record["losses"].append(loss)
        record["norms"].append(outcome.grad_norm)
        record["states"].append(digest(run))
        record["layers"].append(layers)
        assert outcome.is_applied
        for fault in faults_under(run)[step : step + 1]:
            loss, outcome, layers = attempt(run, BAD_POSITION, fault)
            found = {"fault": fault, "loss": repr(loss), "norm": repr(outcome.grad_norm)}
            found |= {"is_applied": outcome.is_applied, "state": digest(run)}
            record["left_out"].append(found | {"num_broken": count_broken(layers)})
    return over_ranks(record)


def unseen(words: list[str]) -> dict[str, Any]:
    """As `healthy`, but whether a step is applied is decided on the device, and read later."""
    return healthy(words, is_unseen=True)


def faults_under(run: train_llm.Run) -> tuple[str, ...]:
    """The faults that the backend of this run can meet."""
    return FAULTS[:-1] if hasattr(run.model, "zero_optimization") else FAULTS


def overflow(words: list[str]) -> dict[str, Any]:
    """A good step, two whose gradients overflow on one rank, and the good step again.

    DeepSpeed keeps its scale at the first overflow, and halves it at the second.
    """
    import deepspeed

    # DeepSpeed's CPU can, if it is let; and the arguments refuse fp16 there.
    cpu = type(deepspeed.accelerator.get_accelerator())
    with (
        mock.patch.object(cpu, "is_fp16_supported", lambda _: True),
        mock.patch("llm_training.launch.choose_precision", lambda *_: "fp16"),
    ):
        run = build(words)
    engine: Any = run.model
    record: dict[str, Any] = {name: [] for name in ("norms", "applied", "asked", "scales")}
    for fault in ("", "gradient", "gradient", ""):
        _, outcome, layers = attempt_seen(run, 0, fault)
        record["norms"].append(outcome.grad_norm)
        record["applied"].append(outcome.is_applied)
        record["asked"].append(bool(layers))
        record["scales"].append(engine.optimizer.loss_scale)
    return over_ranks(record)


def attempt_seen(run: train_llm.Run, position: int, fault: str = "") -> Attempt:
    """One step; its summed loss, how it ended, and the norm of each layer where it came so far."""
    accelerator, asked, layers = run.accelerator, [], {}

    def accept(norm: float) -> bool:
        asked.append(norm)
        layers.update(updates.norms_by_layer(accelerator, run.model))
        return fault != "unwanted"

    total, _ = gradients(run, position, fault)
    (loss_sum,) = sum_over_ranks(accelerator, float(total))
    if not math.isfinite(loss_sum):
        updates.drop_gradients(accelerator, run.model, run.optimizer)
        return loss_sum, updates.StepOutcome(math.nan, False), layers
    outcome = updates.finish_step(
        accelerator, run.model, run.optimizer, run.arguments.max_grad_norm, accept
    )
    assert repr(asked) in (repr([outcome.grad_norm]), "[]")  # once; NaN is written like NaN
    return loss_sum, outcome, layers


def attempt_unseen(run: train_llm.Run, position: int, fault: str = "") -> Attempt:
    """The same by `finish_step_unseen`."""
    total, num_tokens = gradients(run, position, fault)
    step = updates.finish_step_unseen(
        run.accelerator,
        run.model,
        run.optimizer,
        run.arguments.max_grad_norm,
        loss_sum=total,
        num_tokens=num_tokens,
        limits=updates.Limits(math.inf, 0.0 if fault == "unwanted" else math.inf),
    )
    loss_sum, _, outcome = step.read()
    return loss_sum, outcome, step.norms_by_layer(run.accelerator)


def gradients(run: train_llm.Run, position: int, fault: str) -> tuple[Tensor, int]:
    """Forward and backward over a step, with a fault; this rank's loss, and all tokens."""
    accelerator, is_victim = run.accelerator, run.accelerator.process_index == 1
    micro_batches, factor, num_tokens = step_of(run, position)
    total = torch.zeros(())
    for micro_batch in micro_batches:
        with accelerator.accumulate(run.model):
            loss, _ = run.model(**micro_batch)
            if fault == "loss" and is_victim:
                loss = loss * math.nan
            total += loss.detach()
            loss = loss * factor
            if fault == "gradient" and is_victim:
                loss = loss * math.inf
            updates.backward(accelerator, run.model, loss)
    if fault == "flipped" and is_victim:
        gradient = next(run.model.parameters()).grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.view(-1)[0] = math.nan
    return total, num_tokens


def step_of(run: train_llm.Run, position: int) -> tuple[list[dict[str, Tensor]], float, int]:
    """Its micro-batches, what their summed loss is multiplied by, and all its tokens."""
    window = run.windows.window(position)
    num_tokens = train_llm.count_window_tokens(run, window)
    return window, gradient_factor(run.accelerator, len(window)) / num_tokens, num_tokens


def count_broken(layers: dict[str, float]) -> int:
    return sum(not math.isfinite(norm) for norm in layers.values())


def digest(run: train_llm.Run) -> str:
    """A hash over all that this rank holds of weights, optimizer, counters, and left gradients."""
    found = hashlib.sha256()
    for value in holdings(run):
        value = value.to_local() if isinstance(value, DTensor) else value
        content = value.detach().tolist() if isinstance(value, Tensor) else value
        found.update(repr(content).encode())
    return found.hexdigest()


def holdings(run: train_llm.Run) -> Iterator[Any]:
    for parameter in run.model.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
        yield parameter.grad
    optimizer: Any = run.optimizer.optimizer
    if hasattr(run.model, "zero_optimization"):
        engine: Any = run.model
        yield from (engine.global_steps, engine.skipped_steps, engine.micro_steps)
        yield getattr(optimizer, "micro_step_id", None)
        yield from next(getattr(optimizer, name) for name in MASTERS if hasattr(optimizer, name))
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        yield from (state[name] for name in sorted(state))


def over_ranks(record: dict[str, Any]) -> dict[str, Any]:
    """Each entry as a list of what the ranks have found."""
    found: list[Any] = [record]
    if distributed.is_initialized():
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, record)
    return {name: [one[name] for one in found] for name in record}


ACTIONS |= {"plain": plain, "healthy": healthy, "unseen": unseen, "overflow": overflow}


if __name__ == "__main__":
    main()
    leave(0)
