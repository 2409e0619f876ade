"""Proves that adapters train what they say and no more, and that what is written is what was run.

The models are tiny ones of two kinds: llama, and GPT-2 with its tied head and its matrices stored
the other way round. `tests/distributed/test_lora.py` has several processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import train_llm
from arguments import Arguments, BatchSizes
from llm_training.argument_parsing import read_arguments
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.flops import model_flops_per_token
from llm_training.launch_settings import LaunchSettings
from llm_training.lora import add_adapters
from llm_training.memory_needs import estimate_memory
from llm_training.milestones import export
from llm_training.modeling import ModelError, model_fingerprint
from llm_training.outputs import OutputFolder
from llm_training.run import Run
from llm_training.traced_memory import Outline
from tests.small_runs import SETTINGS, curve, open_place, train_small

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    },
}
LORA: dict[str, Any] = {
    "model_type": None,
    "config_overrides": {},
    "dropout": None,
    "lora_rank": 3,
    "learning_rate": 1e-2,
}
FORMS: list[dict[str, Any]] = [
    {"model": "gpt2"},
    {"model": "gpt2", "use_dora": True, "lora_modules_to_save": ["wte"]},
    {"model": "gpt2", "pad_vocab_to_multiple_of": 64},
    {"model": "llama", "use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]},
    {"model": "llama", "use_dora": True, "lora_modules_to_save": ["lm_head", "norm"]},
    {"model": "llama", "lora_target_modules": ["lm_head"], "lora_alpha": 1.5},
]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text and a base of each kind."""
    for kind, sizes in SIZES.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, vocab_size=257, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    return open_place(tmp_path, monkeypatch)


def settings_of(model: str = "gpt2", **changes: Any) -> dict[str, Any]:
    return LORA | {"model_name_or_path": model} | changes


def train_adapters(place: Path, name: str = "run", code: int = 0, **changes: Any) -> Path:
    return train_small(place, name, code, **settings_of(**changes))


def build(**changes: Any) -> Run:
    """A run that has not begun."""
    settings = SETTINGS | {"output_dir": "built"} | settings_of(**changes)
    Path("built.json").write_text(json.dumps(settings), encoding="utf-8")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    run = train_llm.build_run(read_arguments(["built.json"], 1), OutputFolder("built"))
    train_llm.resume(run)
    return run


def tokens() -> Tensor:
    return torch.arange(200, 232)[None]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=tokens(), use_cache=False).logits
    return found


# ------------------------------------------------------------------------------- what is trained


@each_form
def test_the_folder_opens_to_the_same_logits_and_the_base_keeps_its_bits(
    form: dict[str, Any], place: Path
) -> None:
    base = load_file(place / form["model"] / "model.safetensors")
    run = build(**form)
    train_llm.train(run)
    export(run, run.output.final)
    live = logits_of(run.network)[..., :257]

    opened = AutoModelForCausalLM.from_pretrained("built/final")
    torch.testing.assert_close(logits_of(opened), live, rtol=0, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(form["model"])
    before = logits_of(plain)
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(plain, "built/final")), live, rtol=0, atol=1e-6
    )
    assert (live - before).abs().max() > 1e-3  # something was learned

    now = {n.replace(".base_layer.", "."): t for n, t in run.network.state_dict().items()}
    changed = {name for name in base if not torch.equal(base[name], now[name][: len(base[name])])}
    whole = form.get("lora_modules_to_save", [])
    assert changed == {name for name in base if name.split(".")[-2] in whole}


def test_exactly_the_adapters_are_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build(model="llama", lora_target_modules=["q_proj", "down_proj"])
    trained = {n: p for n, p in run.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # pairs, in two layers of two blocks
    expected = 2 * 3 * ((16 + 16) + (24 + 16))  # in each block the rank times both sides
    assert sum(p.numel() for p in trained.values()) == expected == 432
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained.values()}
    total = sum(p.numel() for p in run.network.parameters())
    share = f"432 of {total:,} parameters are trained ({432 / total:.2%})"
    line = f"LoRA     rank 3, alpha 6: {share}, in 4 modules"
    assert line in capsys.readouterr().out


def test_what_a_run_needs_is_reckoned_from_what_it_trains(place: Path) -> None:
    """Weights of all, gradients and moments of the adapters; and their products once fewer."""
    arguments = Arguments(model_name_or_path="llama", lora_rank=3)
    model = AutoModelForCausalLM.from_pretrained("llama")
    whole = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2) - 257 * 16
    flops = model_flops_per_token(model, model.config, 32)
    add_adapters(model, arguments)
    adapters = sum(p.numel() for p in model.parameters()) - whole
    more = model_flops_per_token(model, model.config, 32)
    assert flops is not None and more == flops - 2 * matrices + 6 * adapters

    def build_without_content() -> CausalLMWithLoss:
        twin = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("llama"))
        add_adapters(twin, arguments)
        return CausalLMWithLoss(twin)

    outline, one = Outline(build_without_content), BatchSizes(1, 1, 1, 1)
    need = estimate_memory(outline, arguments, LaunchSettings(), one, 32, precision="fp32")
    assert need.weights == 4 * (whole + adapters)
    assert (need.gradients, need.optimizer) == (4 * adapters, 8 * adapters)


