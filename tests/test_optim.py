"""Each optimizer gets its own parameters, at the rate that was set, and goes on to the bit.

Muon and AdamW as one optimizer do to the bit what torch's two do apart, also after a checkpoint.
What several processes make of it is held by `distributed/test_optimizers.py`.
"""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from arguments import OptimizationArguments
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.checkpointing import CheckpointError, CheckpointFolder, open_checkpoint
from llm_training.optim import (
    MuonWithAdamW,
    OptimizerError,
    block_matrices,
    build_optimizer,
    set_learning_rate,
    split_by_decay,
)
from llm_training.parameter_patterns import PatternError
from llm_training.state import TrainState
from llm_training.updates import finish_step
from tests.small_runs import curve, open_place, train_small, weights

MUON = OptimizationArguments(optim="muon", learning_rate=0.01, weight_decay=0.25)
LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


class Blocks(nn.Module):
    """Two blocks between a table and a head of its own; one also has a table and 3-D experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.enter = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.blocks[1].table = nn.Embedding(3, 6)
        self.blocks[1].experts = nn.Parameter(torch.randn(2, 6, 6))
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.enter(self.embedding(tokens))
        for block in self.blocks:
            states = torch.tanh(block(states)) + states
        states = states + self.blocks[1].table(tokens % 3)
        states = states @ self.blocks[1].experts.sum(0)
        return self.head(states).logsumexp(-1).sum()


def tiny(model_type: str, **shape: Any) -> CausalLMWithLoss:
    config = AutoConfig.for_model(model_type, vocab_size=16, **shape)
    return CausalLMWithLoss(AutoModelForCausalLM.from_config(config))


def train(
    model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3, first: int = 0
) -> None:
    for step in range(first, first + steps):
        model(torch.tensor([1, 5, step, 7])).backward()
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.01 / (step + 1))
            optimizer.step()
            optimizer.zero_grad()


def bits(state: Any) -> dict[str, list[Any]]:
    """Every value in nested dicts under its path; tensors as lists, which compare exactly."""
    if isinstance(state, dict):
        found = {f"{key}.{path}": v for key in state for path, v in bits(state[key]).items()}
        return found or {"": []}
    return {"": state.tolist() if isinstance(state, torch.Tensor) else state}


# ------------------------------------------------------------------------------ which parameters


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


GPT2_MATRICES = {
    f"model.transformer.h.0.{name}.weight"
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}
LLAMA_MATRICES = {
    f"model.model.layers.0.{name}.weight"
    for name in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny("gpt2", n_layer=1, n_embd=8, n_head=2, n_positions=8), GPT2_MATRICES),
        (tiny("llama", tie_word_embeddings=False, **LLAMA), LLAMA_MATRICES),
        (tiny("llama", tie_word_embeddings=True, **LLAMA), LLAMA_MATRICES),
        (Blocks(), {"blocks.0.weight", "blocks.1.weight"}),
    ],
    ids=["gpt2", "llama", "llama tied", "tables and experts"],
)
def test_muon_takes_the_matrices_of_the_blocks(model: nn.Module, expected: set[str]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in block_matrices(model)} == expected
    # Everything else is AdamW's, once, and decays as without Muon.
    groups = build_optimizer(model, MUON, "cpu").param_groups
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    assert {name for name, group in found.items() if "momentum" in group} == expected
    decayed = {names[id(parameter)] for parameter in split_by_decay(model)[0]}
    assert {name for name, group in found.items() if group["weight_decay"] == 0.25} == decayed


def test_a_frozen_matrix_is_left_out_and_none_at_all_is_refused() -> None:
    model = Blocks()
    model.blocks[0].weight.requires_grad_(False)
    assert [id(p) for p in block_matrices(model)] == [id(model.blocks[1].weight)]
    with pytest.raises(OptimizerError, match=r"finds no trained matrix .* use --optim adamw"):
        build_optimizer(Tied(), MUON, "cpu")


def test_muon_alone_where_nothing_else_is_trained() -> None:
    model = Blocks()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "blocks.0.weight")
    before = copy.deepcopy(model.state_dict())
    train(model, build_optimizer(model, MUON, "cpu"))
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == {"blocks.0.weight"}


# ------------------------------------------------------------------------------- what they do


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


def test_parameters_with_a_factor_have_groups_of_their_own() -> None:
    model = Blocks()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {"*.weight": 2, "blocks.0.*": 0.5, "enter.*": 1, "*.bias": 0.5}
    expected = {
        name: 0.5 if "blocks.0" in name or "bias" in name else 2.0 if "weight" in name else 1.0
        for name in names.values()
    } | {"enter.weight": 1.0}
    for optim in ("adamw", "muon"):
        plain = OptimizationArguments(optim=optim, learning_rate=0.5)
        asked = OptimizationArguments(optim=optim, learning_rate=0.5, learning_rate_factors=factors)
        before = {
            names[id(p)]: (group["weight_decay"], "momentum" in group)
            for group in build_optimizer(model, plain, "cpu").param_groups
            for p in group["params"]
        }
        optimizer = build_optimizer(model, asked, "cpu")
        set_learning_rate(optimizer, 0.25)
        found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
        assert len(found) == len(names)
        assert {name: group["lr"] / 0.25 for name, group in found} == expected
        # All else is as without factors.
        assert before == {n: (g["weight_decay"], "momentum" in g) for n, g in found}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_factor_is_the_rate_times_it(optim: str) -> None:
    """The same as torch's optimizers with groups that a hand has made and set."""
    torch.manual_seed(0)
    model = Blocks()
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    asked = OptimizationArguments(
        optim=optim, weight_decay=0.25, learning_rate_factors={"blocks.0.*": 0.5, "head.*": 3}
    )
    train(model, build_optimizer(model, asked, "cpu"), steps=4)

    names = {id(p): name for name, p in twin.named_parameters()}
    factors = {"blocks.0.weight": 0.5, "blocks.0.bias": 0.5, "head.weight": 3.0}
    decayed = {id(p) for p in split_by_decay(twin)[0]}
    muons = {id(p) for p in block_matrices(twin)} if optim == "muon" else set()
    pair = []
    for is_muon in (False, True):
        groups = [
            {
                "params": [p],
                "weight_decay": 0.25 if id(p) in decayed else 0.0,
                "factor": factors.get(names[id(p)], 1.0),
            }
            for p in twin.parameters()
            if (id(p) in muons) == is_muon
        ]
        if is_muon and groups:
            pair.append(torch.optim.Muon(groups, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        elif groups:
            pair.append(torch.optim.AdamW(groups, betas=(0.9, 0.95)))
    for step in range(4):
        twin(torch.tensor([1, 5, step, 7])).backward()
        for optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1) * group["factor"]
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-6)
    train(plain, build_optimizer(plain, replace(asked, learning_rate_factors={}), "cpu"), steps=4)
    with pytest.raises(AssertionError):  # other rates would show
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)


