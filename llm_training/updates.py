"""The end of a step: the backward pass, and an update that can still be left out.

A step whose gradient norm nobody wants must leave everything as it was. Most backends update when
they are told to; DeepSpeed does so within Accelerate's backward pass, before its norm is known.
Here the two are apart on every backend: `backward` for each micro-batch, then, after the last one,
`finish_step`, or `drop_gradients` where the loss alone says that nothing good can come. Even then
every backward pass runs: sharding backends tidy up in the last one.

A GPU that the host asks for a number after every step stands still until the host has prepared the
next one. Where the optimizer allows it, `finish_step_unseen` lets the device itself decide whether
to update, and its numbers are read while it computes the next step.
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
    # At an overflow torch calls a fused optimizer all the same, which then does nothing.
    return StepOutcome(grad_norm, is_applied=not (is_overflow or optimizer.step_was_skipped))


@dataclass(frozen=True)
class Limits:
    """The largest mean loss, in nats per token, and gradient norm of a step that is applied."""

    loss: float
    grad_norm: float


class UnseenStep:
    """A step whose numbers are on their way from the device."""

    def __init__(self, numbers: Tensor, shares: list[tuple[str, float]]):
        """Begins to fetch the numbers.

        Args:
            numbers: (4 + P,) float64 on the device: the summed and the mean loss, the gradient
                norm, whether the step was applied, and the norm of what this rank holds of each of
                P gradients.
            shares: of each gradient, its layer and what its squared norm is multiplied by.
        """
        self._shares = shares
        self._event = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, float, StepOutcome]:
        """The summed and the mean loss over all ranks, as the device has them, and the outcome.

        It waits for this step, not for what the device has been given since.
        """
        if self._event is not None:
            self._event.synchronize()
        loss_sum, loss, norm, is_applied = self._numbers[:4].tolist()
        return loss_sum, loss, StepOutcome(norm, bool(is_applied))

    def norms_by_layer(self, accelerator: Accelerator) -> dict[str, float]:
        """As `norms_by_layer`, of the gradients that this step had; every rank must call it."""
        self.read()
        squares: dict[str, float] = defaultdict(float)
        for (layer, share), norm in zip(self._shares, self._numbers[4:].tolist(), strict=True):
            squares[layer] += norm**2 * share
        return _roots_of_sums(accelerator, squares)


def can_finish_unseen(accelerator: Accelerator, optimizer: AcceleratedOptimizer) -> bool:
    """Whether the device can decide alone to update; it pays where it works while the host goes on.

    torch's fused AdamW can leave an update out by a number on the device: what fp16's loss scaler
    uses. With that scaler itself, and with all other optimizers, the host must decide.
    """
    inner = optimizer.optimizer
    is_fused_adamw = isinstance(inner, torch.optim.AdamW) and bool(inner.defaults["fused"])
    if accelerator.device.type != "cuda" or not is_fused_adamw or accelerator.scaler is not None:
        return False
    # With FSDP2's offloading the weights lie on the host, where the update is computed then.
    return all(p.device.type == "cuda" for group in inner.param_groups for p in group["params"])


def finish_step_unseen(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    max_norm: float | None,
    *,
    loss_sum: Tensor,
    num_tokens: int,
    limits: Limits,
) -> UnseenStep:
    """As `finish_step`, but the host does not wait to learn how the step ends.

    Args:
        loss_sum: () float32, the loss of this rank's part of the step, in nats.
        num_tokens: predicted tokens of the step over all ranks, at least 1.
        limits: a step above either, or with a number that is not finite, is left out.
    """
    parameters = _parameters_by_mesh(model)
    local_norms = _local_norms(model)
    if list(parameters) == [
        None
    ]:  # no gradient lies in parts: its norms need not be computed again
        own_norm = torch.linalg.vector_norm(local_norms)
    else:
        own_norm = _norm_of_groups(list(parameters.values()))
    found = torch.stack([loss_sum.double(), own_norm.double()]).reshape(1, 2)
    if accelerator.num_processes > 1:
        found = accelerator.gather(found)
    # Where one rank has another norm than the rest, all take the worst: they must decide alike.
    loss_sum = found[:, 0].sum() / tensor_parallel_size(accelerator)
    norm = found[:, 1].max()
    loss = loss_sum / num_tokens
    is_good = loss.isfinite() & (loss <= limits.loss)
    is_good &= norm.isfinite() & (norm <= limits.grad_norm)
    numbers = torch.stack([loss_sum, loss, norm, is_good.double()])
    unseen = UnseenStep(torch.cat([numbers, local_norms.double()]), _shares(accelerator, model))
    if max_norm is not None:
        _clip(parameters, max_norm, norm.float())
    inner: Any = optimizer.optimizer
    inner.found_inf = (~is_good).float()
    try:
        optimizer.step()
    finally:
        inner.found_inf = None
    optimizer.zero_grad()
    return unseen


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
    return _roots_of_sums(accelerator, squares)


def _roots_of_sums(accelerator: Accelerator, squares: dict[str, float]) -> dict[str, float]:
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


def _norm_of_groups(groups: list[list[nn.Parameter]]) -> Tensor:
    """Norm over all groups, () float32; to the bit that of `accelerator.clip_grad_norm_`."""
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _global_norm(accelerator: Accelerator, groups: list[list[nn.Parameter]]) -> Tensor:
    """The same on every rank.

    Where one rank has another norm than the rest, all take the worst: they must decide alike.
    """
    norm = _norm_of_groups(groups)
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
        if parameter.grad is not None:
            share = _share_in_sums(accelerator, parameter.grad)
            yield parameter, _norm(_local(parameter.grad)) ** 2 * share


def _local_norms(model: nn.Module) -> Tensor:
    """Norms (P,) of what this rank holds of each gradient, in the order of the parameters."""
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients))


def _shares(accelerator: Accelerator, model: nn.Module) -> list[tuple[str, float]]:
    """For each of these norms its layer, and what its square counts in the sum over the ranks."""
    return [
        (_layer_of(name), _share_in_sums(accelerator, parameter.grad))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]


def _share_in_sums(accelerator: Accelerator, gradient: Tensor) -> float:
    """1 over the number of ranks that hold the same part of a gradient."""
    copies = accelerator.num_processes
    if isinstance(gradient, DTensor):
        sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        copies //= math.prod(size for size, placement in sizes if placement.is_shard())
    # `sum_over_ranks` divides by this: for it, the ranks that hold one model all hold the same.
    return tensor_parallel_size(accelerator) / copies


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


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
