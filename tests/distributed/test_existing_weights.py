"""Weights that ZeRO-3 cuts while it loads them train as the whole ones do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.launching import ROOT, launch

pytestmark = pytest.mark.distributed


def test_existing_weights_under_zero_3_give_the_single_process_curve(
    text_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "tokenizer_name": "byte",
        "train_file": str(text_folder),
        "block_size": 64,
        "global_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "weight_decay": 5.0,  # a wrong choice of what decays must show
        "eval_steps": None,
        "save_steps": None,
        "logging_steps": 1,
        "mixed_precision": "fp32",
        "report_to": ["none"],
        "device": "cpu",
        "cache_dir": str(tmp_path / "token_cache"),
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    curves, models = {}, {}
    for config_name in ("single", "zero3"):
        out = tmp_path / config_name
        words = [str(tmp_path / "run.json"), "--output_dir", str(out)]
        said = launch(config_name, ROOT / "train_llm.py", *words).stdout
        models[config_name] = next(x for x in said.splitlines() if x.startswith("Model    llama"))
        log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
        curves[config_name] = [
            (line["train/loss"], line["train/grad_norm"]) for line in log if "train/loss" in line
        ]
    assert len(curves["single"]) == 8
    torch.testing.assert_close(
        torch.tensor(curves["zero3"]), torch.tensor(curves["single"]), rtol=1e-5, atol=0
    )
    assert "2 processes (ZeRO-3)" in models["zero3"]
    assert models["zero3"].split(";")[0] == models["single"].split(";")[0]
