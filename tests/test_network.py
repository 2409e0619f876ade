"""Proves that a network takes the form that its device computes best, and says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from arguments import Arguments, BatchSizes
from llm_training.chunked_loss import ChunkedHead
from llm_training.cpu_dropout import CpuDropout
from llm_training.launch_settings import LaunchSettings
from llm_training.network import build_network
from tests.small_runs import curve, open_place, train_small, weights


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_place(tmp_path, monkeypatch)


def test_the_fast_path_is_said_and_can_be_turned_off(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_small(place, "fast", max_steps=8, dropout=0.0)
    assert "CPU      GELU fused in 1 blocks, freed memory " in capsys.readouterr().out
    monkeypatch.setattr("llm_training.network.keep_memory_warm", lambda: pytest.fail("called"))
    train_small(place, "plain", max_steps=8, dropout=0.0, cpu_fast_path=False)
    assert "CPU  " not in capsys.readouterr().out
    for fast, plain in zip(curve(place / "fast"), curve(place / "plain"), strict=True):
        assert fast == pytest.approx(plain, rel=1e-5)
    assert (place / "fast/final/config.json").read_bytes() == (
        place / "plain/final/config.json"
    ).read_bytes()
    assert "gelu_new" in (place / "fast/final/config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("launch", "changes", "is_ours"),
    [
        ({}, {}, True),
        ({}, {"cpu_fast_path": False}, False),
        ({}, {"torch_compile": True}, False),
        ({"tp_size": 2}, {}, False),
        ({"cp_size": 2}, {}, False),  # attention over a rank's own positions would be another
    ],
)
def test_dropout_is_ours_where_this_process_computes_whole_rows(
    launch: dict, changes: dict, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 10, "n_positions": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    monkeypatch.setattr("llm_training.network.build_model", lambda *_, **__: model)
    monkeypatch.setattr("llm_training.network.check_row_split", lambda *_: None)
    monkeypatch.setattr("llm_training.network.keep_memory_warm", lambda: "memory")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "anywhere")
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    _, lines = build_network(
        accelerator,
        Arguments(model_type="gpt2", **changes),
        LaunchSettings(**launch),
        model.config,
        BatchSizes(per_device=1, accumulation=1, processes=1, global_batch=1),
        block_size=8,
    )
    assert isinstance(model.transformer.drop, CpuDropout) == is_ours
    assert any("dropout from random bits in 4 places" in line for line in lines) == is_ours


def test_a_chunked_loss_trains_the_same_curve(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seen_heads(monkeypatch)
    train_small(place, "whole", eval_steps=2, validation_split_percentage=20)
    monkeypatch.setattr("llm_training.chunked_loss.CPU_CHUNK_BYTES", 4 * 257 * 10)
    train_small(place, "chunked", eval_steps=2, validation_split_percentage=20)
    assert found == [nn.Linear, ChunkedHead]
    assert "Logits   128 positions x 257 tokens, of 10 positions at a time" in (
        capsys.readouterr().out
    )
    for chunked, whole in zip(curve(place / "chunked"), curve(place / "whole"), strict=True):
        assert chunked == pytest.approx(whole, rel=1e-5)
    assert weights(place / "chunked").keys() == weights(place / "whole").keys()


def seen_heads(monkeypatch: pytest.MonkeyPatch) -> list[type[nn.Module]]:
    """Fills with the kinds of heads of the networks that are prepared from now on."""
    found: list[type[nn.Module]] = []
    monkeypatch.setattr(
        "llm_training.run.model_fingerprint",
        lambda network: found.append(type(network.model.get_output_embeddings())) or "same",
    )
    return found


def test_flash_attention_needs_16_bits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_small(place, code=1, attn_implementation="flash_attention_2")
    assert "--attn_implementation flash_attention_2 computes in 16 bits" in capsys.readouterr().err
