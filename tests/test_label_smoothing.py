"""Smoothed labels shape the gradient as torch's do; the loss that is told stays the plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_training import chunked_loss
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.chunked_loss import linear_token_loss_sum
from llm_training.compiling import compile_plugin
from llm_training.losses import IGNORE_INDEX, shift_labels, slope_of_logits, token_loss_sum
from llm_training.vocab_padding import pad_vocab
from tests.small_runs import curve, open_place, train_small, weights

NUM_POSITIONS, VOCAB_SIZE, NUM_ROWS, WIDTH = 24, 97, 128, 16
SMOOTHING = 0.2
FACTOR = 0.37  # what the loss is multiplied by before the backward pass
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": WIDTH,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GATED = {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, tied": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama, untied": ("llama", GATED),
    "phi, with bias": ("phi", {**GATED, "resid_pdrop": 0.0}),
}
IDS = torch.arange(32).view(2, 16) * 5 % VOCAB_SIZE
LABELS = IDS.where(IDS % 3 > 0, IGNORE_INDEX)

Tensors = dict[str, Tensor]
each_kind = pytest.mark.parametrize("name", KINDS)
whole_and_chunked = pytest.mark.parametrize("is_chunked", [False, True])


def make_inputs(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (NUM_POSITIONS, WIDTH),
        "weight": (VOCAB_SIZE, WIDTH),
        "bias": (VOCAB_SIZE,),
    }
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def make_tokens() -> Tensor:
    tokens = torch.arange(NUM_POSITIONS) * 31 % VOCAB_SIZE
    return tokens.where(torch.arange(NUM_POSITIONS) % 3 != 1, IGNORE_INDEX)


def of_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, tokens, label_smoothing=SMOOTHING, reduction="sum")


def of_whole_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, e: float = SMOOTHING
) -> Tensor:
    logits = F.linear(hidden, weight, bias)[None]
    return token_loss_sum(logits, tokens[None], label_smoothing=e)


def of_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, e: float = SMOOTHING
) -> Tensor:
    return linear_token_loss_sum(hidden, weight, bias, tokens, 5, label_smoothing=e)


def results(compute: Callable[..., Tensor], inputs: Tensors, *others: Any) -> Tensors:
    """The loss and the gradients of all inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    loss = compute(leaves["hidden"], leaves["weight"], leaves.get("bias"), *others)
    (loss * FACTOR).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == inputs.keys()
    return {"loss": loss.detach(), **gradients}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_BYTES", 4 * NUM_ROWS * 5)


# ------------------------------------------------------------------------------- one layer, by hand


def test_the_slope_is_that_of_the_definition_in_double_precision() -> None:
    """(1 - e) of the true token's loss and e of the mean loss over all tokens."""
    logits = make_inputs(torch.float64)["hidden"].requires_grad_()
    targets = torch.arange(NUM_POSITIONS)[:, None] % WIDTH
    losses = -logits.log_softmax(-1)
    loss = (1 - SMOOTHING) * losses.gather(1, targets).sum() + SMOOTHING * losses.mean(-1).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    probabilities = logits.detach().softmax(-1)
    found = slope_of_logits(probabilities, targets, label_smoothing=SMOOTHING, num_tokens=WIDTH)
    assert difference(found, expected) < 1e-14


