"""A step on one process is applied as torch would, or left out without a trace.

Fakes stand for what a CPU does not have: fp16's loss scaler is torch's own, given to an Accelerator
that would not make one. `distributed/test_updates.py` has every backend.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from llm_training.updates import (
    StepOutcome,
    backward,
    can_finish_unseen,
    drop_gradients,
    finish_step,
    norms_by_layer,
)

LIMIT = 0.5
SCALE = 1024.0


class Setting:
    """A small model prepared by Accelerate; with a loss scaler where `scale` is given."""

    def __init__(self, scale: float | None = None, *, fused: bool = False):
        torch.manual_seed(0)
        self.accelerator: Any = Accelerator(cpu=True)
        layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        network = nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 1)})
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            self.accelerator.state._mixed_precision = "fp16"
            self.optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
            self.accelerator._optimizers = [self.optimizer]

    def step(
        self,
        seed: int,
        accept: Callable[[float], bool] = lambda _: True,
        factor: float = 1.0,
        limit: float | None = LIMIT,
    ) -> StepOutcome:
        backward(self.accelerator, self.model, self.loss(seed) * factor)
        return finish_step(self.accelerator, self.model, self.optimizer, limit, accept)

    def loss(self, seed: int) -> Tensor:
        hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        for layer in self.model["layers"]:
            hidden = torch.tanh(layer(hidden))
        return self.model["head"](hidden).square().sum()

    def holdings(self) -> list[Any]:
        """Weights, gradients, optimizer and loss scaler, as plain data."""
        parameters = [p.tolist() for p in self.model.parameters()]
        gradients = [p.grad for p in self.model.parameters()]
        state = copy.deepcopy(self.optimizer.optimizer.state_dict()["state"])
        numbers = {n: {k: v.tolist() for k, v in kept.items()} for n, kept in state.items()}
        scaler = self.accelerator.scaler
        return [parameters, gradients, numbers, scaler.state_dict() if scaler else None]


def plain(seeds: list[int], limit: float = LIMIT) -> tuple[Setting, list[float]]:
    """The same steps by Accelerate's own calls."""
    setting, norms = Setting(), []
    for seed in seeds:
        setting.accelerator.backward(setting.loss(seed))
        norm = setting.accelerator.clip_grad_norm_(setting.model.parameters(), limit)
        setting.optimizer.step()
        setting.optimizer.zero_grad()
        norms.append(float(norm))
    return setting, norms


@pytest.mark.parametrize("limit", [LIMIT, None])
def test_accepted_steps_are_accelerates(limit: float | None) -> None:
    expected, norms = plain([0, 1, 2], limit or math.inf)
    setting = Setting()
    outcomes = [setting.step(seed, limit=limit) for seed in range(3)]
    assert outcomes == [StepOutcome(norm, is_applied=True) for norm in norms]
    assert min(norms) < LIMIT < max(norms)
    assert setting.holdings() == expected.holdings()


@pytest.mark.parametrize("scale", [None, SCALE])
def test_an_unwanted_step_leaves_no_trace(scale: float | None) -> None:
    setting, never = Setting(scale), Setting(scale)
    setting.step(0)
    before, asked = setting.holdings(), []

    def refuse(norm: float) -> bool:
        asked.append(norm)
        return False

    outcome = setting.step(1, refuse)
    assert outcome == StepOutcome(asked[0], is_applied=False) and len(asked) == 1
    assert setting.holdings() == before
    # And none in the steps behind it.
    never.step(0)
    assert setting.step(2) == never.step(2)
    assert setting.holdings() == never.holdings()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_broken_norm_is_never_applied(factor: float) -> None:
    setting = Setting()
    setting.step(0)
    before = setting.holdings()
    outcome = setting.step(1, accept=lambda _: True, factor=factor)
    assert not math.isfinite(outcome.grad_norm) and not outcome.is_applied
    assert setting.holdings() == before


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_lowers_the_loss_scale_and_asks_nobody(fused: bool) -> None:
    setting = Setting(SCALE, fused=fused)
    setting.step(0)
    weights, asked = setting.holdings()[:3], []
    outcome = setting.step(1, accept=lambda norm: not asked.append(norm), factor=1e36)
    assert not math.isfinite(outcome.grad_norm) and not outcome.is_applied
    assert asked == []
    assert setting.holdings()[:3] == weights
    assert setting.accelerator.scaler.get_scale() == SCALE / 2
    assert setting.step(2).is_applied


def test_a_scaled_step_tells_the_norm_without_the_scale() -> None:
    assert Setting(SCALE).step(0).grad_norm == pytest.approx(plain([0])[1][0], rel=1e-6)


def test_gradients_are_dropped_unseen() -> None:
    setting = Setting()
    setting.step(0)
    before = setting.holdings()
    backward(setting.accelerator, setting.model, setting.loss(1) * math.nan)
    drop_gradients(setting.accelerator, setting.model, setting.optimizer)
    assert setting.holdings() == before


def test_norms_of_layers_while_the_gradients_are_there() -> None:
    setting, found = Setting(), {}

    def look(norm: float) -> bool:
        found.update(norms_by_layer(setting.accelerator, setting.model))
        return False

    outcome = setting.step(0, look)
    reference = Setting()
    reference.loss(0).backward()
    expected = {
        name: float(torch.cat([p.grad.flatten() for p in block.parameters()]).norm())
        for name, block in [
            *((f"layers.{i}", layer) for i, layer in enumerate(reference.model["layers"])),
            ("head", reference.model["head"]),
        ]
    }
    assert found == pytest.approx(expected)
    assert math.hypot(*found.values()) == pytest.approx(outcome.grad_norm)


def test_a_model_without_gradients_has_no_norm() -> None:
    setting = Setting()
    outcome = finish_step(
        setting.accelerator, setting.model, setting.optimizer, LIMIT, lambda norm: norm == 0
    )
    assert outcome == StepOutcome(0.0, is_applied=True)


@pytest.mark.parametrize(
    ("device", "place", "fused", "has_scaler", "can"),
    [
        ("cuda", "cuda", True, False, True),
        ("cpu", "cpu", True, False, False),  # it has nothing else to do meanwhile
        ("cuda", "cpu", True, False, False),  # FSDP2's offloading
        ("cuda", "cuda", False, False, False),
        ("cuda", "cuda", True, True, False),
    ],
)
def test_where_the_device_may_decide(
    device: str, place: str, fused: bool, has_scaler: bool, can: bool
) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=fused)
    weights = SimpleNamespace(device=torch.device(place))
    optimizer.param_groups[0]["params"] = [weights]
    accelerator: Any = SimpleNamespace(
        device=torch.device(device), scaler=object() if has_scaler else None
    )
    wrapped: Any = SimpleNamespace(optimizer=optimizer)
    assert can_finish_unseen(accelerator, wrapped) is can
    wrapped.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    wrapped.optimizer.param_groups[0]["params"] = []  # as DeepSpeed leaves them
    assert not can_finish_unseen(accelerator, wrapped)
