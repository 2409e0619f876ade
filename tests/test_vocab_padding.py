"""A padded vocabulary changes nothing but the number of rows, which stay zeros and unpredicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from arguments import Arguments
from llm_training import chunked_loss, modeling
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.losses import IGNORE_INDEX, row_losses, shift_labels, token_loss_sum
from llm_training.modeling import (
    ModelError,
    choose_chunked_loss,
    count_parameters,
    fit_vocab,
    model_fingerprint,
)
from llm_training.optim import build_optimizer
from llm_training.vocab_padding import PaddedHead, cut_padding, num_tokens_of, pad_vocab
from tests.small_runs import curve, open_place, train_small, weights

VOCAB_SIZE, NUM_ROWS = 97, 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GATED = {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, tied": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama, untied": ("llama", GATED),
    "llama, tied": ("llama", {**GATED, "tie_word_embeddings": True}),
    "phi, with bias": ("phi", {**GATED, "resid_pdrop": 0.0}),
}
IDS = torch.arange(32).view(2, 16) * 5 % VOCAB_SIZE
LABELS = IDS.where(IDS % 3 > 0, IGNORE_INDEX)
TRAINED = Arguments(learning_rate=1e-2, weight_decay=0.5, adam_epsilon=1e-3)


def make(name: str, *, num_rows: int = VOCAB_SIZE) -> PreTrainedModel:
    kind, changes = KINDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **changes))
    state = torch.get_rng_state()
    if num_rows > VOCAB_SIZE:
        pad_vocab(model, num_rows)
    assert torch.equal(torch.get_rng_state(), state)
    return model.train()


def asked(multiple: int | None, **changes: Any) -> Arguments:
    changes = {"model_type": "llama"} | changes
    return Arguments(pad_vocab_to_multiple_of=multiple, **changes)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_BYTES", 4 * NUM_ROWS * 5)


def train(network: CausalLMWithLoss, num_steps: int = 5) -> dict[str, Tensor]:
    """Losses, gradient norms and the weights after some steps of AdamW."""
    optimizer = build_optimizer(network, TRAINED, "cpu")
    found = []
    for _ in range(num_steps):
        loss, _ = network(IDS, LABELS)
        optimizer.zero_grad()
        (loss / 20).backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        found.append(torch.stack([loss.detach(), norm]))
    held = dict(network.model.state_dict(keep_vars=True))
    for name, weight in held.items():
        if weight.shape[:1] == (NUM_ROWS,):
            assert weight.grad is not None and weight[:VOCAB_SIZE].any()
            assert not weight[VOCAB_SIZE:].any() and not weight.grad[VOCAB_SIZE:].any(), name
    return {"curve": torch.stack(found), **cut_padding(held, network.model)}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_curve_and_weights_are_those_of_the_model_without_padding(
    name: str, is_chunked: bool
) -> None:
    expected = train(CausalLMWithLoss(make(name), chunked_loss=is_chunked))
    found = train(CausalLMWithLoss(make(name, num_rows=NUM_ROWS), chunked_loss=is_chunked))
    assert found.keys() == expected.keys()
    assert expected["curve"][-1, 0] < 0.9 * expected["curve"][0, 0]  # it learns
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-6), key


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_too_the_rows_get_nothing(is_chunked: bool, dtype: torch.dtype) -> None:
    network = CausalLMWithLoss(make("phi, with bias", num_rows=NUM_ROWS), chunked_loss=is_chunked)
    with torch.autocast("cpu", dtype):
        loss, _ = network(IDS, LABELS)
    loss.backward()
    head = network.model.get_output_embeddings()
    for gradient in (head.weight.grad, head.bias.grad):
        assert gradient.isfinite().all() and gradient[:VOCAB_SIZE].any()
        assert not gradient[VOCAB_SIZE:].any()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_row_without_a_token_is_never_guessed(name: str, is_chunked: bool) -> None:
    model, plain = make(name, num_rows=NUM_ROWS), make(name)
    with torch.no_grad():  # as bad as can be: all tokens are unlikely, zeros would win
        for network in (model, plain):
            network.base_model.register_forward_hook(
                lambda _, __, output: setattr(output, "last_hidden_state", output[0].abs() + 1)
            )
            network.get_output_embeddings().weight[:VOCAB_SIZE] = -1.0
            network.get_output_embeddings().weight[7] = -0.9
    network = CausalLMWithLoss(model, chunked_loss=is_chunked).eval()
    sevens = torch.full_like(IDS, 7)
    with torch.no_grad():
        losses, guesses = network(IDS, next_tokens=sevens, per_row=True, with_guesses=True)
    assert torch.equal(guesses, sevens)
    expected = row_losses(plain(IDS).logits.detach(), sevens)
    assert torch.allclose(losses, expected, rtol=1e-6)
    logits = network(IDS)[0]
    assert torch.equal(logits[..., :VOCAB_SIZE].argmax(-1), sevens)
    assert (logits[..., VOCAB_SIZE:] == -torch.inf).all()
    spoken = model.generate(IDS[:1], max_new_tokens=4, do_sample=True, temperature=2.0)
    assert spoken.max() < VOCAB_SIZE


def test_only_a_few_logits_are_written_and_none_copied() -> None:
    sizes: dict[str, list[int]] = {"plain": [], "padded": []}

    class Watch(TorchDispatchMode):
        def __init__(self, noted: list[int]):
            super().__init__()
            self.noted = noted

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None:
                self.noted.append(result.numel())
            return result

    for key, num_rows in (("plain", NUM_ROWS), ("padded", NUM_ROWS)):
        model = make("llama, untied", num_rows=num_rows)
        if key == "plain":  # of the same size, with tokens in all rows
            model.get_output_embeddings().num_tokens = NUM_ROWS
        with Watch(sizes[key]):
            token_loss_sum(model(IDS).logits, shift_labels(LABELS)).backward()
    large = IDS.numel() * NUM_ROWS
    counts = {key: sum(size >= large for size in noted) for key, noted in sizes.items()}
    assert counts["padded"] == counts["plain"] > 0


def test_ties_and_counts_are_those_without_padding() -> None:
    for name in KINDS:
        plain, padded = make(name), make(name, num_rows=NUM_ROWS)
        table, head = padded.get_input_embeddings(), padded.get_output_embeddings()
        assert (table.weight is head.weight) == ("tied" in name and "untied" not in name)
        assert table.weight.shape[0] == padded.config.vocab_size == NUM_ROWS
        assert num_tokens_of(padded) == num_tokens_of(plain) == VOCAB_SIZE
        assert count_parameters(padded) == count_parameters(plain)
        assert [n for n, _ in padded.named_parameters()] == [n for n, _ in plain.named_parameters()]


# --------------------------------------------------------------------------------- which are padded


def test_large_new_models_are_padded_and_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "LARGE_VOCAB", VOCAB_SIZE)
    model = make("llama, untied")
    assert fit_vocab(model, asked(1)) == []
    assert fit_vocab(model, asked(None, model_type=None, model_name_or_path="there")) == []
    assert type(model.get_output_embeddings()) is nn.Linear
    (line,) = fit_vocab(model, asked(None))
    assert line == "Vocabulary 97 tokens, embedding padded to 128 rows (a multiple of 64)"
    assert type(model.get_output_embeddings()) is PaddedHead
    monkeypatch.setattr(modeling, "LARGE_VOCAB", VOCAB_SIZE + 1)
    assert fit_vocab(make("llama, untied"), asked(None)) == []


def test_a_loaded_model_is_padded_where_asked_for() -> None:
    model = make("gpt2, tied")
    assert choose_chunked_loss(model, None, num_positions=2**22, device_type="cpu")[0]
    loaded = asked(10, model_type=None, model_name_or_path="there")
    assert fit_vocab(model, loaded)[0].endswith("padded to 100 rows (a multiple of 10)")
    assert choose_chunked_loss(model, None, num_positions=2**22, device_type="cpu")[0]
    assert fit_vocab(make("gpt2, tied"), asked(97)) == []


def bends() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma2", **SHAPE, **GATED, head_dim=8)
    )


def with_another_table() -> PreTrainedModel:
    model = make("llama, untied")
    model.model.second = nn.Embedding(VOCAB_SIZE, 4)
    return model


def with_another_head() -> PreTrainedModel:
    model = make("llama, untied")
    model.lm_head = nn.Sequential(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("build", "tp_size", "reason"),
    [
        (lambda: make("llama, untied"), 2, "2 ranks share the head (tensor parallelism)"),
        (bends, 1, "gemma2 changes what its head returns before it is judged"),
        (with_another_table, 1, "model.second.weight of llama has a row for each token too"),
        (with_another_head, 1, "the head of llama is no plain linear layer with an output for"),
    ],
)
def test_what_cannot_be_padded_is_left_or_refused(
    build: Callable[[], PreTrainedModel],
    tp_size: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modeling, "LARGE_VOCAB", VOCAB_SIZE)
    model = build()
    before = model_fingerprint(model)
    (line,) = fit_vocab(model, asked(None), tp_size=tp_size)
    assert line.startswith(f"Vocabulary 97 tokens, not padded: {reason}")
    with pytest.raises(ModelError, match=r"^--pad_vocab_to_multiple_of 8: ") as caught:
        fit_vocab(model, asked(8), tp_size=tp_size)
    assert reason in str(caught.value)
    assert model_fingerprint(model) == before


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_place(tmp_path, monkeypatch)


SETTINGS: dict[str, Any] = {
    "eval_steps": 2,
    "validation_split_percentage": 20,
    "adam_epsilon": 1e-3,
    "sample_prompt": "Die",
    "document_mask": True,
}


def test_a_run_and_what_it_leaves_are_those_without_padding(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_small(place, "plain", **SETTINGS)
    plain = capsys.readouterr().out
    train_small(place, "padded", pad_vocab_to_multiple_of=64, **SETTINGS)
    said = capsys.readouterr().out
    line = "Vocabulary 257 tokens, embedding padded to 320 rows (a multiple of 64)"
    assert line in said.splitlines()
    models = [[x for x in text.splitlines() if "parameters" in x] for text in (plain, said)]
    assert len(models[0]) == 1 and models[0] == models[1]
    for padded, expected in zip(curve(place / "padded"), curve(place / "plain"), strict=True):
        error = padded.pop("eval/loss_stderr", 0.0)  # small differences of large sums
        assert error == pytest.approx(expected.pop("eval/loss_stderr", 0.0), abs=1e-7)
        assert padded == pytest.approx(expected, rel=1e-6)
    for name in ("config.json", "generation_config.json"):
        texts = [(place / run / "final" / name).read_text("utf-8") for run in ("plain", "padded")]
        assert texts[0] == texts[1]
    found, expected = weights(place / "padded"), weights(place / "plain")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), atol=1e-6), name
    samples = [
        json.loads((place / run / "result.json").read_text("utf-8"))["samples"]
        for run in ("plain", "padded")
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 2
    (checkpoint,) = (place / "padded/checkpoints/last").resolve().rglob("model*.safetensors")
    shapes = {tuple(tensor.shape) for tensor in load_file(checkpoint).values()}
    assert (320, 16) in shapes and (257, 16) not in shapes


def test_documents_are_told_apart_by_real_tokens(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "llm_training.run_data.check_document_mask",
        lambda *_, vocab_size, **__: seen.append(vocab_size),
    )
    train_small(place, pad_vocab_to_multiple_of=64, **SETTINGS)
    assert seen == [257]


def test_a_padded_run_goes_on_and_another_padding_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS | {"pad_vocab_to_multiple_of": 64}
    train_small(place, "whole", **settings)
    train_small(place, "halves", **settings)
    for name in ("step-00000003", "step-00000004"):
        path = place / "halves/checkpoints" / name
        path.rename(path.with_name(f"{name}.away"))
    (place / "halves/result.json").unlink()
    capsys.readouterr()
    train_small(place, "halves", 1, **SETTINGS, pad_vocab_to_multiple_of=100)
    refused = capsys.readouterr().err
    assert "257 tokens in 320 rows (pad_vocab_to_multiple_of) there" in refused
    assert "257 tokens in 300 rows (pad_vocab_to_multiple_of) here" in refused
    train_small(place, "halves", 1, **SETTINGS)
    assert "(pad_vocab_to_multiple_of) there" in capsys.readouterr().err
    train_small(place, "halves", eval_only=True, **settings)
    train_small(place, "halves", **settings)
    assert weights(place / "halves") == weights(place / "whole")