@pytest.mark.parametrize("compute", [of_whole_logits, of_chunks])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_the_gradient_is_that_of_torch_and_the_value_the_plain_loss(
    compute: Callable[..., Tensor], has_bias: bool, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_gpu:  # which is not asked where there is a target
        in_all = chunked_loss._slices
        monkeypatch.setattr(chunked_loss, "_places", lambda tokens, size: in_all(len(tokens), size))
    inputs, tokens = make_inputs(), make_tokens()
    if not has_bias:
        del inputs["bias"]
    expected, plain = results(of_torch, inputs, tokens), results(compute, inputs, tokens, 0.0)
    found = results(compute, inputs, tokens)
    assert torch.equal(found.pop("loss"), plain["loss"])
    assert difference(plain["loss"], expected["loss"]) > 1e-3  # torch tells the smoothed one
    for name, gradient in found.items():
        assert difference(gradient, expected[name]) < 1e-6, name
        assert difference(plain[name], expected[name]) > 1e-2, name


def test_without_smoothing_whole_logits_have_the_bits_of_torch() -> None:
    logits, tokens = make_inputs()["weight"], torch.arange(VOCAB_SIZE) % WIDTH
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = token_loss_sum(ours[None], tokens[None], label_smoothing=0.0)
    expected = F.cross_entropy(theirs, tokens, reduction="sum")
    assert torch.equal(loss.detach(), expected.detach())
    for tensor in (loss, expected):
        (tensor * FACTOR).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_both_forms_are_as_exact(dtype: torch.dtype) -> None:
    tokens, inputs = make_tokens(), make_inputs(dtype)
    exact = results(of_torch, {n: t.double() for n, t in inputs.items()}, tokens)
    del exact["loss"]
    masters = {name: tensor.float() for name, tensor in inputs.items()}
    errors = []
    for compute in (of_torch, of_whole_logits, of_chunks):
        with torch.autocast("cpu", dtype):
            found = results(compute, masters, tokens)
        errors.append({name: difference(found[name], exact[name]) for name in exact})
    for name in exact:
        assert max(error[name] for error in errors[1:]) < 1.1 * errors[0][name], (name, errors)
    assert errors[0]["hidden"] > 1e-5  # really computed in 16 bits


@pytest.mark.parametrize("compute", [of_whole_logits, of_chunks])
def test_rows_without_a_predicted_token_give_zero_and_no_gradient(
    compute: Callable[..., Tensor],
) -> None:
    nothing = torch.full((NUM_POSITIONS,), IGNORE_INDEX)
    found = results(compute, make_inputs(), nothing)
    assert not any(tensor.any() for tensor in found.values())


# ------------------------------------------------------------------------------------ whole models


def make(name: str, *, num_rows: int = VOCAB_SIZE) -> PreTrainedModel:
    kind, changes = KINDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **changes))
    if num_rows > VOCAB_SIZE:
        pad_vocab(model, num_rows)
    return model.train()


def torch_gradients(name: str) -> Tensors:
    """Of the plain model with torch's own smoothing."""
    model = make(name)
    logits = model(IDS).logits.flatten(0, 1)
    targets = shift_labels(LABELS).flatten()
    F.cross_entropy(logits, targets, label_smoothing=SMOOTHING, reduction="sum").backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("small_chunks")
@each_kind
@whole_and_chunked
@pytest.mark.parametrize("num_rows", [VOCAB_SIZE, NUM_ROWS])
@pytest.mark.parametrize("are_shifted", [False, True])
def test_a_model_has_the_gradients_of_torch_and_padding_gets_none(
    name: str, is_chunked: bool, num_rows: int, are_shifted: bool
) -> None:
    targets = {"next_tokens": shift_labels(LABELS)} if are_shifted else {"labels": LABELS}
    networks = [
        CausalLMWithLoss(make(name, num_rows=num_rows), chunked_loss=is_chunked, label_smoothing=e)
        for e in (0.0, SMOOTHING)
    ]
    losses = [network(IDS, **targets)[0] for network in networks]
    assert torch.equal(losses[0], losses[1])
    losses[1].backward()
    expected = torch_gradients(name)
    found = dict(networks[1].model.named_parameters())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        ours = found[key].grad
        assert ours is not None and ours.isfinite().all()
        assert difference(ours[: len(gradient)], gradient) < 2e-6, key
        assert not ours[len(gradient) :].any(), key


@pytest.mark.usefixtures("small_chunks")
@whole_and_chunked
def test_evaluation_knows_nothing_of_it(is_chunked: bool) -> None:
    networks = [
        CausalLMWithLoss(make("llama, untied"), chunked_loss=is_chunked, label_smoothing=e).eval()
        for e in (0.0, SMOOTHING)
    ]
    with torch.no_grad():
        rows = [network(IDS, LABELS, per_row=True)[0] for network in networks]
        sums = [network(IDS, LABELS)[0] for network in networks]
    assert torch.equal(rows[0], rows[1]) and torch.equal(sums[0], sums[1])
    # What is summed in another way is the same loss all the same.
    assert difference(sums[1], rows[1].sum()) < 1e-6


