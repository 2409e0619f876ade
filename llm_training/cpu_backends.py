"""Sharding backends on a CPU: a way to try them out, and to test them, without an accelerator.

Accelerate turns FSDP2, DeepSpeed and tensor parallelism on only for accelerators; on a CPU it runs
DDP in their place, or one process, and says nothing. They do work there over gloo, once Accelerate
is told before it looks. Everything that this takes stands here, and none of it acts unless the
device asked for is the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed import ProcessGroup


def start_gloo(backend: str, timeout: timedelta) -> None:
    """Joins the processes over gloo and lets Accelerate turn `backend` on; before `Accelerator`.

    Args:
        backend: "fsdp", "deepspeed" or "tensor_parallel"; DDP needs none of this.
        timeout: how long one exchange may take.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Accelerate would read it as "no DeepSpeed here"; the device is settled below.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    state = PartialState(cpu=True, timeout=timeout)
    if backend == "deepspeed":
        _keep_from_building_ops()
        # Without it, DeepSpeed starts numactl at every exchange to count its "devices".
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        # The kind for which Accelerate considers sharding; the device stays the CPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        state.distributed_type = DistributedType.MULTI_GPU


def _keep_from_building_ops() -> None:
    """Leaves out an exchange through shared memory that DeepSpeed would build for inference.

    Training never uses it; building takes a compiler and half a minute, and a process killed in
    the midst of it leaves a lock behind at which every later start waits without end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def ring_attention(group: ProcessGroup) -> Iterator[None]:
    """Causal attention over the positions that all ranks of `group` hold, with the CPU's kernel.

    torch's context parallelism brings the exchange in a ring for the kernels of GPUs only; inside,
    `scaled_dot_product_attention` is that exchange with the kernel of the CPU.
    """
    functional = torch.nn.functional
    as_it_was = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, **_: Any
    ) -> Tensor:
        if dropout_p:
            raise NotImplementedError("the CPU's attention kernel has no dropout: --dropout 0")
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        return _RingAttention.apply(query.contiguous(), key, value, group)

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = as_it_was


class _RingAttention(torch.autograd.Function):
    """torch's ring over the CPU's flash attention; (B, heads, T / ranks, head size) each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> Tensor:
        out, log_sum = _ring()._templated_ring_attention(
            group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            query=query,
            key=key,
            value=value,
            is_causal=True,
        )
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = _ring()._templated_ring_attention_backward(
            ctx.group,
            2,
            kernel,
            grad_out=grad_out.contiguous(),
            grad_out_name="grad_out",
            query=query,
            key=key,
            value=value,
            out=out,
            logsumexp=log_sum,
            is_causal=True,
            dropout_p=0.0,
        )
        return grads[0], grads[1], grads[2], None


def _ring() -> Any:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    return _attention
