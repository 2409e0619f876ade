"""Weight decay reaches the matrices and nothing else; the rate is the one that was set."""

import torch
from torch import nn

from arguments import OptimizationArguments
from llm_training.optim import build_optimizer, set_learning_rate, split_by_decay


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_each_parameter_is_in_one_group() -> None:
    model = Tied()
    decayed, kept = split_by_decay(model)
    assert [id(p) for p in decayed] == [id(model.linear.weight)]
    assert {id(p) for p in kept} == {
        id(p)
        for p in (model.embedding.weight, model.linear.bias, model.norm.weight, model.norm.bias)
    }


def test_an_untied_head_decays_and_frozen_parameters_are_left_out() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(10, 4))
    model.linear.weight.requires_grad_(False)
    decayed, kept = split_by_decay(model)
    assert [id(p) for p in decayed] == [id(model.head.weight)]
    assert id(model.linear.weight) not in {id(p) for p in kept}


def test_the_optimizer_is_fused_and_takes_the_arguments() -> None:
    arguments = OptimizationArguments(
        learning_rate=0.5, weight_decay=0.25, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5
    )
    optimizer = build_optimizer(Tied(), arguments, "cpu")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for group in optimizer.param_groups:
        assert group["fused"]
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-5)


def test_the_rate_set_is_the_rate_used() -> None:
    model = Tied()
    optimizer = build_optimizer(model, OptimizationArguments(weight_decay=0.0), "cpu")
    before = model.linear.weight.detach().clone()
    model.linear(torch.ones(1, 4)).sum().backward()
    set_learning_rate(optimizer, 0.125)
    optimizer.step()
    # Adam's first step moves every weight by the rate, whatever the gradient.
    moved = (model.linear.weight - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.125), rtol=1e-4)
