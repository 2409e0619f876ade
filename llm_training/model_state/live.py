"""Puts whole tensors into the model and the optimizer of a run, whatever its backend made of them.

Every rank calls everything here, with the same tensors; each keeps its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from llm_training.model_state.form import parameters_by_name
from llm_training.model_state.readers import MOMENTS, MUON_MOMENTS
from llm_training.parameter_patterns import RATE_FACTOR


class LiveModel:
    """Model and optimizer of one process, DDP, FSDP2 or tensor parallelism.

    Args:
        model: as Accelerate prepared it.
        optimizer: torch's own optimizer inside Accelerate's; None: only weights are set.

    Attributes:
        parameters: by plain name; tied ones once.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass whole copies stand in for its own parts
        self.model = model
        self.optimizer = optimizer
        self.parameters = parameters_by_name(model)
        self._steps: Mapping[str, float] = {}
        self._state: dict[str, dict[str, Any]] = {}

    @property
    def optimizer_parameters(self) -> list[str]:
        """Names of the parameters as the optimizer numbers them, over all its groups."""
        assert self.optimizer is not None
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        groups = self.optimizer.param_groups
        return [names[id(parameter)] for group in groups for parameter in group["params"]]

    @property
    def has_one_rate(self) -> bool:
        """Whether the optimizer orders its parameters as it does without rates of their own."""
        assert self.optimizer is not None
        return not any(RATE_FACTOR in group for group in self.optimizer.param_groups)

    @property
    def is_quantized(self) -> bool:
        """Whether the optimizer keeps its moments in 8 bits, in a form of its own."""
        return type(self.optimizer).__module__.startswith("bitsandbytes")

    def moments(self) -> dict[str, tuple[str, ...]]:
        """Which moments the optimizer keeps of each parameter that it trains, by name."""
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        kinds = [MUON_MOMENTS if "ns_steps" in g else MOMENTS for g in groups for _ in g["params"]]
        return dict(zip(self.optimizer_parameters, kinds, strict=True))

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a parameter, however it is cut."""
        return self.parameters[name].shape

    def begin(self) -> None:
        """Before the first weight is set."""

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Copies a parameter, whole and on the device of the run, into this rank's part."""
        with torch.no_grad():
            parameter = self.parameters[name]
            local_part(parameter).copy_(local_part(_cut_like(whole, parameter)))

    def finish(self) -> None:
        """After the last weight was set."""

    def begin_optimizer(self, steps: Mapping[str, float]) -> None:
        """Before the moments; the parameters in `steps` were updated so many times."""
        self._steps, self._state = steps, {}

    def set_moment(self, name: str, kind: str, whole: Tensor) -> None:
        """Takes one of the moments of a parameter, whole and on the device of the run."""
        values = self._state.setdefault(name, {})
        if name in self._steps:
            values["step"] = torch.tensor(self._steps[name], dtype=torch.float32)
        values[kind] = _cut_like(whole, self.parameters[name])

    def finish_optimizer(self) -> None:
        """After the last moment."""
        self.set_optimizer_state(self._state)
        self._state = {}

    def set_optimizer_state(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Gives the optimizer this rank's parts by name; its settings stay those of this run."""
        assert self.optimizer is not None
        numbered = {i: state[n] for i, n in enumerate(self.optimizer_parameters) if n in state}
        groups = self.optimizer.state_dict()["param_groups"]
        # Puts steps and moments on the device and into the type that the kernel wants.
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


class LiveZero:
    """Model and optimizer inside a DeepSpeed engine, ZeRO stage 1, 2 or 3.

    ZeRO keeps float32 weights and moments as flat parts of whole groups, and beside them the
    weights that compute, in the precision of the run. The former are set, the latter follow.
    """

    def __init__(self, engine: Any):
        self.zero = engine.optimizer
        self.is_stage_3 = bool(engine.zero_optimization_partition_weights())
        self.model: nn.Module = engine.module
        self.parameters = parameters_by_name(engine.module)

    def moments(self) -> dict[str, tuple[str, ...]]:
        """Which moments the optimizer keeps of each parameter that it may train, by name."""
        return dict.fromkeys(self.parameters, MOMENTS)

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a parameter, however it is cut."""
        parameter: Any = self.parameters[name]
        return parameter.ds_shape if self.is_stage_3 else parameter.shape

    def begin(self) -> None:
        """Before the first weight is set."""
        if self.is_stage_3:
            self.zero.checkpoint_event_prologue()  # cuts the small weights, which are kept whole

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Copies a parameter, whole and on the device of the run, into this rank's part."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = self.parameters[name]
        if self.is_stage_3:
            safe_set_local_fp32_param(parameter, _own_part(whole, parameter))
        else:
            safe_set_full_fp32_param(parameter, whole)

    def finish(self) -> None:
        """After the last weight was set: the weights that compute become copies of them."""
        if self.is_stage_3:
            for number in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
            self.zero.checkpoint_event_epilogue()  # and puts them together again
        else:
            self.zero.update_lp_params()

    def begin_optimizer(self, steps: Mapping[str, float]) -> None:
        """Before the moments of the parameters in `steps`, which were updated so many times.

        ZeRO counts once for a group, so the counts must be equal.
        """
        optimizer = self.zero.optimizer
        optimizer.state.clear()
        if not self.is_stage_3:
            self.zero._hp_optimizer_states_linked = False
        if not steps:
            return  # saved before the first update
        (step,) = set(steps.values())
        for flat in self._flat_parts():
            # Offloading brings an optimizer of its own, which counts in integers.
            count: Any = int(step)
            if isinstance(optimizer, torch.optim.AdamW):
                is_fused = bool(optimizer.param_groups[0].get("fused"))
                device = flat.device if is_fused else torch.device("cpu")
                count = torch.tensor(step, dtype=torch.float32, device=device)
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            optimizer.state[flat] = {"step": count} | moments
        if not self.is_stage_3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def set_moment(self, name: str, kind: str, whole: Tensor) -> None:
        """Copies one of the `MOMENTS` of a parameter into this rank's part."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self.parameters[name]
        if self.is_stage_3:
            safe_set_local_optimizer_state(parameter, _own_part(whole, parameter), kind)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)

    def finish_optimizer(self) -> None:
        """After the last moment."""

    def _flat_parts(self) -> Iterator[Tensor]:
        if self.is_stage_3:
            yield from self.zero.fp32_partitioned_groups_flat
        else:
            for group in self.zero.optimizer.param_groups:
                yield from group["params"]


def _cut_like(whole: Tensor, reference: Tensor) -> Tensor:
    """What `reference` holds of a whole tensor on this rank; no rank asks another."""
    if not isinstance(reference, DTensor):
        return whole
    mesh = reference.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=reference.placements)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _own_part(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a ZeRO-3 parameter: equal parts, the last filled up with zeros."""
    group = parameter.ds_process_group
    size, rank = parameter.partition_numel(), distributed.get_rank(group)
    flat = whole.flatten()
    padding = size * distributed.get_world_size(group) - flat.numel()
    return nn.functional.pad(flat, (0, padding))[rank * size : (rank + 1) * size]
