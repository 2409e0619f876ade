"""Proves that utilization is counted as PaLM counts it, against the right device, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training import reporting
from llm_training.flops import PEAKS, count_multiplied, model_flops_per_token, peak_flops
from tests.small_runs import open_place, read_log, train_small


def flops(model_type: str, block_size: int = 1024, **overrides: object) -> float | None:
    config = AutoConfig.for_model(model_type, **overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_flops_per_token(model, config, block_size)


TINY = {
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# Of a layer of that size: four projections, and three matrices of the feed-forward part.
TINY_LAYER = 4 * 8 * 8 + 3 * 8 * 16


class TestModel:
    def test_gpt2_is_the_sum_made_by_hand(self) -> None:
        matrices = 12 * (768 * 3 * 768 + 768 * 768 + 2 * 768 * 4 * 768)
        head = 50257 * 768  # tied to the embedding, and multiplied
        attention = 12 * 12 * 12 * 64 * 1024
        assert flops("gpt2") == 6 * (matrices + head) + attention

    @pytest.mark.parametrize("is_tied", [True, False])
    def test_a_head_counts_once_and_an_embedding_never(self, is_tied: bool) -> None:
        expected = 6 * (2 * TINY_LAYER + 100 * 8) + 12 * 2 * 8 * 64
        assert flops("llama", 64, tie_word_embeddings=is_tied, **TINY) == expected

    def test_heads_may_have_a_size_of_their_own(self) -> None:
        wide = flops("qwen3", 64, head_dim=16, **TINY)
        projections = 4 * 8 * 32
        expected = 6 * (2 * (projections + 3 * 8 * 16) + 100 * 8) + 12 * 2 * 32 * 64
        assert wide == expected

    def test_of_the_experts_count_those_that_a_token_meets(self) -> None:
        config = AutoConfig.for_model("mixtral", num_local_experts=8, num_experts_per_tok=2, **TINY)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        router = 8 * 8
        layer = 4 * 8 * 8 + router + 2 * 3 * 8 * 16
        assert count_multiplied(model, config) == 2 * layer + 100 * 8

    def test_a_window_shortens_what_a_layer_attends_to(self) -> None:
        whole = flops("mistral", 64, sliding_window=None, **TINY)
        short = flops("mistral", 64, sliding_window=16, **TINY)
        assert whole is not None and short is not None
        assert whole - short == 12 * 2 * 8 * (64 - 16)

    @pytest.mark.parametrize(
        ("model_type", "overrides"),
        [("mamba", {"num_hidden_layers": 1}), ("qwen3_next", {"num_hidden_layers": 4})],
    )
    def test_of_other_layers_nothing_is_claimed(
        self, model_type: str, overrides: dict[str, object]
    ) -> None:
        assert flops(model_type, **overrides) is None


class TestDevice:
    @pytest.mark.parametrize(
        ("name", "precision", "tera"),
        [
            ("NVIDIA H200", "bf16", 989.5),
            ("NVIDIA H200 NVL", "bf16", 835),
            ("NVIDIA H100 80GB HBM3", "fp16", 989.5),
            ("NVIDIA H100 PCIe", "bf16", 756),
            ("NVIDIA H100 NVL", "bf16", 835),
            ("NVIDIA A100-SXM4-80GB", "bf16", 312),
            ("NVIDIA A100-SXM4-80GB", "tf32", 156),
            ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
            ("NVIDIA L4", "bf16", 121),
            ("NVIDIA L40S", "bf16", 362),
            ("NVIDIA A10", "bf16", 125),
            ("NVIDIA A10G", "bf16", 70),
            ("Tesla V100-SXM2-16GB", "fp16", 125),
            ("Tesla V100-PCIE-16GB", "fp16", 112),
            ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
            ("AMD Instinct MI300X", "bf16", 1307.4),
            ("NVIDIA B200", "bf16", 2250),
            ("NVIDIA GB200", "bf16", 2500),
        ],
    )
    def test_it_is_found_by_its_name(self, name: str, precision: str, tera: float) -> None:
        assert peak_flops(name, precision) == pytest.approx(tera * 1e12)

    @pytest.mark.parametrize(
        ("name", "precision"),
        [("cpu", "bf16"), ("NVIDIA H20", "bf16"), ("Tesla T4", "tf32"), ("NVIDIA L40", "bf16")],
    )
    def test_an_unknown_one_has_no_peak(self, name: str, precision: str) -> None:
        assert peak_flops(name, precision) is None

    def test_numbers_have_a_source_and_an_order(self) -> None:
        for name, peak in PEAKS.items():
            assert peak.source, name
            assert peak.half >= (peak.tf32 or 0) >= 0 and peak.half >= peak.fp32, name


class TestRun:
    def test_utilization_is_logged_against_the_peak_of_all_devices(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_place(tmp_path, monkeypatch)
        monkeypatch.setattr("llm_training.reporting.device_name", lambda _: "NVIDIA A100-SXM4")
        assert "perf/mfu" in read_log(train_small(place, "known"))[-1]
        provenance = (place / "known/provenance.json").read_text(encoding="utf-8")
        flops = json.loads(provenance)["flops_per_token"]
        for line in read_log(place / "known"):
            share = line["perf/tokens_per_second"] * flops / 19.5e12
            assert line["perf/mfu"] == pytest.approx(share)

    def test_of_an_unknown_device_it_is_absent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_place(tmp_path, monkeypatch)
        assert all("perf/mfu" not in line for line in read_log(train_small(place)))

    def test_tf32_counts_where_it_computes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reporting, "device_name", lambda _: "NVIDIA A100-SXM4")
        eight = SimpleNamespace(mixed_precision="no", num_processes=8)
        assert reporting.peak_of_all(eight) == 8 * 19.5e12
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert reporting.peak_of_all(eight) == 8 * 156e12