def test_a_factor_for_nothing_that_is_trained_is_refused() -> None:
    asked = OptimizationArguments(learning_rate_factors={"linear.*": 2})
    model = Tied()
    build_optimizer(model, asked, "cpu")
    model.linear.requires_grad_(False)
    with pytest.raises(PatternError, match=r"linear\.\*: what fits it.* is not trained"):
        build_optimizer(model, asked, "cpu")


def test_muon_and_adamw_as_one_do_what_the_two_do_apart() -> None:
    torch.manual_seed(0)
    model = Blocks()
    twin = copy.deepcopy(model)
    muon = torch.optim.Muon(
        block_matrices(twin), weight_decay=0.25, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    decayed, kept = split_by_decay(twin)
    others = [p for p in decayed if p.ndim != 2 or p is twin.enter.weight or p is twin.head.weight]
    groups = [{"params": others, "weight_decay": 0.25}, {"params": kept, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    train(model, build_optimizer(model, MUON, "cpu"))
    train(twin, muon, adamw)
    assert bits(model.state_dict()) == bits(twin.state_dict())


def test_a_matrix_and_its_transpose_move_alike() -> None:
    """GPT-2 stores its matrices transposed."""
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(24, 8))
    other = nn.Parameter(one.detach().T.clone())
    one.grad = torch.randn(24, 8)
    other.grad = one.grad.T.clone()
    before = one.detach().clone()
    (group,) = build_optimizer(Blocks(), MUON, "cpu").param_groups[:1]
    settings = {name: value for name, value in group.items() if name != "params"}
    torch.optim.Muon([one, other], **settings).step()
    assert torch.allclose(one, other.T, atol=1e-5)
    # The step is as large as AdamW's usually are: 0.2 times the rate, root mean square.
    update = (one - before * (1 - 0.01 * 0.25)).detach()
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)


def test_muon_goes_on_from_its_state_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = build_optimizer(model, MUON, "cpu")
    train(model, optimizer)
    again = copy.deepcopy(model)
    restarted = build_optimizer(again, MUON, "cpu")
    assert isinstance(restarted, MuonWithAdamW) and restarted._adamw is not None
    train(again, restarted, steps=1)
    again.load_state_dict(model.state_dict())
    restarted.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # What was there before the state came must not live on.
    assert restarted._muon.state is restarted._adamw.state is restarted.state
    train(model, optimizer, first=3)
    train(again, restarted, first=3)
    assert bits(model.state_dict()) == bits(again.state_dict())
    assert bits(optimizer.state_dict()["state"]) == bits(restarted.state_dict()["state"])


def test_a_step_that_is_left_out_changes_nothing_of_muon() -> None:
    accelerator = Accelerator(cpu=True)
    network = Blocks()
    model, optimizer = accelerator.prepare(network, build_optimizer(network, MUON, "cpu"))

    def attempt(*, is_wanted: bool) -> bool:
        model(torch.arange(4)).backward()
        return finish_step(accelerator, model, optimizer, 1.0, lambda _: is_wanted).is_applied

    assert attempt(is_wanted=True)
    before = bits(model.state_dict()) | bits(copy.deepcopy(optimizer.state_dict()))
    assert not attempt(is_wanted=False)
    assert bits(model.state_dict()) | bits(optimizer.state_dict()) == before
    assert attempt(is_wanted=True)
    assert bits(model.state_dict()) | bits(optimizer.state_dict()) != before


# ------------------------------------------------------------------------------- whole runs


def test_a_run_with_muon_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = open_place(tmp_path, monkeypatch)
    whole = train_small(place, "whole", optim="muon")
    checkpoint = whole / "checkpoints/step-00000002"
    (place / "again/checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, place / "again/checkpoints" / checkpoint.name)
    (place / "again/arguments.json").write_text((whole / "arguments.json").read_text())
    again = train_small(place, "again", optim="muon")
    assert curve(again) == [line for line in curve(whole) if line["step"] > 2]
    assert weights(again) == weights(whole)

    # Another optimizer cannot take it over, and says so before it trains.
    capsys.readouterr()
    for optim, theirs, kinds in (
        ("adamw", whole, "momentum_buffer there, exp_avg and exp_avg_sq here"),
        ("muon", train_small(place, "adamw"), "exp_avg and exp_avg_sq there, momentum_buffer here"),
    ):
        start = str(theirs / "checkpoints/step-00000002")
        other = f"other-{optim}"
        train_small(place, other, 1, optim=optim, resume_from_checkpoint=start)
        said = capsys.readouterr().err
        assert "it is of another optimizer (--optim)" in said and "--reset_optimizer" in said
        assert kinds in said
        assert curve(place / other) == []
        train_small(place, other, optim=optim, resume_from_checkpoint=start, reset_optimizer=True)
        assert [line["step"] for line in curve(place / other)] == [3, 4]


# ------------------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_8_bits_are_refused_without_a_gpu(device_type: str) -> None:
    arguments = OptimizationArguments(optim="adamw_8bit")
    with pytest.raises(OptimizerError, match=f"run is on {device_type}: use --optim adamw"):
        build_optimizer(Tied(), arguments, device_type)


def test_8_bits_take_our_groups_and_leave_tables_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held on a stand-in that notes what it is given."""
    noted: dict[str, Any] = {"wide": []}
    manager = SimpleNamespace(override_config=lambda *given: noted["wide"].append(given))
    optim = SimpleNamespace(
        GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager),
        AdamW8bit=lambda groups, **settings: noted.update(groups=groups, **settings),
    )
    package: Any = ModuleType("bitsandbytes")
    package.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    model = Tied()
    build_optimizer(model, OptimizationArguments(optim="adamw_8bit", learning_rate=0.5), "cuda")
    assert noted["wide"] == [(model.embedding.weight, "optim_bits", 32)]
    assert [len(group["params"]) for group in noted["groups"]] == [1, 4]
    assert [group["weight_decay"] for group in noted["groups"]] == [0.1, 0.0]
    assert (noted["lr"], noted["betas"], noted["eps"]) == (0.5, (0.9, 0.95), 1e-8)


class Wide(nn.Module):
    """A matrix that is large enough for 8 bits, and a table that would be."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 80)
        self.matrix = nn.Linear(80, 80)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.matrix(self.embedding(tokens)).logsumexp(-1).sum()


def test_8_bits_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    """With the package itself, where it is installed; it also computes on a CPU."""
    pytest.importorskip("bitsandbytes")
    asked = OptimizationArguments(optim="adamw_8bit", learning_rate=0.01)
    torch.manual_seed(0)
    runs = {}
    for name, arguments in (("one", asked), ("again", asked), ("adamw", OptimizationArguments())):
        accelerator, network = Accelerator(cpu=True), Wide()
        optimizer = build_optimizer(network, arguments, "cuda")
        model, prepared = accelerator.prepare(network, optimizer)
        runs[name] = (model, prepared, CheckpointFolder(accelerator, tmp_path / name, None, {}))
    model, optimizer, folder = runs["one"]
    train(model, optimizer)
    kinds = {p.shape: values["state1"].dtype for p, values in optimizer.optimizer.state.items()}
    assert kinds[model.matrix.weight.shape] == torch.uint8
    assert kinds[model.embedding.weight.shape] == torch.float32

    path = folder.save(TrainState(seed=0, step=3))
    again, restarted, its_folder = runs["again"]
    its_folder.load(open_checkpoint(path), again, restarted)
    train(model, optimizer, first=3)
    train(again, restarted, first=3)
    assert bits(model.state_dict()) == bits(again.state_dict())
    assert bits(optimizer.state_dict()["state"]) == bits(restarted.state_dict()["state"])

    # Neither takes the other's.
    other, plain, other_folder = runs["adamw"]
    train(other, plain)
    its_path = other_folder.save(TrainState(seed=0, step=3))
    with pytest.raises(CheckpointError, match=r"not of AdamW or Muon .*--reset_optimizer"):
        other_folder.load(open_checkpoint(path), other, plain)
    with pytest.raises(CheckpointError, match=r"has no 8-bit state.*--reset_optimizer"):
        its_folder.load(open_checkpoint(its_path), again, restarted)
