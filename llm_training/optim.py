"""The optimizers, which parameters each of them takes, and the learning rate set from outside.

What is not a matrix, and every embedding table, is AdamW's whatever `optim` says;
docs/optimizers.md tells why, and what is known of each choice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from arguments import OptimizationArguments
from llm_training.parameter_patterns import RATE_FACTOR, rate_factors
from llm_training.zero_init import whole_shape

# One kernel for the whole update; on CPU the other forms are four to seven times slower.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# A matrix then moves about as far as under AdamW, so that one learning rate and one weight decay
# serve both. The factor is 0.2 * sqrt(the longer side): the same for a matrix and its transpose,
# as GPT-2 stores them.
MATCH_ADAMW = "match_rms_adamw"
MUON_MOMENTUM = 0.95


class OptimizerError(ValueError):
    """The optimizer asked for cannot train here; the message says why and what to do."""


def check_optimizer(arguments: OptimizationArguments, device_type: str) -> None:
    """Makes sure that the optimizer asked for can work on the device of the run.

    Raises:
        OptimizerError: it cannot.
    """
    if arguments.optim == "adamw_8bit" and device_type != "cuda":
        raise OptimizerError(
            f"--optim adamw_8bit works on CUDA GPUs, and this run is on {device_type}: use --optim"
            " adamw."
        )


def build_optimizer(
    model: nn.Module, arguments: OptimizationArguments, device_type: str
) -> torch.optim.Optimizer:
    """The optimizer that `arguments.optim` names, over `model`'s trained parameters.

    Args:
        model: before it is prepared.
        device_type: of the run; AdamW is fused where the device has it.

    Raises:
        OptimizerError: it cannot train this model, or not here.
        PatternError: one of `learning_rate_factors` fits nothing that is trained.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).
    """
    check_optimizer(arguments, device_type)
    factors = rate_factors(model, arguments.learning_rate_factors)
    if arguments.optim == "muon":
        return _build_muon(model, arguments, device_type, factors)
    groups = _groups(*split_by_decay(model), arguments.weight_decay, factors)
    if arguments.optim == "adamw_8bit":
        return _build_adamw_8bit(model, groups, arguments)
    return _build_adamw(groups, arguments, device_type)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group the rate times its factor (`learning_rate_factors`), which is mostly 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


# ------------------------------------------------------------------------------ which parameters


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters with and without weight decay; each stands in one of the lists once.

    Decayed are the weight matrices. Not decayed are vectors (norms, biases), for which zero is no
    natural rest, and embedding tables, whose rare rows would fade between the few steps that use
    them. A head tied to the embedding is the embedding; an untied head is a matrix.
    """
    tables = {id(parameter) for parameter in _embedding_tables(model)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = len(whole_shape(parameter)) >= 2 and id(parameter) not in tables
            (decayed if is_matrix else kept).append(parameter)
    return decayed, kept


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices inside the numbered blocks of a model: what Muon is made for.

    A head and what lies before the first block are not among them, tied or not; no embedding
    table is, wherever it lies; and nothing with more than two dimensions, as the experts of a
    mixture that are stored as one tensor. Fused matrices (query, key and value in one) count as
    the one matrix that they are.
    """
    decayed = {id(parameter) for parameter in split_by_decay(model)[0]}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in decayed
        and parameter.ndim == 2
        and any(word.isdigit() for word in name.split("."))
    ]


def _embedding_tables(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()


def _groups(
    decayed: Sequence[nn.Parameter],
    kept: Sequence[nn.Parameter],
    weight_decay: float,
    factors: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Parameter groups by decay and by the factor of their rate; none is empty.

    One kernel takes either whole tensors or, in tensor parallelism, parts of them: not both.

    Args:
        factors: by `id`, as `rate_factors` has them.
    """
    groups: list[dict[str, Any]] = []
    for parameters, decay in ((decayed, weight_decay), (kept, 0.0)):
        for is_part in (False, True):
            alike = [p for p in parameters if isinstance(p, DTensor) == is_part]
            for factor in dict.fromkeys(factors.get(id(p), 1.0) for p in alike):
                own = [p for p in alike if factors.get(id(p), 1.0) == factor]
                named = {} if factor == 1 else {RATE_FACTOR: factor}
                groups.append({"params": own, "weight_decay": decay, **named})
    return groups


# ------------------------------------------------------------------------------- the optimizers


def _build_adamw(
    groups: list[dict[str, Any]], arguments: OptimizationArguments, device_type: str
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=device_type in FUSED_DEVICES,
    )


def _build_muon(
    model: nn.Module,
    arguments: OptimizationArguments,
    device_type: str,
    factors: Mapping[int, float],
) -> MuonWithAdamW:
    matrices = block_matrices(model)
    if not matrices:
        raise OptimizerError(
            "--optim muon finds no trained matrix in the blocks of this model: use --optim adamw."
        )
    taken = {id(parameter) for parameter in matrices}
    decayed, kept = split_by_decay(model)
    others = [parameter for parameter in decayed if id(parameter) not in taken]
    rest = _groups(others, kept, arguments.weight_decay, factors)
    muon = torch.optim.Muon(
        _groups(matrices, [], arguments.weight_decay, factors),
        lr=arguments.learning_rate,
        momentum=MUON_MOMENTUM,
        nesterov=True,
        adjust_lr_fn=MATCH_ADAMW,
    )
    return MuonWithAdamW(muon, _build_adamw(rest, arguments, device_type) if rest else None)


def _build_adamw_8bit(
    model: nn.Module, groups: list[dict[str, Any]], arguments: OptimizationArguments
) -> torch.optim.Optimizer:
    """AdamW whose moments take 8 bits in blocks of 256; those of embedding tables stay in 32.

    The gradients of a table are so uneven that 8 bits made training unstable.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"
    (arXiv:2110.02861).
    """
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for table in _embedding_tables(model):
        manager.override_config(table, "optim_bits", 32)
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for some parameters and AdamW for the others, as one optimizer.

    Groups and state of the two are those of this object, in their usual form: whoever sets a rate,
    exchanges parameters for their sharded twins, saves or loads meets one optimizer.

    A matrix of which each rank holds a part (FSDP2, tensor parallelism) is put together from the
    momentum that the ranks hold, and every rank orthogonalises the whole. So the update is that of
    one process but for rounding; the cost is one gathering of each matrix in a step, and that no
    rank is spared the orthogonalisation of any. Momentum stays in parts.

    Source: Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025,
    "Muon is Scalable for LLM Training" (arXiv:2502.16982), for the size of its steps.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW | None):
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *(adamw.param_groups if adamw else [])], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        assert closure is None
        self._share_state()
        self._muon.step()
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if _is_muon(group) and _lies_in_parts(group):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _update_part(parameter, group, self.state[parameter])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's."""
        super().load_state_dict(state_dict)
        self._share_state()  # the state before it would otherwise live on in the two

    def _share_state(self) -> None:
        """Lends groups and state to the two."""
        groups = self.param_groups
        whole = [group for group in groups if _is_muon(group) and not _lies_in_parts(group)]
        self._muon.param_groups, self._muon.state = whole, self.state
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in groups if not _is_muon(group)]
            self._adamw.state = self.state


def _is_muon(group: dict[str, Any]) -> bool:
    return "ns_steps" in group


def _lies_in_parts(group: dict[str, Any]) -> bool:
    """Whether this rank holds parts; the parameters of a group are all alike."""
    return isinstance(group["params"][0], DTensor)


def _update_part(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """What `torch.optim.Muon` does to a matrix, for this rank's part of one; all ranks call it.

    The change that torch's Muon makes to a matrix of zeros, without momentum and decay, is the
    update itself.
    """
    assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
    gradient, momentum = parameter.grad, group["momentum"]
    buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
    buffer.lerp_(gradient, 1 - momentum)
    direction = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer

    assert isinstance(direction, DTensor)
    update = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device))
    update.grad = direction.full_tensor()
    kept = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    settings = {name: group[name] for name in kept}
    torch.optim.Muon([update], momentum=0, nesterov=False, weight_decay=0, **settings).step()

    mesh = parameter.device_mesh
    whole = DTensor.from_local(update.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(whole.redistribute(placements=parameter.placements))
