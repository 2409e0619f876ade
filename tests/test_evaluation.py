"""The validation loss is the mean over tokens, each once, whatever the batches are.

What is measured beside it, for every set and source by itself, follows from the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from arguments import BatchSizes, EvaluationArguments
from llm_training import chunked_loss, evaluation
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import PackedRows, Rows, StreamRows
from llm_training.data.tokens.token_store import TokenArray
from llm_training.evaluation import Judgement, evaluate, evaluate_sets, metrics_of
from llm_training.losses import IGNORE_INDEX, shift_labels
from llm_training.metrics import MetricError
from llm_training.uncertainty import ratio_and_error

TOKENS = np.random.default_rng(0).integers(0, 20, 47).astype(np.uint16)
LOCAL = ["perplexity", "bits_per_byte", "token_accuracy"]


def make_model(*, chunked: bool = False, num_positions: int = 8) -> CausalLMWithLoss:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=num_positions)
    return CausalLMWithLoss(GPT2LMHeadModel(config), chunked_loss=chunked)


@pytest.fixture
def model() -> CausalLMWithLoss:
    return make_model()


def stream(tokens: NDArray[np.uint16] = TOKENS) -> StreamRows:
    return StreamRows(TokenArray(tokens), 8, keep_last=True)


def batches_of(size: int) -> BatchSizes:
    return BatchSizes(per_device=size, accumulation=1, processes=1, global_batch=size)


def judge(
    model: CausalLMWithLoss,
    batch_size: int = 4,
    *,
    rows: Rows | None = None,
    token_bytes: NDArray[np.int32] | None = None,
    is_stopped: Callable[[], bool] | None = None,
    **arguments: Any,
) -> Judgement:
    judgement = evaluate(
        Accelerator(cpu=True),
        model,
        rows or stream(),
        EvaluationArguments(**{"eval_metrics": []} | arguments),
        batches_of(batch_size),
        token_bytes=token_bytes,
        is_stopped=is_stopped,
    )
    assert judgement is not None
    return judgement


def losses_by_hand(model: CausalLMWithLoss, rows: Rows) -> tuple[list[float], list[int]]:
    """Of each row alone the summed loss, in double precision, and how many tokens it predicts."""
    model.eval()
    losses, counts = [], []
    for row in range(rows.num_rows):
        batch = rows.batch(np.array([row]))
        logits, _ = model(batch["input_ids"], position_ids=batch.get("position_ids"))
        targets = shift_labels(batch["labels"])[0]
        places = (targets != IGNORE_INDEX).nonzero()[:, 0]
        log_probabilities = logits[0].detach().double().log_softmax(-1)
        losses.append(-float(log_probabilities[places, targets[places]].sum()))
        counts.append(len(places))
    return losses, counts


def test_the_loss_is_that_of_each_row_by_hand(model: CausalLMWithLoss) -> None:
    losses, counts = losses_by_hand(model, stream())
    found = judge(model, eval_metrics=["perplexity"])
    assert found.metrics["tokens"] == sum(counts) == 41
    loss, error = ratio_and_error(np.array(losses), np.array(counts))
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert found.metrics["loss_stderr"] == pytest.approx(error, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert list(found.metrics) == ["loss", "loss_stderr", "tokens", "perplexity"]
    assert found.group_losses == pytest.approx(losses, rel=1e-6)  # six rows are six groups
    assert found.group_tokens.tolist() == counts


def packed(*, document_mask: bool) -> PackedRows:
    """Documents of 3, 9, 5, ... tokens in rows of 8, some of which are padded."""
    ends = np.array([3, 12, 17, 19, 26, 31, 33, 40, 47], np.uint64)
    return PackedRows(TokenArray(TOKENS, ends), 8, document_mask=document_mask)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_of_documents_with_padding_are_judged_one_by_one(
    chunked: bool, document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_BYTES", 4 * 20 * 5)  # of five positions
    rows, model = packed(document_mask=document_mask), make_model(chunked=chunked)
    losses, counts = losses_by_hand(model, rows)
    assert len(set(counts)) > 1
    found = judge(model, rows=rows)
    assert found.group_losses == pytest.approx(losses, rel=1e-6)
    assert found.group_tokens.tolist() == counts


@pytest.mark.parametrize("chunked", [False, True])
def test_the_batch_size_does_not_matter(chunked: bool) -> None:
    model = make_model(chunked=chunked)
    table = np.arange(20, dtype=np.int32) % 3
    found = [judge(model, size, eval_metrics=LOCAL, token_bytes=table) for size in (1, 4, 6, 64)]
    for other in found[1:]:
        assert other.metrics == pytest.approx(found[0].metrics, rel=1e-6)
        assert other.group_losses == pytest.approx(found[0].group_losses, rel=1e-6)


def test_many_rows_make_few_groups_of_neighbours(
    model: CausalLMWithLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, counts = losses_by_hand(model, stream())
    monkeypatch.setattr(evaluation, "MAX_GROUPS", 4)
    monkeypatch.setattr(evaluation, "BATCHES_BETWEEN_READINGS", 2)
    found = judge(model, 1)
    groups = [[0, 1], [2], [3, 4], [5]]  # row * 4 // 6
    assert found.group_losses == pytest.approx([sum(losses[i] for i in g) for g in groups])
    assert found.group_tokens.tolist() == [sum(counts[i] for i in g) for g in groups]


def test_fewer_batches_are_taken_evenly(model: CausalLMWithLoss) -> None:
    losses, counts = losses_by_hand(model, stream())
    found = judge(model, 3, eval_max_batches=1)
    assert found.group_losses == pytest.approx([losses[i] for i in (0, 2, 4)])
    assert found.metrics["tokens"] == sum(counts[i] for i in (0, 2, 4))


def test_one_row_has_no_standard_error(model: CausalLMWithLoss) -> None:
    found = judge(model, 1, eval_max_batches=1)
    assert set(found.metrics) == {"loss", "tokens"}


def test_dropout_is_off_no_random_number_is_drawn_and_training_goes_on(
    model: CausalLMWithLoss,
) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (judge(model, eval_metrics=LOCAL) for _ in range(2))
    assert first.metrics == second.metrics
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_token_accuracy_counts_the_right_guesses(model: CausalLMWithLoss) -> None:
    with torch.no_grad():  # guess 7 always
        model.model.lm_head.weight.zero_()
        model.model.lm_head.weight[7] = 1.0
        model.model.transformer.ln_f.bias.fill_(1.0)
        model.model.transformer.ln_f.weight.zero_()
    predicted = np.delete(TOKENS, np.arange(0, 47, 8))
    found = judge(model, eval_metrics=["token_accuracy"]).metrics
    assert found["token_accuracy"] == pytest.approx((predicted == 7).mean())


def test_bits_are_held_against_the_bytes_of_what_is_predicted(model: CausalLMWithLoss) -> None:
    table = np.arange(20, dtype=np.int32)
    table[3] = 0  # an end of a document: predicted, without text
    predicted = np.delete(TOKENS, np.arange(0, 47, 8))
    assert (predicted == 3).any()
    found = judge(model, eval_metrics=LOCAL, token_bytes=table).metrics
    bits = found["loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / table[predicted].sum())
    assert list(found)[3:] == LOCAL
    assert "bits_per_byte" not in judge(model, eval_metrics=LOCAL).metrics
    assert "bits_per_byte" not in judge(model, eval_metrics=LOCAL, token_bytes=table * 0).metrics


def test_ids_beyond_the_tokenizer_stand_for_no_text(model: CausalLMWithLoss) -> None:
    table = np.arange(20, dtype=np.int32)
    assert (np.delete(TOKENS, np.arange(0, 47, 8)) > 9).any()
    short = judge(model, eval_metrics=LOCAL, token_bytes=table[:10]).metrics
    table[10:] = 0
    assert short == judge(model, eval_metrics=LOCAL, token_bytes=table).metrics


def test_metrics_that_rank_0_cannot_feed_are_told_to_all_ranks(
    model: CausalLMWithLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arrays: object) -> None:
        raise OSError(28, "No space left on device")

    told: list[Any] = []

    def broadcast(objects: list[Any]) -> list[Any]:
        told.extend(objects)
        return objects

    metrics = SimpleNamespace(add=fail)
    monkeypatch.setattr(evaluation, "IdMetrics", lambda names: metrics)
    monkeypatch.setattr(evaluation, "broadcast_object_list", broadcast)
    with pytest.raises(MetricError, match=r"eval_metrics: mine.py: OSError: .*No space left"):
        judge(model, eval_metrics=["mine.py"])
    assert told[0] == {} and "No space left" in told[1]


def test_only_what_is_learned_counts_in_conversations() -> None:
    learned = np.zeros(47, np.uint8)
    learned[[5, 6, 20, 21, 40]] = 1  # 40 begins a row: nothing predicts it
    rows = PackedRows(
        TokenArray(TOKENS, np.array([16, 32, 47], np.uint64), learned), 16, document_mask=True
    )
    table = np.full(20, 2, np.int32)
    found = judge(
        make_model(num_positions=16), rows=rows, token_bytes=table, eval_metrics=LOCAL
    ).metrics
    assert found["tokens"] == 5
    bits = found["loss"] * 5 / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / 10)


def test_a_hopeless_loss_is_no_overflow(model: CausalLMWithLoss) -> None:
    with torch.no_grad():
        model.model.transformer.wte.weight *= 1e6
    found = judge(model, eval_metrics=["perplexity"]).metrics
    assert found["loss"] > 700
    assert found["perplexity"] == math.inf


def test_a_broken_model_has_no_number(model: CausalLMWithLoss) -> None:
    with torch.no_grad():
        model.model.transformer.wte.weight[0] = math.nan
    found = judge(model, eval_metrics=LOCAL).metrics
    assert math.isnan(found["loss"]) and math.isnan(found["perplexity"])
    assert "loss_stderr" not in found


def test_a_signal_ends_it_and_training_goes_on(model: CausalLMWithLoss) -> None:
    answers = iter([False, True])
    arguments = EvaluationArguments(eval_metrics=[])
    rows = stream(np.tile(TOKENS, 10))
    stopped = evaluate(
        Accelerator(cpu=True),
        model,
        rows,
        arguments,
        batches_of(1),
        is_stopped=lambda: next(answers),
    )
    assert stopped is None and model.training
    assert next(answers, "asked twice") == "asked twice"


# ------------------------------------------------------------------------------- sources and sets


def mixture() -> MixtureRows:
    sources = {"code": stream(TOKENS[:20]), "none": stream(TOKENS[:0]), "talk": stream(TOKENS[20:])}
    return MixtureRows(sources, {"code": 1.0, "none": 0.0, "talk": 1.0})


def test_a_row_knows_its_source() -> None:
    rows = mixture()
    assert [rows.names[i] for i in rows.source_of(np.arange(7))] == ["code"] * 3 + ["talk"] * 4


@pytest.mark.parametrize("max_groups", [1024, 2])
def test_each_source_is_judged_as_if_alone(
    model: CausalLMWithLoss, max_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.arange(20, dtype=np.int32)
    alone = {
        name: judge(model, rows=rows, token_bytes=table, eval_metrics=LOCAL).metrics
        for name, rows in zip(mixture().names, mixture().sources, strict=True)
        if name != "none"
    }
    monkeypatch.setattr(evaluation, "MAX_GROUPS", max_groups)
    found = judge(model, rows=mixture(), token_bytes=table, eval_metrics=LOCAL)
    for name, metrics in alone.items():
        for key, value in metrics.items():
            # Two groups of neighbours: one of the first source, both of the second.
            if key != "loss_stderr" or max_groups > 2:
                assert found.metrics[f"{name}/{key}"] == pytest.approx(value, rel=1e-6), key
    has_errors = [f"{name}/loss_stderr" in found.metrics for name in ("code", "talk")]
    assert has_errors == ([True, True] if max_groups > 2 else [False, True])
    assert not any(key.startswith("none/") for key in found.metrics)
    total = sum(m["loss"] * m["tokens"] for m in alone.values())
    assert found.metrics["loss"] * found.metrics["tokens"] == pytest.approx(total, rel=1e-6)
    assert found.group_losses.sum() == pytest.approx(total, rel=1e-6)


def judge_sets(model: CausalLMWithLoss, sets: dict[str, Rows], **arguments: Any) -> Any:
    arguments = {"eval_metrics": ["perplexity"]} | arguments
    stopped = arguments.pop("is_stopped", None)
    return evaluate_sets(
        Accelerator(cpu=True),
        model,
        sets,
        EvaluationArguments(**arguments),
        batches_of(2),
        is_stopped=stopped,
    )


def test_every_set_has_its_own_names(model: CausalLMWithLoss) -> None:
    sets = {"math": stream(TOKENS[::-1].copy()), "": stream()}
    found = metrics_of(judge_sets(model, sets))
    expected = {
        f"eval/{k}": v for k, v in judge(model, 2, eval_metrics=["perplexity"]).metrics.items()
    }
    assert list(found)[:4] == list(expected)
    for name, rows in sets.items():
        alone = judge(model, 2, rows=rows, eval_metrics=["perplexity"]).metrics
        prefix = f"eval/{name}/" if name else "eval/"
        assert {key: found[prefix + key] for key in alone} == alone


def test_without_a_main_set_all_are_judged_together(model: CausalLMWithLoss) -> None:
    sets = {"a": stream(TOKENS[:24]), "b": stream(TOKENS[24:])}
    found, whole = metrics_of(judge_sets(model, sets)), judge(model).metrics
    for key in ("loss", "loss_stderr", "tokens"):
        assert found[f"eval/{key}"] == pytest.approx(whole[key], rel=1e-5)
    assert found["eval/a/tokens"] + found["eval/b/tokens"] == found["eval/tokens"]
    assert "eval/perplexity" not in found and "eval/a/perplexity" in found


def test_fewer_batches_hold_for_each_set(model: CausalLMWithLoss) -> None:
    sets = {"": stream(), "b": stream(TOKENS[24:])}
    found = metrics_of(judge_sets(model, sets, eval_max_batches=1))
    assert (found["eval/tokens"], found["eval/b/tokens"]) == (14, 14)


def test_a_signal_ends_all_sets(model: CausalLMWithLoss) -> None:
    answers = iter([False, True])
    sets = {"": stream(), "b": stream()}
    assert judge_sets(model, sets, is_stopped=lambda: next(answers)) is None
