"""One bit that differs is found and named, and what lies on one rank alone is not compared."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from llm_training import replicas
from llm_training.replicas import (
    ReplicaError,
    checksum,
    differing_replicas,
    first_difference,
    has_replicas,
    mark,
    require_equal_replicas,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def flip(tensor: Tensor, element: int, bit: int = 0) -> None:
    """Flips one bit of a contiguous tensor, which may need a gradient."""
    bits = tensor.detach().view(-1).view(replicas.BITS[tensor.element_size()])
    bits[element] ^= 1 << bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", [0, 7, 8, 20, 22])
@pytest.mark.parametrize("chunk", [8, 2**16])
def test_every_bit_counts(
    dtype: torch.dtype, element: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "CPU_CHUNK_ELEMENTS", chunk)
    tensor = torch.randint(0, 2, (23,)).to(dtype)
    seen = {int(checksum(tensor))}
    num_bits = 1 if dtype == torch.bool else 8 * tensor.element_size() - 1
    for bit in range(num_bits):
        flip(tensor, element, bit)
        seen.add(int(checksum(tensor)))
        flip(tensor, element, bit)
    assert len(seen) == num_bits + 1
    assert int(checksum(tensor)) in seen


@pytest.mark.parametrize("chunk", [4, 2**16])
def test_the_order_counts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CPU_CHUNK_ELEMENTS", chunk)
    tensor = torch.arange(12.0)
    swapped = [tensor[[1, 0, *range(2, 12)]], tensor[[8, *range(1, 8), 0, *range(9, 12)]]]
    assert len({int(checksum(each)) for each in [tensor, *swapped]}) == 3


def test_equal_values_have_one_checksum_however_they_lie() -> None:
    tensor = torch.randn(6, 4)
    assert torch.equal(checksum(tensor), checksum(tensor.T.contiguous().T))
    assert int(checksum(torch.tensor(3.0))) == int(checksum(torch.tensor([3.0])))
    assert int(checksum(torch.empty(0))) == 0
    nan = torch.tensor([float("nan"), 1.0])
    assert torch.equal(checksum(nan), checksum(nan.clone()))


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([(0, 5), (0, 5), (0, 5)], None),
        ([(0, 5), (0, 5), (0, 6)], (2, 0)),
        ([(0, 6), (0, 5), (0, 5)], (1, 0)),
        ([(0, 5), (1, 6)], None),  # two parts
        ([(0, 5), (1, 6), (0, 5), (1, 6)], None),  # two copies of two parts
        ([(0, 5), (1, 6), (0, 5), (1, 7)], (3, 1)),
        ([(0, 5), (0, 5), (1, 6), (1, 5)], (3, 2)),
    ],
)
def test_ranks_with_one_part_are_compared(of_ranks: list, expected: Any) -> None:
    assert first_difference(of_ranks) == expected


def accelerator(
    count: int,
    kind: str = "MULTI_GPU",
    stage: int = 0,
    copies: int | None = None,
    gather: Any = None,
) -> Any:
    split = None if copies is None else SimpleNamespace(dp_replicate_size=copies)
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        num_processes=count,
        distributed_type=DistributedType[kind],
        parallelism_config=split,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        device=torch.device("cpu"),
        gather=gather,
    )


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (accelerator(1), False),
        (accelerator(1, "DEEPSPEED", stage=1), False),
        (accelerator(2), True),
        (accelerator(2, "MULTI_CPU"), True),
        *((accelerator(2, "DEEPSPEED", stage=stage), stage < 3) for stage in range(4)),
        (accelerator(2, "FSDP"), False),
        (accelerator(4, "FSDP", copies=1), False),
        (accelerator(4, "FSDP", copies=2), True),
    ],
)
def test_which_backends_keep_copies(described: Any, expected: bool) -> None:
    assert has_replicas(described) is expected


def a_model() -> nn.Module:
    """Two matrices, one vector and a buffer, with names as DDP gives them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    return nn.ModuleDict({"module": network})


def beside(other: nn.Module) -> Any:
    """Rank 0 of two, of which rank 1 holds the tensors of `other`."""

    def gather(mine: Tensor) -> Tensor:
        tensors = [*other.parameters(), *other.buffers()]
        theirs = torch.stack([mark(tensor, torch.device("cpu")) for tensor in tensors])
        assert theirs.dtype == mine.dtype == torch.int64
        return torch.cat([mine, theirs])

    return accelerator(2, gather=gather)


def test_equal_copies_have_no_difference() -> None:
    assert differing_replicas(beside(a_model()), a_model()) is None
    require_equal_replicas(beside(a_model()), a_model(), step=7)


def test_nothing_is_exchanged_without_copies() -> None:
    assert differing_replicas(accelerator(2, "FSDP"), a_model()) is None


def test_the_first_difference_is_named() -> None:
    other = a_model()
    flip(other["module"][0].bias, 1)
    said = differing_replicas(beside(other), a_model())
    assert said == "rank 1 holds other values of 0.bias than rank 0"
    flip(other["module"][1].running_var, 0)
    said = differing_replicas(beside(other), a_model())
    assert said == "rank 1 holds other values of 0.bias than rank 0 (2 of 5 tensors differ)"
    flip(other["module"][0].bias, 1)
    said = differing_replicas(beside(other), a_model())
    assert said == "rank 1 holds other values of 1.running_var than rank 0"
    with pytest.raises(ReplicaError, match=r"^After step 7, rank 1 holds other values of 1\.runn"):
        require_equal_replicas(beside(other), a_model(), step=7)
