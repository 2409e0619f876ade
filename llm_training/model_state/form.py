"""In which form a backend writes weights and optimizer, and how all ranks fail together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from llm_training.parameter_patterns import RATE_FACTOR
from llm_training.ranks import BROKEN_EXCHANGE, tensor_parallel_size

T = TypeVar("T")

# What wrappers put into the names of weights: DDP in front, torch.compile anywhere.
WRAPPER_NAMES = re.compile(r"^module\.|_orig_mod\.")
# All that torch says of a file that took only a part of what was written.
TORN_FILE = re.compile(r"inline_container")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; earlier ones are as they were."""


@dataclass(frozen=True)
class StateForm:
    """How weights and optimizer lie in a checkpoint, or in the processes of a run.

    Attributes:
        backend: "single", "ddp", "fsdp", "deepspeed" or "tensor_parallel".
        layout: "plain" (one file each, the optimizer by number), "full" (one file each, by name),
            "sharded" (torch.distributed.checkpoint, readable on any number of processes) or
            "deepspeed" (one file a process).
        num_processes: how many wrote it.
        tensor_parallel_size: how many of them held one model between them.
        zero_stage: DeepSpeed's; None elsewhere.
        precision: "fp32", "bf16" or "fp16", of the forward pass.
        device: type of the device, "cpu" or "cuda"; None: not noted.
        optimizer_parameters: names of the parameters in the order in which a plain optimizer file
            numbers them; None: not noted.
        rate_groups: DeepSpeed's, which keeps parameters that share a learning rate in one piece: a
            checksum of which do; None: all of them do.
    """

    backend: str = "single"
    layout: str = "plain"
    num_processes: int = 1
    tensor_parallel_size: int = 1
    zero_stage: int | None = None
    precision: str = "fp32"
    device: str | None = None
    optimizer_parameters: tuple[str, ...] | None = None
    rate_groups: str | None = None

    @classmethod
    def of_run(cls, accelerator: Accelerator) -> StateForm:
        """The form that the backend of this run writes, and reads without conversion."""
        backend, layout, zero_stage = "single", "plain", None
        tp_size = tensor_parallel_size(accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            kind = accelerator.state.fsdp_plugin.state_dict_type
            backend, layout = "fsdp", "full" if "FULL" in kind.name else "sharded"
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:
            zero_stage = int(accelerator.state.deepspeed_plugin.zero_stage)
            backend = layout = "deepspeed"
        elif tp_size > 1:
            backend, layout = "tensor_parallel", "sharded"
        elif accelerator.num_processes > 1:
            backend = "ddp"
        return cls(
            backend=backend,
            layout=layout,
            num_processes=accelerator.num_processes,
            tensor_parallel_size=tp_size,
            zero_stage=zero_stage,
            precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
            device=accelerator.device.type,
            rate_groups=_rate_groups(accelerator) if backend == "deepspeed" else None,
        )

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> StateForm:
        """The form that a checkpoint's manifest tells; older ones tell none and are plain."""
        processes = int(manifest["num_processes"])
        noted = manifest.get("model_state")
        if noted is None:
            backend = "single" if processes == 1 else "ddp"
            return cls(backend, num_processes=processes)
        names = noted.get("optimizer_parameters")
        return cls(
            backend=noted["backend"],
            layout=noted["layout"],
            num_processes=processes,
            tensor_parallel_size=noted["tensor_parallel_size"],
            zero_stage=noted["zero_stage"],
            precision=noted["precision"],
            device=noted["device"],
            optimizer_parameters=None if names is None else tuple(names),
            rate_groups=noted.get("rate_groups"),
        )

    def for_manifest(self) -> dict[str, Any]:
        """What a manifest keeps of it beside the number of processes."""
        noted: dict[str, Any] = {
            "backend": self.backend,
            "layout": self.layout,
            "tensor_parallel_size": self.tensor_parallel_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "device": self.device,
        }
        if self.optimizer_parameters is not None:
            noted["optimizer_parameters"] = list(self.optimizer_parameters)
        if self.rate_groups is not None:
            noted["rate_groups"] = self.rate_groups
        return noted

    def __str__(self) -> str:
        """For a person: `2 processes (ZeRO-3)`."""
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage is not None else self.backend
        plural = "" if self.num_processes == 1 else "es"
        return f"{self.num_processes} process{plural} ({name.replace('_', ' ')})"


def _rate_groups(accelerator: Accelerator) -> str | None:
    """As `StateForm` has it; None before anything is prepared."""
    engine: Any = next(iter(accelerator._models), None)
    groups = getattr(getattr(engine, "optimizer", None), "param_groups", ())
    if not any(RATE_FACTOR in group for group in groups):
        return None
    names = [[*map(plain_name, shapes)] for shapes in engine._get_zero_param_shapes()]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]


