"""The end of a step: the backward pass, and an update that can still be left out.

A step whose gradient norm nobody wants must leave everything as it was. Most backends update when
they are told to; DeepSpeed does so within Accelerate's backward pass, before its norm is known.
Here the two are apart on every backend: `backward` for each micro-batch, then, after the last one,
`finish_step`, or `drop_gradients` where the loss alone says that nothing good can come. Even then
every backward pass runs: sharding backends tidy up in the last one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llm_training.ranks import sum_over_ranks, tensor_parallel_size

# What DDP and torch.compile put into the names of parameters.
WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, the same on every rank; NaN or infinite
            where they are broken.
        is_applied: whether the weights were updated.
    """

    grad_norm: float
    is_applied: bool


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor) -> None:
    """The backward pass of one micro-batch; no backend updates a weight in it.

    Args:
        model: what Accelerate has prepared.
        loss: already multiplied by `ranks.gradient_factor`.
    """
    if not _is_deepspeed(accelerator):
        accelerator.backward(loss)
        return
    # As Accelerate does, but for its last line, which is the update.
    engine: Any = model
    engine.set_gradient_accumulation_boundary(is_boundary=accelerator.sync_gradients)
    engine.backward(loss, scale_wrt_gas=False)


def finish_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    max_norm: float | None,
    accept: Callable[[float], bool],
) -> StepOutcome:
    """Clips and updates, or leaves the step out; every rank calls this after the last micro-batch.

    A step that is left out leaves weights, moments, step counts and loss scale as they were. Steps
    that overflow in fp16 are the loss scaler's: it leaves them out and lowers its scale, and
    `accept` is not asked, since the scale was too high and nothing is wrong with the data.

    Args:
        max_norm: limit of the gradient norm, None for none. DeepSpeed has its own, in its
            configuration (`launch.fill_deepspeed_config`).
        accept: asked once on each rank with the same norm, while the gradients are still there. A
            norm that is not finite is never applied, whatever the answer.
    """
    if _is_deepspeed(accelerator):
        return _finish_engine_step(model, accept)
    accelerator.unscale_gradients()
    parameters = _parameters_by_mesh(model)
    norm = _global_norm(accelerator, list(parameters.values()))
    grad_norm, scaler = float(norm), accelerator.scaler
    is_overflow = scaler is not None and not math.isfinite(grad_norm)
    if not is_overflow and not _is_accepted(grad_norm, accept):
        if scaler is not None:
            scaler.update(scaler.get_scale())  # forgets this step; the same scale stays
        drop_gradients(accelerator, model, optimizer)
        return StepOutcome(grad_norm, is_applied=False)
    if max_norm is not None:
        _clip(parameters, max_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return StepOutcome(grad_norm, is_applied=not optimizer.step_was_skipped)


def drop_gradients(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer
) -> None:
    """In place of `finish_step`: leaves the step out unseen; every rank must do so."""
    if _is_deepspeed(accelerator):
        _drop_engine_gradients(model)
    else:
        optimizer.zero_grad()


def norms_by_layer(accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
    """The gradient norm of each block of the model, of the blocks' neighbours each on its own.

    For the inquiry into a bad step, from within `accept`. Every rank must call it: each adds up
    what it holds, and one exchange of a number for each layer makes them global, on all backends.
    """
    squares: dict[str, float] = defaultdict(float)
    names = {id(parameter): _layer_of(name) for name, parameter in model.named_parameters()}
    for layer in names.values():
        squares[layer] = 0.0  # so that the ranks have the same layers in the same order
    parts = _engine_squares(model) if _is_deepspeed(accelerator) else _squares(accelerator, model)
    for parameter, square in parts:
        squares[names[id(parameter)]] += square
    totals = sum_over_ranks(accelerator, *squares.values())
    return {layer: math.sqrt(total) for layer, total in zip(squares, totals, strict=True)}


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def _is_accepted(grad_norm: float, accept: Callable[[float], bool]) -> bool:
    return accept(grad_norm) and math.isfinite(grad_norm)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))


def _layer_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is of `model.layers.3`, `lm_head.weight` of `lm_head`."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:-1])


# --------------------------------------------------------------------- gradients that torch keeps


def _parameters_by_mesh(model: nn.Module) -> dict[Any, list[nn.Parameter]]:
    """Parameters with a gradient: those in parts by the mesh they lie on, then the whole ones."""
    meshes: dict[Any, list[nn.Parameter]] = defaultdict(list)
    whole: list[nn.Parameter] = []
    for parameter in model.parameters():
        if isinstance(parameter.grad, DTensor):
            meshes[parameter.grad.device_mesh].append(parameter)
        elif parameter.grad is not None:
            whole.append(parameter)
    return {**meshes, None: whole} if whole or not meshes else dict(meshes)


