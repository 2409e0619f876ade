"""The loss in chunks is the loss of whole logits, gradients included, or the model keeps those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_training import chunked_loss
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.chunked_loss import (
    ChunkedHead,
    is_worth_chunking,
    linear_row_losses,
    linear_token_loss_sum,
    positions_per_chunk,
    why_not_chunked,
)
from llm_training.losses import (
    IGNORE_INDEX,
    likeliest_tokens,
    row_losses,
    shift_labels,
    token_loss_sum,
)
from llm_training.modeling import ModelError, choose_chunked_loss
from tests.host_waits import HostWaits

NUM_POSITIONS, VOCAB_SIZE, WIDTH = 24, 97, 16
FACTOR = 0.37  # what the loss is multiplied by before the backward pass

Tensors = dict[str, Tensor]


def make_inputs(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (NUM_POSITIONS, WIDTH),
        "weight": (VOCAB_SIZE, WIDTH),
        "bias": (VOCAB_SIZE,),
    }
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def make_tokens(kept: Callable[[int], bool] = lambda place: place % 3 != 1) -> Tensor:
    tokens = torch.arange(NUM_POSITIONS) * 31 % VOCAB_SIZE
    return torch.tensor([t if kept(i) else IGNORE_INDEX for i, t in enumerate(tokens.tolist())])


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    return token_loss_sum(F.linear(hidden, weight, bias)[None], tokens[None])


def in_chunks(size: int) -> Callable[..., Tensor]:
    return lambda *inputs: linear_token_loss_sum(*inputs, size)


def results(compute: Callable[..., Tensor], inputs: Tensors, tokens: Tensor) -> Tensors:
    """The loss and the gradients of all inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    loss = compute(leaves["hidden"], leaves["weight"], leaves.get("bias"), tokens)
    (loss * FACTOR).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == inputs.keys()
    return {"loss": loss.detach(), **gradients}


def difference(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (scale if scale else 1))


