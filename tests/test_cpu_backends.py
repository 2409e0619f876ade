"""Attention in a ring on the CPU is attention, with its gradients; nothing of it stays behind.

That it is so over several processes is held by tests/distributed/test_equivalence.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed

from llm_training.cpu_backends import ring_attention


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[distributed.ProcessGroup]:
    """A ring of this one process."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_the_ring_is_causal_attention_with_its_gradients(alone: distributed.ProcessGroup) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 16, 8)
    key, value = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)  # two query heads share one

    def attend(grouped: dict[str, bool]) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        out = F.scaled_dot_product_attention(*inputs, is_causal=True, **grouped)
        out.square().sum().backward()
        return [out, *(t.grad for t in inputs)]

    expected = attend({"enable_gqa": True})
    with ring_attention(alone):
        found = attend({})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_functions_of_torch_are_put_back(alone: distributed.ProcessGroup) -> None:
    before = F.scaled_dot_product_attention
    with pytest.raises(NotImplementedError, match="--dropout 0"), ring_attention(alone):
        assert F.scaled_dot_product_attention is not before
        F.scaled_dot_product_attention(*[torch.zeros(1, 1, 4, 8)] * 3, dropout_p=0.1)
    assert F.scaled_dot_product_attention is before