def _global_norm(accelerator: Accelerator, groups: list[list[nn.Parameter]]) -> Tensor:
    """Norm over all groups, () float32; to the bit that of `accelerator.clip_grad_norm_`.

    Where one rank has another norm than the rest, all take the worst: they must decide alike.
    """
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if accelerator.num_processes > 1:
        # On the device of the exchange, which offloaded gradients are not on; NaN is the maximum.
        norm = accelerator.gather(norm.to(accelerator.device).reshape(1)).max().to(norm.device)
    return norm


def _clip(parameters: dict[Any, list[nn.Parameter]], max_norm: float, norm: Tensor) -> None:
    for mesh, group in parameters.items():
        known = norm if mesh is None else DTensor.from_local(norm, mesh)
        clip_grads_with_norm_(group, max_norm, known)


def _squares(accelerator: Accelerator, model: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """Squared norms of what this rank holds, so shared out that their sum over ranks is right."""
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        copies = accelerator.num_processes
        if isinstance(gradient, DTensor):
            sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            copies //= math.prod(size for size, placement in sizes if placement.is_shard())
            gradient = gradient.to_local()
        # `sum_over_ranks` divides by this: for it, the ranks that hold one model all hold the same.
        yield parameter, _norm(gradient) ** 2 / copies * tensor_parallel_size(accelerator)


# ----------------------------------------------------------------- gradients that DeepSpeed keeps


def _finish_engine_step(engine: Any, accept: Callable[[float], bool]) -> StepOutcome:
    grad_norm = _engine_norm(engine)
    is_overflow = engine.fp16_enabled() and not math.isfinite(grad_norm)
    if not is_overflow and not _is_accepted(grad_norm, accept):
        _drop_engine_gradients(engine)
        return StepOutcome(grad_norm, is_applied=False)
    engine.step()
    return StepOutcome(grad_norm, is_applied=engine.was_step_applied())


def _engine_norm(engine: Any) -> float:
    """The norm that `engine.step` will clip by, the same on every rank.

    DeepSpeed tells it only after the update, so it is computed twice: this rank's share of the
    gradients is read once more, which the update does several times, and a number is exchanged.
    """
    from deepspeed.runtime import utils

    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        norm = utils.combine_grad_norm_groups(optimizer._get_norm_groups())
    elif _sums_in_fp32(optimizer):
        gradients, _ = optimizer.get_grads_for_norm()
        norm = utils.get_global_norm_of_tensors(gradients, optimizer.norm_type, optimizer.mpu)
    else:
        norm = optimizer.scaled_global_norm()
    if utils.is_invalid_grad_norm(norm):  # NaN or infinite in any group
        return math.inf
    return float(norm / _loss_scale(optimizer))


def _drop_engine_gradients(engine: Any) -> None:
    """What DeepSpeed does where a step overflows, without a new loss scale and its counters."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._pre_step()
        optimizer.empty_partition_cache()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        return
    optimizer.zero_grad()
    if _sums_in_fp32(optimizer):
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID  # the next gradient replaces what lies there
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
        optimizer.all_grad_tensors[group] = None


def _engine_squares(engine: Any) -> Iterator[tuple[nn.Parameter, float]]:
    """Squared norms of this rank's share of each gradient, once all have been exchanged."""
    optimizer, is_cut = engine.optimizer, engine.zero_optimization_stage() == 3
    if _sums_in_fp32(optimizer):  # every rank has all of them
        for group, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, part in zip(group, sums, strict=True):
                yield parameter, _norm(part) ** 2 / engine.dp_world_size
        return
    scale = _loss_scale(optimizer)
    groups = optimizer.fp16_groups if is_cut else optimizer.params_in_partition
    if optimizer.offload_optimizer if is_cut else optimizer.cpu_offload:
        known = optimizer.norm_for_param_grads
        for parameter in (p for group in groups for p in group):
            yield parameter, float(known.get(optimizer.get_param_id(parameter), 0.0) / scale) ** 2
        return
    for number, group in enumerate(groups):
        gradients = optimizer.averaged_gradients[number]
        parts = [part for part in gradients if not getattr(part, "_zero_padding", False)]
        for parameter, part in zip(group, parts, strict=False):  # padding may follow
            yield parameter, (_norm(part) / scale) ** 2


def _sums_in_fp32(optimizer: Any) -> bool:
    """Whether this is the optimizer of ZeRO-1 in bf16 with `grad_accum_dtype` fp32."""
    return hasattr(optimizer, "fp32_groups_gradients")


def _loss_scale(optimizer: Any) -> float:
    return float(getattr(optimizer, "loss_scale", 1.0))
