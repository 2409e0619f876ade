"""The CPU fast path computes the same function and saves the same model; memory is kept safely."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from llm_training import cpu_speed
from llm_training.cpu_speed import fast_path_line, fuse_gelu, keep_memory_warm

GIB = 2**30


def tiny_gpt2(seed: int = 0, **overrides: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, **overrides
    )
    config.bos_token_id = config.eos_token_id = 0
    return AutoModelForCausalLM.from_config(config)


def value_and_gradient(activation: nn.Module, inputs: torch.Tensor) -> tuple:
    inputs = inputs.clone().requires_grad_()
    outputs = activation(inputs)
    outputs.sum().backward()
    return outputs.detach(), inputs.grad


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-9),  # gelu_fast has ten digits of a constant
        (torch.float32, 2e-6),  # from the exact gradient, either is up to 1e-6 away
    ],
)
@pytest.mark.parametrize(
    "name", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"]
)
def test_the_fused_form_is_the_same_function(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    block = nn.Sequential(ACT2FN[name])
    inputs = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30])]).to(dtype)
    expected = value_and_gradient(block, inputs)
    assert fuse_gelu(block) == (name != "gelu_pytorch_tanh")  # that one is fused already
    found = value_and_gradient(block, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance / 2, atol=tolerance / 2)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gelu", "gelu_python", "quick_gelu", "gelu_10", "silu", "relu"])
def test_other_functions_stay(name: str) -> None:
    block = nn.Sequential(ACT2FN[name])
    before = block[0]
    assert fuse_gelu(block) == 0
    assert block[0] is before


def test_every_block_is_found_whatever_its_name() -> None:
    assert fuse_gelu(tiny_gpt2()) == 2  # mlp.act
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=64,
        hidden_act="gelu_new",  # mlp.act_fn
    )
    llama = AutoModelForCausalLM.from_config(config)
    assert fuse_gelu(llama) == 3
    assert fuse_gelu(llama) == 0


def test_the_curve_is_the_same() -> None:
    losses = {is_fused: loss_curve(is_fused) for is_fused in (False, True)}
    assert losses[True][-1] < losses[True][0] - 0.5  # it learns
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def loss_curve(is_fused: bool) -> list[float]:
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    if is_fused:
        assert fuse_gelu(model) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(10):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_what_is_saved_is_the_same(tmp_path: Path) -> None:
    plain, fused = tiny_gpt2(), tiny_gpt2()
    fuse_gelu(fused)
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "fused")]
    assert configs[0] == configs[1]
    assert configs[0]["activation_function"] == "gelu_new"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fused")]
    assert weights[0] == weights[1]


def test_training_mode_is_kept() -> None:
    model = tiny_gpt2().eval()
    fuse_gelu(model)
    assert not any(module.training for module in model.modules())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Lets `keep_memory_warm` meet a system; the dict then holds what glibc was told."""

    def pretend(free: float, system: str = "Linux", libc: str = "glibc", largest: int = 2**31 - 1):
        settings: dict[int, int] = {}

        def mallopt(name: int, value: int) -> int:
            if name == cpu_speed.M_MMAP_THRESHOLD and value > largest:
                return 0
            settings[name] = value
            return 1

        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.libc_ver", lambda: (libc, "2.36"))
        monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
        memory = SimpleNamespace(available=int(free))
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        return settings

    return pretend


def test_a_quarter_of_the_free_memory_is_kept(told: Callable) -> None:
    settings = told(free=6 * GIB)
    assert keep_memory_warm() == "freed memory kept (up to 1.5 GiB)"
    limit = int(1.5 * GIB)
    assert settings == {cpu_speed.M_MMAP_THRESHOLD: limit, cpu_speed.M_TRIM_THRESHOLD: limit}


def test_processes_of_a_machine_share_the_quarter(
    told: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = told(free=6 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert keep_memory_warm() == "freed memory kept (up to 0.5 GiB)"
    assert set(settings.values()) == {GIB // 2}


def test_the_limit_fits_into_what_glibc_takes(told: Callable) -> None:
    settings = told(free=200 * GIB)
    keep_memory_warm()
    assert set(settings.values()) == {2**31 - 1}


def test_an_older_glibc_gets_what_it_takes(told: Callable) -> None:
    settings = told(free=8 * GIB, largest=32 * 2**20)
    assert "kept" in keep_memory_warm()
    assert settings[cpu_speed.M_MMAP_THRESHOLD] == 32 * 2**20
    assert settings[cpu_speed.M_TRIM_THRESHOLD] == 2 * GIB - 1


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ({"free": 1.5 * GIB}, "given back (only 1.5 GiB are free)"),
        ({"free": 8 * GIB, "system": "Darwin", "libc": ""}, "given back (no glibc)"),
        ({"free": 8 * GIB, "libc": ""}, "given back (no glibc)"),  # musl
        ({"free": 8 * GIB, "largest": 0}, "given back (glibc refused)"),
    ],
)
def test_memory_is_given_back_where_it_is_short_or_cannot_be_kept(
    system: dict, expected: str, told: Callable
) -> None:
    settings = told(**system)
    assert expected in keep_memory_warm()
    assert settings == {}


def test_the_line_names_what_is_done() -> None:
    line = fast_path_line(6, 25, "freed memory kept (up to 1.5 GiB)")
    assert line == (
        "CPU      GELU fused in 6 blocks, dropout from random bits in 25 places,"
        " freed memory kept (up to 1.5 GiB)"
    )
    assert fast_path_line(0, 0, "freed memory given back") == "CPU      freed memory given back"