@pytest.mark.parametrize("size", [1, 5, 16, 24, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(
    size: int, has_bias: bool, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_gpu:
        count_all_positions(monkeypatch)
    inputs, tokens = make_inputs(), make_tokens()
    if not has_bias:
        del inputs["bias"]
    expected = results(whole, inputs, tokens)
    found = results(in_chunks(size), inputs, tokens)
    assert found["loss"].dtype == torch.float32
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert difference(found[name], tensor) < 1e-6, name


def count_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is not asked where there is a target."""
    in_all = chunked_loss._slices
    monkeypatch.setattr(chunked_loss, "_places", lambda tokens, size: in_all(len(tokens), size))


def test_a_gpu_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostWaits() as waits:
        results(in_chunks(5), make_inputs(), make_tokens())
        assert len(waits.take()) == 1
        count_all_positions(monkeypatch)
        results(in_chunks(5), make_inputs(), make_tokens())
        judged_rows(5, make_inputs(), make_tokens())
        assert waits.take() == []


def judged_rows(size: int, inputs: Tensors, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and guesses of rows of 8 positions."""
    losses, guesses = linear_row_losses(
        inputs["hidden"], inputs["weight"], inputs["bias"], tokens.view(3, 8), size,
        with_guesses=True,
    )  # fmt: skip
    assert guesses is not None and not losses.requires_grad
    return losses, guesses


@pytest.mark.parametrize("size", [1, 5, 16, 24, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_rows_are_judged_as_by_whole_logits(
    size: int, dtype: torch.dtype, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_gpu:
        count_all_positions(monkeypatch)
    inputs, tokens = make_inputs(dtype), make_tokens(lambda place: place % 3 != 1 and place < 16)
    logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    losses, guesses = judged_rows(size, inputs, tokens)
    expected = row_losses(logits.view(3, 8, -1), tokens.view(3, 8))
    assert losses.shape == (3,) and losses.dtype == torch.float32 and losses[2] == 0
    assert difference(losses, expected) < 1e-6
    assert difference(losses.sum(), linear_token_loss_sum(*inputs.values(), tokens, size)) < 1e-6
    is_predicted = tokens.view(3, 8) != IGNORE_INDEX
    assert torch.equal(guesses[is_predicted], likeliest_tokens(logits).view(3, 8)[is_predicted])
    plain, nothing = linear_row_losses(*inputs.values(), tokens.view(3, 8), size)
    assert torch.equal(plain, losses) and nothing is None


def test_a_broken_row_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    count_all_positions(monkeypatch)
    inputs, tokens = make_inputs(), make_tokens(lambda place: place < 16)
    inputs["hidden"][[0, 20]] = torch.nan  # in the third row, nothing is predicted
    losses, _ = judged_rows(5, inputs, tokens)
    assert losses.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_rows_without_a_predicted_token_give_zero_and_no_gradient(
    is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_gpu:
        count_all_positions(monkeypatch)
    found = results(in_chunks(4), make_inputs(), make_tokens(lambda _: False))
    assert set(found) == {"loss", "hidden", "weight", "bias"}
    assert not any(tensor.any() for tensor in found.values())


def test_large_logits_stay_exact() -> None:
    inputs, tokens = make_inputs(), make_tokens()
    inputs["weight"] *= 1000  # most probabilities are 0 in float32, and their logarithms are not
    expected = results(whole, inputs, tokens)
    assert expected["loss"].isfinite()
    for name, tensor in results(in_chunks(5), inputs, tokens).items():
        assert difference(tensor, expected[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_16_bits_are_no_less_exact_than_whole_logits(dtype: torch.dtype, is_autocast: bool) -> None:
    tokens = make_tokens()
    inputs = make_inputs(dtype)
    exact = results(whole, {n: t.double() for n, t in inputs.items()}, tokens)
    if is_autocast:  # weights in float32, as the master weights are
        inputs = {name: tensor.float() for name, tensor in inputs.items()}
    errors = []
    for compute in (whole, in_chunks(3)):
        with torch.autocast("cpu", dtype, enabled=is_autocast):
            found = results(compute, inputs, tokens)
        errors.append({name: difference(found[name], exact[name]) for name in exact})
    # Where even the gradients are of 16 bits, the factor rounds them once more.
    bound = 1.1 if is_autocast else 1.3
    for name, error in errors[1].items():
        assert error < bound * errors[0][name] + 1e-6, (name, *errors)
    assert errors[1]["hidden"] > 1e-5  # really computed in 16 bits


def test_frozen_inputs_get_no_gradient() -> None:
    inputs, tokens = make_inputs(), make_tokens()
    weight = inputs["weight"].requires_grad_()
    in_chunks(5)(inputs["hidden"], weight, None, tokens).backward()
    assert weight.grad is not None and inputs["hidden"].grad is None
    with torch.no_grad():
        assert not in_chunks(5)(inputs["hidden"], weight, None, tokens).requires_grad


def test_no_tensor_holds_the_logits_of_more_than_a_chunk() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            shape = set(result.shape) if isinstance(result, Tensor) else set()
            if len(shape) == 2 and VOCAB_SIZE in shape and WIDTH not in shape:
                largest = max(largest, result.numel())
            return result

    with Watch():
        results(in_chunks(4), make_inputs(), make_tokens())
        judged_rows(4, make_inputs(), make_tokens())
    assert largest == 4 * VOCAB_SIZE


def test_chunks_are_for_large_logits_and_smaller_than_they() -> None:
    assert not is_worth_chunking(8 * 256, 4096, "cpu")
    assert not is_worth_chunking(2**10, 2**16, "cpu")  # 256 MiB
    assert is_worth_chunking(2**10 + 1, 2**16, "cpu")
    assert is_worth_chunking(8 * 1024, 50257, "cpu")
    assert not is_worth_chunking(2**14, 2**16, "cuda")  # 4 GiB
    assert is_worth_chunking(2**14 + 1, 2**16, "cuda")
    assert positions_per_chunk(2**16, "cpu") == 2**8
    assert positions_per_chunk(2**16, "cuda") == 2**12
    assert positions_per_chunk(10**9, "cpu") == 1


# ------------------------------------------------------------------------------------ whole models

SMALL = {
    "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GATED = {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 16}


def make_model(kind: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_BYTES", 4 * VOCAB_SIZE * 5)


MODELS = {
    "gpt2, tied": lambda: make_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama, untied": lambda: make_model("llama", **GATED),
    "llama, tied": lambda: make_model("llama", **GATED, tie_word_embeddings=True),
    "phi, with bias": lambda: make_model("phi", **GATED, resid_pdrop=0.0),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_loss_gradients_and_names(name: str) -> None:
    ids = torch.arange(32).view(2, 16) * 5 % VOCAB_SIZE
    labels = ids.where(ids % 3 > 0, IGNORE_INDEX)
    networks = []
    for is_chunked in (False, True):
        model = MODELS[name]()
        assert why_not_chunked(model) is None
        networks.append(CausalLMWithLoss(model, chunked_loss=is_chunked))
    for network in networks:
        loss, nothing = network(ids, labels)
        assert nothing is None
        (loss * FACTOR).backward()
        network.result = loss.detach()
    plain, chunked = networks
    assert type(chunked.model.get_output_embeddings()) is ChunkedHead
    assert difference(chunked.result, plain.result) < 1e-6
    assert plain.state_dict().keys() == chunked.state_dict().keys()
    expected = dict(plain.named_parameters())
    assert expected.keys() == dict(chunked.named_parameters()).keys()
    for parameter, tensor in chunked.named_parameters():
        assert tensor.grad is not None and expected[parameter].grad is not None
        assert difference(tensor.grad, expected[parameter].grad) < 2e-6, parameter


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", MODELS)
def test_logits_rows_and_guesses_are_to_be_had(name: str) -> None:
    model = MODELS[name]().eval()
    ids = torch.arange(32).view(2, 16) * 5 % VOCAB_SIZE
    logits = model(ids).logits.detach()
    network = CausalLMWithLoss(model, chunked_loss=True)
    assert torch.equal(network(ids)[0], logits)
    for next_tokens in (ids.roll(-1, 1), shift_labels(ids)):
        losses, guesses = network(ids, next_tokens=next_tokens, per_row=True, with_guesses=True)
        assert difference(losses, row_losses(logits, next_tokens)) < 1e-6
        is_predicted = next_tokens != IGNORE_INDEX
        assert torch.equal(guesses[is_predicted], likeliest_tokens(logits)[is_predicted])
    assert network(ids, ids, per_row=True)[1] is None
    loss, nothing = network(ids, ids)
    assert loss.shape == () and nothing is None
    assert difference(loss.detach(), token_loss_sum(logits, shift_labels(ids))) < 1e-6


def test_an_error_within_the_model_leaves_no_tokens_behind() -> None:
    network = CausalLMWithLoss(MODELS["llama, tied"](), chunked_loss=True)
    ids = torch.zeros((1, 4), dtype=torch.int64)
    with pytest.raises(IndexError):
        network(ids + VOCAB_SIZE, ids)
    assert network(ids)[0].shape == (1, 4, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", {**GATED, "head_dim": 8}, "gemma2 changes what its head returns"),
        ("cohere", GATED, "cohere changes what its head returns"),
        ("granite", {**GATED, "logits_scaling": 8.0}, "granite changes what its head returns"),
    ],
)
def test_a_model_that_bends_its_logits_keeps_them_whole(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    model = make_model(kind, **changes)
    with pytest.raises(ModelError, match=rf"--chunked_loss true: {reason}"):
        choose_chunked_loss(model, True, num_positions=16, device_type="cpu")
    is_chunked, lines = choose_chunked_loss(model, None, num_positions=2**22, device_type="cpu")
    assert not is_chunked and len(lines) == 1 and reason in lines[0]
    assert choose_chunked_loss(model, None, num_positions=16, device_type="cpu") == (False, [])
    assert choose_chunked_loss(model, False, num_positions=2**22, device_type="cpu") == (False, [])


def test_a_model_is_tried_without_a_trace() -> None:
    model = MODELS["gpt2, tied"]()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    is_chunked, lines = choose_chunked_loss(model, None, num_positions=2**22, device_type="cpu")
    assert is_chunked and "4,194,304 positions x 97 tokens" in lines[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert type(model.get_output_embeddings()) is nn.Linear


def test_heads_that_are_not_plain_or_not_whole_are_left() -> None:
    model = MODELS["llama, untied"]()
    with pytest.raises(ModelError, match="2 ranks share the head"):
        choose_chunked_loss(model, True, num_positions=16, device_type="cpu", tp_size=2)
    model.lm_head = nn.Sequential(model.lm_head)
    assert why_not_chunked(model) == "the head of llama is no plain linear layer"
