"""Noise on embeddings is as strong as asked, is there in training alone, and follows the seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from arguments import Arguments, BatchSizes
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.compiling import compile_plugin
from llm_training.launch_settings import LaunchSettings
from llm_training.losses import shift_labels
from llm_training.neftune import EmbeddingNoise, add_embedding_noise, document_lengths
from llm_training.network import build_network
from tests.host_waits import HostWaits
from tests.small_runs import curve, open_place, train_small, weights

ALPHA, WIDTH, VOCAB_SIZE = 5.0, 64, 97
IDS = torch.arange(128).view(4, 32) * 5 % VOCAB_SIZE
# Rows of 32 positions: one document, two, many of one token, and one with padding behind it.
LENGTHS = [[32], [20, 12], [1] * 32, [3, 29]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
LENGTH_AT = torch.stack([torch.cat([torch.full((n,), n) for n in row]) for row in LENGTHS])


def make_network(
    alpha: float | None = ALPHA, *, kind: str = "llama", num_parts: int = 1
) -> CausalLMWithLoss:
    sizes = {
        "vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "hidden_size": WIDTH,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    network = CausalLMWithLoss(model)
    add_embedding_noise(network, alpha, num_parts=num_parts)
    return network.train()


def noise_of(network: CausalLMWithLoss, **inputs: Tensor) -> Tensor:
    """What was added to the embeddings of `IDS` in one forward pass, (4, 32, `WIDTH`)."""
    seen: list[Tensor] = []
    table = network.model.get_input_embeddings()
    # Behind the hook of the noise: this one sees what the model goes on with.
    hook = table.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    network(input_ids=IDS, **inputs)
    hook.remove()
    (embeddings,) = seen
    return embeddings - table.weight.detach()[IDS]


def require_uniform(noise: Tensor, bounds: Tensor | float) -> None:
    """Between -bound and bound, up to there, and as often on each side."""
    shares = noise / bounds
    assert shares.abs().max() <= 1.001
    assert shares.max() > 0.99 and shares.min() < -0.99
    assert abs(float(shares.mean())) < 0.03
    assert float(shares.std()) == pytest.approx(3**-0.5, rel=0.03)


def test_rows_get_noise_by_their_length() -> None:
    network = make_network()
    require_uniform(noise_of(network, labels=IDS), ALPHA / (32 * WIDTH) ** 0.5)
    require_uniform(noise_of(network), ALPHA / (32 * WIDTH) ** 0.5)


def test_documents_that_are_kept_apart_get_noise_by_their_own_length() -> None:
    noise = noise_of(make_network(), labels=IDS, position_ids=POSITIONS)
    bounds = ALPHA / (LENGTH_AT[..., None] * WIDTH) ** 0.5
    require_uniform(noise, bounds)
    for length in (1, 3, 12, 20, 29, 32):
        places = length == LENGTH_AT
        assert 0.95 < float((noise / bounds)[places].abs().max()) <= 1.001, length


def test_rows_that_ranks_share_are_as_long_as_all_their_parts() -> None:
    network = make_network(num_parts=4)
    shared = {"next_tokens": shift_labels(IDS), "position_ids": POSITIONS[:1].expand(4, -1)}
    require_uniform(noise_of(network, **shared), ALPHA / (4 * 32 * WIDTH) ** 0.5)


def test_lengths_are_those_of_documents_also_where_rows_are_put_together() -> None:
    assert torch.equal(document_lengths(POSITIONS), LENGTH_AT)
    # As flash attention gets them.
    assert torch.equal(document_lengths(POSITIONS.view(1, -1)), LENGTH_AT.view(1, -1))


def test_the_device_is_asked_nothing() -> None:
    noise, embeddings = EmbeddingNoise(ALPHA), torch.zeros(4, 32, WIDTH)
    with HostWaits() as waits, noise.in_documents(POSITIONS):
        assert noise(torch.nn.Identity().train(), (), embeddings) is not None
        assert waits.take() == []


def test_each_pass_has_noise_of_its_own_that_follows_the_seed() -> None:
    network = make_network()
    torch.manual_seed(3)
    first, second = noise_of(network), noise_of(network)
    torch.manual_seed(3)
    assert torch.equal(noise_of(network), first)
    assert not torch.isclose(first, second).any(-1).any()
    assert not torch.isclose(first[0], first[1]).any(-1).any()  # nor are two rows alike


def test_in_16_bits_it_is_the_same_noise() -> None:
    noise, module = EmbeddingNoise(ALPHA), torch.nn.Identity().train()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        found.append(noise(module, (), torch.zeros(4, 32, WIDTH, dtype=dtype)))
    exact, rounded = found
    assert exact is not None and rounded is not None and rounded.dtype == torch.bfloat16
    assert torch.equal(exact.bfloat16(), rounded)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_training_there_is_none_and_nothing_of_it_is_saved(kind: str) -> None:
    network, plain = make_network(kind=kind).eval(), make_network(None, kind=kind).eval()
    state = torch.get_rng_state()
    assert torch.equal(network(IDS)[0], plain(IDS)[0])
    spoken = network.model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(spoken, plain.model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(network.train()(IDS)[0], plain.train()(IDS)[0])


def test_the_gradient_passes_through() -> None:
    network = make_network()
    network(IDS, next_tokens=IDS.roll(-1, 1))[0].backward()
    gradient = network.model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient[IDS.unique()].any(-1).all()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_network_is_told_how_many_ranks_share_a_row(
    cp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_network(None).model
    monkeypatch.setattr("llm_training.network.build_model", lambda *_, **__: model)
    monkeypatch.setattr("llm_training.network.check_row_split", lambda *_: None)
    network, lines = build_network(
        SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"),  # type: ignore[arg-type]
        Arguments(model_type="llama", neftune_noise_alpha=ALPHA),
        LaunchSettings(cp_size=cp_size),
        model.config,
        BatchSizes(per_device=1, accumulation=1, processes=1, global_batch=1),
        block_size=32,
    )
    assert "NEFTune  noise of 5 / sqrt(tokens x 64) on the embeddings while training" in lines
    require_uniform(noise_of(network), ALPHA / (cp_size * 32 * WIDTH) ** 0.5)


# ------------------------------------------------------------------------------------------- runs

NOISY: dict[str, Any] = {"neftune_noise_alpha": ALPHA, "dropout": 0.0, "learning_rate": 1e-2}
EVALUATED: dict[str, Any] = {"eval_steps": 2, "validation_split_percentage": 20}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch._dynamo.reset()
    return open_place(tmp_path, monkeypatch)


def numbers(folder: Path, name: str) -> list[float]:
    found = [line[name] for line in curve(folder) if name in line]
    assert found
    return found


def losses_of(folder: Path) -> list[float]:
    return numbers(folder, "train/loss")


def test_a_run_trains_with_noise_and_is_judged_without(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train_small(place, "plain", **NOISY | EVALUATED | {"neftune_noise_alpha": None})
    assert "NEFTune" not in capsys.readouterr().out
    noisy = train_small(place, "noisy", **NOISY | EVALUATED)
    said = capsys.readouterr().out
    assert "NEFTune  noise of 5 / sqrt(tokens x 16) on the embeddings while training" in said
    assert curve(noisy)[0] == curve(plain)[0] and "eval/loss" in curve(plain)[0]  # at step 0
    assert all(a != b for a, b in zip(losses_of(noisy), losses_of(plain), strict=True))
    assert losses_of(noisy)[-1] < losses_of(noisy)[0]  # it learns


@pytest.mark.parametrize(
    "how",
    [{}, {"document_mask": True, "gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}],
    ids=["plain", "documents", "bf16"],
)
def test_a_stopped_run_goes_on_bit_for_bit(how: dict[str, Any], place: Path) -> None:
    how = NOISY | EVALUATED | {"dropout": 0.1, "sample_steps": 1, "sample_prompt": ["Die"]} | how
    whole = train_small(place, "whole", **how)
    start = str(whole / "checkpoints/step-00000002")
    again = train_small(place, "again", resume_from_checkpoint=start, **how)
    expected = [line for line in curve(whole) if line["step"] > 2]
    assert len(expected) >= 2 and curve(again)[-len(expected) :] == expected
    assert weights(again) == weights(whole)


def test_recomputed_activations_train_the_same_curve(place: Path) -> None:
    plain = train_small(place, "plain", **NOISY)
    again = train_small(place, "again", **NOISY, gradient_checkpointing=True)
    assert losses_of(again) == losses_of(plain)


def test_an_adapter_learns_under_noise(place: Path) -> None:
    train_small(place, "base", **NOISY | {"neftune_noise_alpha": None})
    how = NOISY | {
        "model_type": None, "config_overrides": {}, "dropout": None, "lora_rank": 2,
        "lora_target_modules": ["c_attn"], "lora_modules_to_save": ["wte"],
        "model_name_or_path": str(place / "base/final"),
    }  # fmt: skip
    plain = losses_of(train_small(place, "plain", **how | {"neftune_noise_alpha": None}))
    noisy = losses_of(train_small(place, "noisy", **how))
    assert all(a != b for a, b in zip(noisy, plain, strict=True))
    assert noisy[-1] < noisy[0]
    assert (place / "noisy/final/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("scope", ["blocks", "model"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_compiled_run_has_the_same_curve(
    scope: str, document_mask: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(arguments: Any) -> TorchDynamoPlugin:  # which takes no compiler
        asked = compile_plugin(arguments)
        backend = "aot_eager" if arguments.torch_compile else "no"
        return TorchDynamoPlugin(
            backend=backend, use_regional_compilation=asked.use_regional_compilation
        )

    monkeypatch.setattr("llm_training.launch.compile_plugin", traced)
    how = NOISY | EVALUATED | {"document_mask": document_mask}
    plain = train_small(place, "plain", **how)
    compiled = train_small(place, "compiled", **how, torch_compile=True, torch_compile_scope=scope)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert numbers(compiled, name) == pytest.approx(numbers(plain, name), rel=1e-5), name
