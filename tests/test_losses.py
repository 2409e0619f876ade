"""Losses are sums over the predicted tokens: exact, and the same however the rows are split."""

import pytest
import torch
import torch.nn.functional as F

from llm_training.losses import (
    IGNORE_INDEX,
    count_predicted_tokens,
    likeliest_tokens,
    row_losses,
    shift_labels,
    token_loss_sum,
)

LABELS = torch.tensor([[1, 2, 3, 0], [3, IGNORE_INDEX, 2, IGNORE_INDEX], [IGNORE_INDEX] * 4])


def make_logits() -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def test_labels_are_shifted_by_one_and_the_last_position_predicts_nothing() -> None:
    assert shift_labels(LABELS)[0].tolist() == [2, 3, 0, IGNORE_INDEX]


def test_only_shifted_labels_are_counted() -> None:
    # Three in the first row; in the second, the 2 at position 2; the 3 at position 0 never.
    assert int(count_predicted_tokens(LABELS)) == 4


def test_the_sum_is_that_of_each_token_alone() -> None:
    logits = make_logits()
    log_probabilities = logits.double().log_softmax(-1)
    by_hand = -(
        log_probabilities[0, 0, 2] + log_probabilities[0, 1, 3] + log_probabilities[0, 2, 0]
        + log_probabilities[1, 1, 2]
    )  # fmt: skip
    assert abs(float(token_loss_sum(logits, shift_labels(LABELS))) - float(by_hand)) < 1e-6 * float(
        by_hand
    )


def test_the_sum_does_not_depend_on_how_rows_are_batched() -> None:
    logits = make_logits()
    parts = sum(
        float(token_loss_sum(logits[i : i + 1], shift_labels(LABELS[i : i + 1]))) for i in range(3)
    )
    assert abs(parts - float(token_loss_sum(logits, shift_labels(LABELS)))) < 1e-6 * parts


def test_rows_without_a_predicted_token_give_zero_and_no_gradient() -> None:
    logits = make_logits().requires_grad_()
    loss = token_loss_sum(logits[2:], shift_labels(LABELS[2:]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_bf16_logits_are_summed_in_float32() -> None:
    logits = make_logits().bfloat16()
    loss = token_loss_sum(logits, shift_labels(LABELS))
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(
        logits.float().view(-1, 5), shift_labels(LABELS).view(-1), reduction="sum"
    )
    assert float(loss) == float(expected)


def test_row_losses_are_those_of_each_row_alone() -> None:
    logits, next_tokens = make_logits(), shift_labels(LABELS)
    found = row_losses(logits, next_tokens)
    assert found.shape == (3,) and found.dtype == torch.float32
    alone = [token_loss_sum(logits[i : i + 1], next_tokens[i : i + 1]) for i in range(3)]
    assert torch.allclose(found, torch.stack(alone), rtol=1e-6, atol=0)
    assert found[2] == 0
    assert row_losses(logits.bfloat16(), next_tokens).dtype == torch.float32


def test_a_broken_row_breaks_no_other() -> None:
    logits = make_logits()
    logits[0] = torch.nan
    found = row_losses(logits, shift_labels(LABELS))
    assert found.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("vocab_size", [3, 256, 257, 511, 512, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_of_equals_is_the_first(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 64, vocab_size, generator=generator).mul(8).round().to(dtype)
    assert (logits == logits.amax(-1, keepdim=True)).sum(-1).max() > 1  # there are equals
    assert torch.equal(likeliest_tokens(logits), logits.argmax(-1))
    logits[..., vocab_size // 2 :] = -torch.inf  # as of rows that stand for no token
    assert torch.equal(likeliest_tokens(logits), logits.argmax(-1))
    assert likeliest_tokens(logits * torch.nan).max() < vocab_size