def plain_name(name: str) -> str:
    """The name of a weight in `CausalLMWithLoss` itself, whatever is wrapped around it."""
    return WRAPPER_NAMES.sub("", name)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under their plain names; tied ones once, under the first.

    Others are as the model was built, of the base that adapters are trained for or frozen by
    `freeze_parameters`: no checkpoint holds them.
    """
    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def without_frozen(state: Mapping[str, T], model: nn.Module) -> dict[str, T]:
    """Of a state dict what is trained, and the buffers.

    Libraries leave a tied weight in under its second name.
    """
    names = {
        plain_name(name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in state.items() if plain_name(name) not in names}


def buffers_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state of the model, under their plain names."""
    return {
        plain_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each of `parameters_by_name` all names that it goes by."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {group[0]: group for group in names.values()}


def fail_together(problem: str | None, kind: type[CheckpointError] = CheckpointError) -> None:
    """Raises on every rank what any of them found; every rank must call this.

    Raises:
        CheckpointError: the first problem in the order of the ranks, as the `kind` given.
    """
    for found in gather_object([problem]):
        if found is not None:
            raise kind(found)


def save_together(accelerator: Accelerator, task: str, work: Callable[[], T]) -> T:
    """Does `work` on every rank; where one fails, all do at once.

    Every rank must call this. A rank that fails must not leave the others waiting in an exchange
    inside `work`: libraries that have one there agree by themselves.

    Args:
        task: what `work` does, as in "rank 1 could not ...".

    Raises:
        SaveError: the first failure in the order of the ranks, with its rank.
    """
    result, problem = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # full disks show in many ways
        if isinstance(error, RuntimeError) and BROKEN_EXCHANGE.search(str(error)):
            raise  # another rank is gone: one more exchange would be one more wait
        problem = explain_failure(accelerator.process_index, task, error)
    fail_together(problem, SaveError)
    return cast(T, result)


def save_on_main_process(accelerator: Accelerator, task: str, work: Callable[[], T]) -> T | None:
    """`save_together` where rank 0 alone has work; gives its result there, None elsewhere."""
    is_main = accelerator.is_main_process
    return save_together(accelerator, task, lambda: work() if is_main else None)


def explain_failure(rank: int, task: str, error: BaseException) -> str:
    """For a person, in one line: `rank 1 could not write ...: No space left on device.`"""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):  # of torch.distributed.checkpoint, on every rank
        rank, (error, _) = min(error.failures.items())
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause) if cause else f"{type(error).__name__}: {first_line(error)}"
    if TORN_FILE.search(text):
        text = f"the file could not be written to its end, as on a full disk ({text})"
    return f"rank {rank} could not {task}: {text.rstrip('.')}."


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:") + "."


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Does `work` on rank 0 while the others wait; gives its result there, None elsewhere.

    Raises:
        CheckpointError: it failed, on every rank alike.
    """
    result, problem = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:  # damaged files fail in many ways
            is_ours = isinstance(error, CheckpointError)
            problem = str(error) if is_ours else f"The checkpoint cannot be read: {error!r}."
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise CheckpointError(problem)
    return result
