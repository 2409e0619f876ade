"""On a GPU adapters train the curve of a CPU, and are written and opened as there.

So they do beside frozen matrices in bfloat16, to the bit, and in 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.small_runs import curve, open_place, train_small

pytestmark = pytest.mark.gpu

CHANGES: dict[str, Any] = {
    "model_type": None,
    "config_overrides": {},
    "model_name_or_path": "base",
    "dropout": None,
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "max_steps": 8,
}
FORMS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"gradient_checkpointing": True}]


def open_with_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = open_place(folder, monkeypatch)
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=257, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    return place


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "dora", "recomputed"])
def test_adapters_train_the_curve_of_a_cpu(
    form: dict[str, Any],
    precision: str,
    tolerance: float,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = open_with_base(tmp_path, monkeypatch)
    settings = CHANGES | form
    on_cpu = curve(train_small(place, "cpu", **settings))
    there = curve(train_small(place, "there", **settings, device=device, mixed_precision=precision))
    losses = [[line["train/loss"] for line in lines] for lines in (there, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert (place / "there/final/adapter_model.safetensors").is_file()


def test_frozen_matrices_in_bfloat16_change_no_bit_of_the_curve(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_with_base(tmp_path, monkeypatch)
    common = CHANGES | {"device": device, "mixed_precision": "bf16", "deterministic": True}
    runs = [
        train_small(place, dtype, **common, frozen_dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    assert curve(runs[1]) == curve(runs[0])
    tensors = [load_file(run / "final" / "adapter_model.safetensors") for run in runs]
    assert all(torch.equal(tensors[1][name], tensors[0][name]) for name in tensors[0])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_beside_4_bits_they_train_the_curve_of_a_cpu(
    precision: str,
    tolerance: float,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check of the export is part of it: the adapter opened again, beside 4 bits anew."""
    pytest.importorskip("bitsandbytes")
    place = open_with_base(tmp_path, monkeypatch)
    settings = CHANGES | {"frozen_dtype": "nf4"}
    on_cpu = curve(train_small(place, "cpu", **settings))
    there = curve(train_small(place, "there", **settings, device=device, mixed_precision=precision))
    losses = [[line["train/loss"] for line in lines] for lines in (there, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert (place / "there/final/adapter_model.safetensors").is_file()
