"""The validation loss is the mean over tokens, each once, whatever the batches are."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from arguments import BatchSizes, EvaluationArguments
from llm_training.data.rows.store_rows import StreamRows
from llm_training.data.tokens.token_store import TokenArray
from llm_training.evaluation import evaluate
from llm_training.modeling import CausalLMWithLoss

TOKENS = np.random.default_rng(0).integers(0, 20, 47).astype(np.uint16)


@pytest.fixture
def model() -> CausalLMWithLoss:
    torch.manual_seed(0)
    return CausalLMWithLoss(
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=8))
    )


def run(model: CausalLMWithLoss, batch_size: int, metrics: tuple[str, ...] = ()) -> dict:
    rows = StreamRows(TokenArray(TOKENS), 8, keep_last=True)
    arguments = EvaluationArguments(eval_metrics=list(metrics))
    batch = BatchSizes(per_device=batch_size, accumulation=1, processes=1, global_batch=batch_size)
    return evaluate(Accelerator(cpu=True), model, rows, arguments, batch)


def test_the_loss_is_that_of_each_row_by_hand(model: CausalLMWithLoss) -> None:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, 47, 8):
        row = torch.tensor(TOKENS[start : start + 8].astype(np.int64))[None]
        log_probabilities = model.model(row).logits[0, :-1].log_softmax(-1).detach()
        total -= float(log_probabilities[torch.arange(row.shape[1] - 1), row[0, 1:]].sum())
        count += row.shape[1] - 1
    result = run(model, 4)
    assert result["eval/tokens"] == count == 41
    assert result["eval/loss"] == pytest.approx(total / count, rel=1e-6)
    assert result["eval/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


def test_the_batch_size_does_not_matter(model: CausalLMWithLoss) -> None:
    losses = [run(model, size)["eval/loss"] for size in (1, 4, 6, 64)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_dropout_is_off_no_random_number_is_drawn_and_training_goes_on(
    model: CausalLMWithLoss,
) -> None:
    before = torch.get_rng_state()
    assert run(model, 4) == run(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_token_accuracy_counts_the_right_guesses(model: CausalLMWithLoss) -> None:
    with torch.no_grad():  # guess 7 always
        model.model.lm_head.weight.zero_()
        model.model.lm_head.weight[7] = 1.0
        model.model.transformer.ln_f.bias.fill_(1.0)
        model.model.transformer.ln_f.weight.zero_()
    predicted = np.delete(TOKENS, np.arange(0, 47, 8))
    assert run(model, 4, ("token_accuracy",))["eval/token_accuracy"] == pytest.approx(
        (predicted == 7).mean()
    )


def test_a_hopeless_loss_is_no_overflow(model: CausalLMWithLoss) -> None:
    with torch.no_grad():
        model.model.transformer.wte.weight *= 1e6
    result = run(model, 4)
    assert result["eval/loss"] > 700
    assert result["eval/perplexity"] == math.inf
