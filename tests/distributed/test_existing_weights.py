"""Weights that several processes load, or cut while they load them, train as the whole ones do.

So do those whose embedding grows meanwhile; and what is missing is refused by all of them alike.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llm_training.data.tokens.tokenizers import train_tokenizer
from tests.distributed.launching import ROOT, launch

pytestmark = pytest.mark.distributed

NEW = [f"<|new {i}|>" for i in range(43)]


@pytest.fixture
def place(text_folder: Path, tmp_path: Path) -> Path:
    """A folder with a small llama and the settings of a run that trains it."""
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=257,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "model")
    values = {
        "model_name_or_path": str(tmp_path / "model"),
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
    return tmp_path


def run(place: Path, config_name: str, *words: str) -> tuple[list[list[float]], str]:
    """Loss and gradient norm of each step, and what was said."""
    out = place / config_name
    words = (str(place / "run.json"), "--output_dir", str(out), *words)
    said = launch(config_name, ROOT / "train_llm.py", *words).stdout
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    curve = [[line["train/loss"], line["train/grad_norm"]] for line in log if "train/loss" in line]
    assert len(curve) == 8
    return curve, said


def model_line(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("Model    llama"))


def assert_equal(curves: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(curves), torch.tensor(expected), rtol=1e-5, atol=0)


def test_existing_weights_under_zero_3_give_the_single_process_curve(place: Path) -> None:
    single, said = run(place, "single")
    cut, said_of_cut = run(place, "zero3")
    assert_equal(cut, single)
    assert "2 processes (ZeRO-3)" in model_line(said_of_cut)
    assert model_line(said_of_cut).split(";")[0] == model_line(said).split(";")[0]


@pytest.mark.parametrize(
    ("is_tied", "backends"), [(False, ["ddp", "zero3", "tp"]), (True, ["fsdp", "zero3"])]
)
def test_an_embedding_grows_alike_in_every_backend(
    is_tied: bool, backends: list[str], place: Path
) -> None:
    if is_tied:
        config = LlamaConfig.from_pretrained(place / "model", tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(place / "model")
    words = ("--special_tokens", *NEW)
    single, said = run(place, "single", *words)
    line = "the embedding grows from 257 to 300 rows"
    assert line in said
    first = load_file(place / "single/final/model.safetensors")
    assert ("lm_head.weight" in first) is not is_tied
    for config_name in backends:
        split, said_of_split = run(place, config_name, *words)
        assert said_of_split.count(line) == 1
        assert_equal(split, single)
        last = load_file(place / config_name / "final/model.safetensors")
        assert last.keys() == first.keys()
        assert last["model.embed_tokens.weight"].shape == (300, 32)
        for name in last.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            torch.testing.assert_close(last[name], first[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config_name", ["zero3", "tp"])
def test_every_process_refuses_weights_that_are_not_all_there(
    config_name: str, place: Path
) -> None:
    path = place / "model/config.json"
    config = json.loads(path.read_text()) | {"intermediate_size": 80}
    path.write_text(json.dumps(config), encoding="utf-8")
    words = (str(place / "run.json"), "--output_dir", str(place / "out"))
    ended = launch(config_name, ROOT / "train_llm.py", *words, check=False)
    assert ended.returncode != 0
    assert (
        "6 have another shape (model.layers.0.mlp.down_proj.weight: 32 x 64 there" in ended.stderr
    )
    assert not (place / "out/checkpoints").exists() or not [*(place / "out/checkpoints").iterdir()]