def test_all_linear_leaves_the_head_out(place: Path) -> None:
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in build(model="llama").network.named_parameters()
        if ".lora_A." in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_first_weights_follow_from_the_seed_and_change_nothing(place: Path) -> None:
    def first(**changes: Any) -> dict[str, Tensor]:
        run = build(**changes)
        live, before = logits_of(run.network), AutoModelForCausalLM.from_pretrained("gpt2")
        torch.testing.assert_close(live, logits_of(before), rtol=0, atol=1e-6)
        return {n: p.detach() for n, p in run.network.named_parameters() if ".lora_A." in n}

    torch.manual_seed(5)
    one, again, other = first(), first(lora_alpha=32.0), first(seed=43)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_recomputed_activations_train_the_same_curve(model: str, place: Path) -> None:
    common = {"model": model, "lora_dropout": 0.2}
    plain = curve(train_adapters(place, "plain", **common))
    again = curve(train_adapters(place, "again", gradient_checkpointing=True, **common))
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in plain]
    without = curve(train_adapters(place, "without", model=model))
    assert without[-1]["train/loss"] != plain[-1]["train/loss"]  # the dropout is there


@pytest.mark.parametrize("form", [FORMS[1], FORMS[4]], ids=["gpt2", "llama"])
def test_it_trains_in_bf16(form: dict[str, Any], place: Path) -> None:
    log = curve(train_adapters(place, mixed_precision="bf16", max_steps=8, **form))
    assert log[-1]["train/loss"] < 0.995 * log[0]["train/loss"]
    assert (place / "run/final/adapter_model.safetensors").is_file()


# ---------------------------------------------------------------------------------- what is kept


@each_form
def test_merged_it_is_a_plain_model_with_the_same_logits(form: dict[str, Any], place: Path) -> None:
    run = build(merge_adapter=True, **form)
    train_llm.train(run)
    live = logits_of(run.network)[..., :257]
    weights = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    export(run, run.output.final)
    assert not (place / "built/final/adapter_config.json").exists()
    opened = AutoModelForCausalLM.from_pretrained("built/final")
    assert not [name for name, _ in opened.named_modules() if "lora" in name]
    torch.testing.assert_close(logits_of(opened), live, rtol=0, atol=2e-6)
    for name, tensor in run.network.state_dict().items():  # the live model is as it was
        assert torch.equal(tensor, weights[name])


def test_a_finished_run_can_be_merged_later(place: Path) -> None:
    train_adapters(place)
    assert (place / "run/final/adapter_config.json").exists()
    adapted = logits_of(AutoModelForCausalLM.from_pretrained("run/final"))
    train_adapters(place, merge_adapter=True)
    assert not (place / "run/final/adapter_config.json").exists()
    merged = logits_of(AutoModelForCausalLM.from_pretrained("run/final"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS[:2], ids=["plain", "dora"])
def test_a_stopped_run_goes_on_bit_for_bit(form: dict[str, Any], place: Path) -> None:
    form = form | {"lora_dropout": 0.2}
    whole = train_adapters(place, "whole", **form)
    start = str(whole / "checkpoints" / "step-00000002")
    again = train_adapters(place, "again", resume_from_checkpoint=start, **form)
    assert curve(again) == curve(whole)[2:]
    one, other = (load_file(f / "final" / "adapter_model.safetensors") for f in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_hold_the_adapters_and_their_optimizer_alone(place: Path) -> None:
    folder = train_adapters(place, lora_modules_to_save=["ln_f"]) / "checkpoints" / "step-00000004"
    kept = load_file(folder / "model.safetensors")
    exported = load_file(place / "run" / "final" / "adapter_model.safetensors")
    assert len(kept) == len(exported) == 2 * 8 + 2
    assert all(".lora_" in name or ".ln_f." in name for name in kept)
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    assert len(state) == len(kept)


def test_an_adapter_for_another_base_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_adapters(place, max_steps=2)
    shutil.copytree("gpt2", "moved")
    shutil.copytree("run", "moved-run", symlinks=True)
    train_adapters(place, "moved-run", model="moved", max_steps=3)  # the same weights
    weights = load_file("gpt2/model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] += 1e-3
    save_file(weights, "gpt2/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    train_adapters(place, code=1, max_steps=3)
    said = capsys.readouterr().err
    assert "belongs to another run" in said and said.count("adapters for the base weights") == 2


def test_what_is_trained_is_part_of_the_identity(place: Path) -> None:
    marks = [
        model_fingerprint(build(**changes).model)
        for changes in ({}, {"lora_rank": 4}, {"lora_modules_to_save": ["ln_f"]}, {"seed": 7})
    ]
    assert len(set(marks)) == 3 and marks[0] == marks[3]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"lora_target_modules": ["q_proj"]},
            ["--lora_target_modules q_proj", "c_attn, c_proj, c_fc, lm_head", "all-linear"],
        ),
        ({"lora_target_modules": ["attn"]}, ["h.0.attn is no linear layer", "c_attn"]),
        ({"lora_target_modules": ["wpe"]}, ["wpe is no linear layer", "--lora_modules_to_save"]),
        ({"lora_target_modules": ["lm_head"]}, ["lm_head and transformer.wte are one weight"]),
        ({"lora_modules_to_save": ["head"]}, ["--lora_modules_to_save head", "wte", "lm_head"]),
        (
            {"lora_modules_to_save": ["wte"], "pad_vocab_to_multiple_of": 64},
            ["rows that only pad the vocabulary", "--pad_vocab_to_multiple_of"],
        ),
        (
            {"lora_target_modules": ["c_fc"], "lora_modules_to_save": ["mlp"]},
            ["--lora_target_modules c_fc", "no such module left"],
        ),
    ],
)
def test_names_that_do_not_fit_are_told(
    changes: dict[str, Any], words: list[str], place: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        build(**changes)
    assert [word for word in words if word not in str(caught.value)] == []
