"""On a GPU adapters train the curve of a CPU, and are written and opened as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
    place = open_place(tmp_path, monkeypatch)
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=257, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    settings = CHANGES | form
    on_cpu = curve(train_small(place, "cpu", **settings))
    there = curve(train_small(place, "there", **settings, device=device, mixed_precision=precision))
    losses = [[line["train/loss"] for line in lines] for lines in (there, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert (place / "there/final/adapter_model.safetensors").is_file()
