"""Proves that frozen matrices held in bfloat16 leave the curve and what is written as they are.

To the bit, under bf16 autocast. `test_four_bits.py` has the 4 bits, `test_memory_needs.py` what is
told of the memory, `tests/distributed/test_lora.py` several processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import train_llm
from llm_training import launch
from llm_training.launch_settings import LaunchSettings
from llm_training.milestones import export
from llm_training.modeling import ModelError, model_fingerprint
from tests import test_memory_needs as memory
from tests.small_runs import curve
from tests.test_lora import FORMS, build, logits_of, place, train_adapters

__all__ = ["place"]  # a fixture
HALF: dict[str, Any] = {"frozen_dtype": "bfloat16", "mixed_precision": "bf16"}
FULL: dict[str, Any] = {"mixed_precision": "bf16"}
BLOCKS = {"gpt2": "*.h.*", "llama": "*.layers.*"}


def name_of(form: dict[str, Any]) -> str:
    return "-".join(map(str, form))


def round_files(place: Path) -> None:
    """Lets the bases hold what bfloat16 can, as most models on the hub do."""
    for file in place.glob("*/model.safetensors"):
        rounded = {name: t.bfloat16().float() for name, t in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})


def weights_of(run: Path) -> dict[str, Tensor]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


# -------------------------------------------------------------------------------- the same curve


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_the_curve_is_that_of_float32_to_the_bit(form: dict[str, Any], place: Path) -> None:
    round_files(place)
    full, half = (train_adapters(place, n, **form, **s) for n, s in (("f", FULL), ("h", HALF)))
    assert curve(half) == curve(full)
    losses = [line["train/loss"] for line in curve(half)]
    assert losses[0] == pytest.approx(5.5, abs=0.2) and len(set(losses)) == len(losses)
    assert_same(weights_of(half), weights_of(full))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[5]], ids=name_of)
def test_so_it_is_where_the_files_hold_float32(form: dict[str, Any], place: Path) -> None:
    """Autocast rounds them too. DoRA alone looks at a matrix without it."""
    full, half = (train_adapters(place, n, **form, **s) for n, s in (("f", FULL), ("h", HALF)))
    assert curve(half) == curve(full)
    assert_same(weights_of(half), weights_of(full))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_so_it_is_of_parameters_that_are_frozen(model: str, place: Path) -> None:
    """Blocks stay; embeddings, head and the last norm are trained."""
    round_files(place)
    form = {"model": model, "lora_rank": None, "freeze_parameters": [BLOCKS[model]]}
    full, half = (train_adapters(place, n, **form, **s) for n, s in (("f", FULL), ("h", HALF)))
    assert curve(half) == curve(full)
    assert_same(weights_of(half), weights_of(full))  # the whole model, frozen matrices too


def test_chunks_recomputation_and_samples_take_it(place: Path) -> None:
    more = {"chunked_loss": True, "gradient_checkpointing": True, "lora_dropout": 0.2}
    more |= {"sample_prompt": ["Die"], "sample_max_new_tokens": 4, "eval_steps": 2}
    form = {"model": "llama", "validation_file": "text.txt", **more}
    full, half = (train_adapters(place, n, **form, **s) for n, s in (("f", FULL), ("h", HALF)))
    assert curve(half) == curve(full)
    assert "eval/loss" in "".join(map(str, curve(half)))
    read = [(run / "samples.jsonl").read_text("utf-8") for run in (full, half)]
    assert read[0] == read[1] and read[0]


# ---------------------------------------------------------------------------------- what is held


def test_frozen_matrices_of_linear_layers_are_held_so_and_nothing_else(place: Path) -> None:
    changes = {"model": "llama", "lora_target_modules": ["q_proj"], **HALF}
    found = types_of(build(lora_modules_to_save=["down_proj"], **changes).network)
    for name, dtype in found.items():
        is_matrix = name.split(".")[-2] not in ("embed_tokens", "norm", "down_proj")
        is_matrix = is_matrix and "norm" not in name and ".lora_" not in name
        assert dtype == (torch.bfloat16 if is_matrix else torch.float32), name
    assert list(found.values()).count(torch.bfloat16) == 2 * 6 + 1


def test_a_tied_head_and_biases_stay(place: Path) -> None:
    run = build(model="gpt2", **HALF)
    found = types_of(run.network)
    half = {name.rpartition(".base_layer")[0] for name in found if found[name] == torch.bfloat16}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert half == {f"transformer.h.{i}.{part}" for i in range(2) for part in parts}
    assert all(t == torch.float32 for n, t in found.items() if n.endswith("bias") or "wte" in n)


def test_the_log_says_what_is_held_and_whether_it_is_rounded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model": "llama", "lora_modules_to_save": ["lm_head"], **HALF}
    count = 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24)
    line = f"Frozen   {count:,} parameters in 14 matrices are held in bfloat16"
    build(**changes)
    how = "14 of them rounded, as in each product before; so a whole model has them"
    assert f"{line}, {how}\n" in capsys.readouterr().out
    round_files(place)
    build(**changes)
    assert f"{line}, as they were stored\n" in capsys.readouterr().out
    train_adapters(place, dry_run=True, **changes)
    assert f"{line}\n" in capsys.readouterr().out


def test_the_memory_that_is_told_is_of_the_types_that_are_held() -> None:
    whole, half = (
        memory.settings("llama", lora_rank=4, mixed_precision="bf16", frozen_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    block = 2 * 128 * (128 + 64) + 3 * 128 * 352
    saved = 2 * (3 * block + memory.VOCAB_SIZE * 128)  # bytes, with the head
    pieces = {"single": 1, "ddp": 1, "fsdp": 2}
    for start in (memory.ALONE, *(LaunchSettings(b, num_processes=2) for b in ("ddp", "fsdp"))):
        told = [memory.computed(arguments, start).weights for arguments in (whole, half)]
        assert told[0] - told[1] == saved // pieces[start.backend]
    told = [memory.computed(arguments, memory.zero(2)).weights for arguments in (whole, half)]
    assert told[0] == told[1]  # the engine holds 16 bits anyway


def test_it_is_no_part_of_the_identity(place: Path) -> None:
    marks = {model_fingerprint(build(**settings).model) for settings in (FULL, HALF)}
    assert len(marks) == 1


# --------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("form", FORMS[:2] + FORMS[3:5], ids=name_of)
def test_merged_it_has_the_base_of_the_files_and_its_logits(
    form: dict[str, Any], place: Path
) -> None:
    round_files(place)
    base = load_file(place / form["model"] / "model.safetensors")
    run = build(merge_adapter=True, **form, **HALF)
    train_llm.train(run)
    with torch.autocast("cpu", torch.bfloat16):
        live = logits_of(run.network)
    export(run, run.output.final)
    opened = AutoModelForCausalLM.from_pretrained("built/final", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # rounds a sum, where the live model rounded parts
        difference = torch.linalg.vector_norm(logits_of(opened) - live)
    assert difference < 0.02 * torch.linalg.vector_norm(live)
    assert {t.dtype for t in load_file("built/final/model.safetensors").values()} == {torch.float32}

    now = {n.replace(".base_layer.", "."): t for n, t in run.network.state_dict().items()}
    changed = {name for name in base if not torch.equal(base[name], now[name].float())}
    whole = form.get("lora_modules_to_save", [])
    assert changed == {name for name in base if name.split(".")[-2] in whole}


def test_merging_adds_in_float32(place: Path) -> None:
    round_files(place)
    settings = {"model": "llama", "merge_adapter": True}
    full, half = (train_adapters(place, n, **settings, **s) for n, s in (("f", FULL), ("h", HALF)))
    assert_same(weights_of(half), weights_of(full))


def test_a_stopped_run_goes_on_bit_for_bit_also_from_float32(place: Path) -> None:
    common = {"lora_dropout": 0.2}
    whole = train_adapters(place, "whole", **common, **HALF)
    start = str(whole / "checkpoints" / "step-00000002")
    for name, settings in (("again", HALF), ("other", FULL)):
        run = train_adapters(place, name, resume_from_checkpoint=start, **common, **settings)
        assert curve(run) == curve(whole)[2:]
        assert_same(weights_of(run), weights_of(whole))


# --------------------------------------------------------------------------------- what is refused


def test_another_precision_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_bf16", lambda device_type: False)
    with pytest.raises(ModelError, match=r"computes in fp32.*--mixed_precision bf16"):
        build(frozen_dtype="bfloat16", mixed_precision="auto")


def test_where_no_matrix_is_frozen_it_is_refused(place: Path) -> None:
    with pytest.raises(ModelError, match="no linear layer of this gpt2 stays as it is"):
        build(lora_rank=None, freeze_parameters=["*.wpe.*"], **HALF)