# ------------------------------------------------------------------------------------------- runs

PLAIN: dict[str, Any] = {"dropout": 0.0, "learning_rate": 1e-2, "save_steps": None}
SMOOTHED = PLAIN | {"label_smoothing_factor": 0.1}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch._dynamo.reset()
    return open_place(tmp_path, monkeypatch)


def numbers(folder: Path, metric: str) -> list[float]:
    return [line[metric] for line in curve(folder) if metric in line]


def test_a_run_logs_the_plain_loss_and_trains_otherwise(place: Path) -> None:
    evaluated = {"eval_steps": 1, "validation_split_percentage": 20}
    plain = train_small(place, "plain", **PLAIN, **evaluated)
    smoothed = train_small(place, "smoothed", **SMOOTHED, **evaluated)
    for metric in ("train/loss", "eval/loss"):  # evaluated before the first step too
        ours, theirs = numbers(smoothed, metric), numbers(plain, metric)
        assert len(ours) == len(theirs) >= 4
        assert ours[0] == theirs[0] and ours[1] != theirs[1], metric
        assert ours[-1] < ours[0], metric  # it learns
    norms = [numbers(folder, "train/grad_norm")[0] for folder in (smoothed, plain)]
    assert abs(norms[0] / norms[1] - 1) > 1e-2


@whole_and_chunked
def test_the_curve_is_the_same_for_all_splits(
    is_chunked: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_BYTES", 4 * 257 * 10)
    how = SMOOTHED | {"global_batch_size": 8, "chunked_loss": is_chunked}
    once = curve(train_small(place, "8x1", **how, gradient_accumulation_steps=1))
    often = curve(train_small(place, "2x4", **how, gradient_accumulation_steps=4))
    for one, other in zip(once, often, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("scope", ["blocks", "model"])
@whole_and_chunked
def test_a_compiled_run_has_the_same_curve(
    scope: str, is_chunked: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(arguments: Any) -> TorchDynamoPlugin:  # which takes no compiler
        asked = compile_plugin(arguments)
        backend = "aot_eager" if arguments.torch_compile else "no"
        return TorchDynamoPlugin(
            backend=backend, use_regional_compilation=asked.use_regional_compilation
        )

    monkeypatch.setattr("llm_training.launch.compile_plugin", traced)
    how = SMOOTHED | {"chunked_loss": is_chunked}
    plain = train_small(place, "plain", **how)
    how |= {"torch_compile": True, "torch_compile_scope": scope}
    compiled = train_small(place, "compiled", **how)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    expected = numbers(plain, "train/loss")
    assert numbers(compiled, "train/loss") == pytest.approx(expected, rel=1e-5)


def test_a_padded_run_in_bf16_goes_on_bit_for_bit(place: Path) -> None:
    how = SMOOTHED | {"pad_vocab_to_multiple_of": 64, "mixed_precision": "bf16", "save_steps": 1}
    whole = train_small(place, "whole", **how)
    start = str(whole / "checkpoints/step-00000002")
    again = train_small(place, "again", resume_from_checkpoint=start, **how)
    assert curve(again) == curve(whole)[2:]
    assert weights(again) == weights(whole)


@whole_and_chunked
def test_a_dry_run_reckons_its_memory(
    is_chunked: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = SMOOTHED | {"neftune_noise_alpha": 5.0, "chunked_loss": is_chunked, "dry_run": True}
    for is_masked in (False, True):
        train_small(place, **how, document_mask=is_masked)
        said = capsys.readouterr().out
        assert "activations" in said and "not known" not in said and "not estimated" not in said
        assert "NEFTune  noise of 5 / sqrt(tokens x 16)" in said
