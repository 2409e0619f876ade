"""Metrics are right from sums alone; those of `evaluate` get token ids, or are refused first."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from arguments import BatchSizes, EvaluationArguments
from llm_training import metrics
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.rows.store_rows import StreamRows
from llm_training.data.tokens.token_store import TokenArray
from llm_training.evaluation import Judgement, evaluate
from llm_training.metrics import IdMetrics, MetricError, TokenSums, check_metrics, local_values
from tests.metric_scripts import write_metric

TOKENS = np.random.default_rng(0).integers(0, 20, 47).astype(np.uint16)
LOCAL = ["perplexity", "bits_per_byte", "token_accuracy"]


@pytest.fixture(scope="module", autouse=True)
def copied_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scripts are copied to a folder of modules, which is looked for once in a process."""
    from evaluate import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(autouse=True)
def fresh_metrics() -> Iterator[None]:
    """Metrics are loaded once in a process."""
    yield
    metrics._load.cache_clear()
    metrics._folder.cache_clear()


# ------------------------------------------------------------------------------------- from sums


def test_local_metrics_follow_from_sums() -> None:
    sums = TokenSums(loss=20.0, tokens=10, correct=4, text_bytes=25)
    found = local_values(LOCAL, sums)
    assert found == {
        "perplexity": pytest.approx(math.e**2),
        "bits_per_byte": pytest.approx(20 / math.log(2) / 25),
        "token_accuracy": 0.4,
    }
    assert list(local_values(LOCAL[::-1], sums)) == LOCAL[::-1]
    assert local_values(["somebody's"], sums) == {}


def test_a_text_of_known_odds_has_its_bits() -> None:
    """Tokens of two bytes, each one of 2^12: six bits a byte."""
    sums = TokenSums(loss=7 * 12 * math.log(2), tokens=7, correct=0, text_bytes=14)
    assert local_values(["bits_per_byte"], sums) == {"bits_per_byte": pytest.approx(6.0)}


def test_bits_per_byte_are_absent_where_nobody_knows_the_bytes() -> None:
    sums = TokenSums(loss=20.0, tokens=10, correct=4, text_bytes=0)
    assert list(local_values(LOCAL, sums)) == ["perplexity", "token_accuracy"]


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(0.0, 1.0), (7010.0, math.inf), (math.inf, math.inf)]
)
def test_perplexity_overflows_to_infinity(loss: float, perplexity: float) -> None:
    sums = TokenSums(loss=loss, tokens=10, correct=0, text_bytes=0)
    assert local_values(["perplexity"], sums) == {"perplexity": perplexity}


def test_a_broken_loss_stays_broken() -> None:
    sums = TokenSums(loss=math.nan, tokens=10, correct=0, text_bytes=3)
    assert all(math.isnan(x) for x in local_values(["perplexity", "bits_per_byte"], sums).values())


def test_local_classes_take_batches_too(tmp_path: Path) -> None:
    from llm_training.local_metrics import LOCAL_CLASSES

    metric = LOCAL_CLASSES["token_accuracy"](cache_dir=str(tmp_path))
    metric.add_batch(correct=[1, 2], tokens=[4, 4])
    metric.add(correct=3, tokens=4)
    assert metric.compute() == {"token_accuracy": 0.5}


def test_evaluate_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, llm_training.evaluation; from llm_training.metrics import check_metrics;"
        "print(check_metrics(['perplexity']), 'evaluate' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['perplexity'] False\n"


# ------------------------------------------------------------------------------------ by evaluate


def judge(names: list[str]) -> Judgement:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=8)
    judgement = evaluate(
        Accelerator(cpu=True),
        CausalLMWithLoss(GPT2LMHeadModel(config)),
        StreamRows(TokenArray(TOKENS), 8, keep_last=True),
        EvaluationArguments(eval_metrics=names),
        BatchSizes(per_device=4, accumulation=1, processes=1, global_batch=4),
    )
    assert judgement is not None
    return judgement


def test_a_script_is_fed_with_the_ids_of_predicted_tokens(tmp_path: Path) -> None:
    script = write_metric(
        tmp_path / "agreement.py",
        "hits = [p == r for p, r in zip(predictions, references)]\n"
        "return {'agreement': sum(hits) / len(hits), 'seen': len(hits), 'right': references,"
        " 'sum_of_right': np.int64(sum(references)), 'name': 'agreement', 'is_good': True}",
    )
    names = [str(script), "token_accuracy"]
    assert check_metrics(names) == ["token_accuracy", "agreement", "seen", "sum_of_right"]
    found = judge(names).metrics
    assert found["agreement"] == pytest.approx(found["token_accuracy"])
    predicted = np.delete(TOKENS, np.arange(0, 47, 8))
    assert found["seen"] == found["tokens"] == 41
    assert found["sum_of_right"] == predicted.sum()
    assert all(type(value) in (float, int) for value in found.values())
    assert not {"right", "name", "is_good"} & set(found)
    assert judge(names).metrics == found  # the second time, it begins anew


def test_a_folder_with_a_script_of_its_name_will_do(tmp_path: Path) -> None:
    write_metric(tmp_path / "mine" / "mine.py", "return {'mine': 1.5}")
    assert judge([str(tmp_path / "mine")]).metrics["mine"] == 1.5


def test_an_evaluation_that_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    script = str(write_metric(tmp_path / "seen.py", "return {'seen': len(references)}"))
    half = IdMetrics([script])
    half.add(np.arange(5), np.arange(5))
    half.discard()
    whole = IdMetrics([script])
    whole.add(np.arange(3), np.arange(3))
    assert whole.compute() == {"seen": 3.0}
    assert whole.compute() == {}  # nothing was fed


def test_what_it_is_fed_with_waits_in_files(tmp_path: Path) -> None:
    script = str(write_metric(tmp_path / "seen.py", "return {'seen': len(references)}"))
    fed = IdMetrics([script])
    for _ in range(3):
        fed.add(np.arange(2000), np.arange(2000))
    (file,) = Path(metrics._folder()).rglob("*.arrow")
    assert file.stat().st_size > 2 * 4000 * 8
    assert fed.compute() == {"seen": 6000.0}
    assert not list(Path(metrics._folder()).rglob("*.arrow"))


@pytest.mark.parametrize(
    ("body", "features", "message"),
    [
        ("return {'a': 1.0}", "{'predictions': 'string', 'references': 'string'}", "token ids"),
        ("return {'a': 1.0}", "{'predictions': 'int64', 'sources': 'int64'}", "token ids"),
        ("raise ValueError('only 0 and 1')", None, r"cannot be computed .*: only 0 and 1 Drop it"),
        ("return {'a': [1.0], 'b': 'text'}", None, r"returns no number .* \(a, b\)"),
        ("return {'perplexity': 1.0}", None, "calls a result 'perplexity', which is taken"),
        ("return {'loss': 1.0}", None, "calls a result 'loss', which is taken already"),
        ("return {'F1 (macro)': 1.0}", None, r"'F1 \(macro\)', which cannot be logged"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    body: str, features: str | None, message: str, tmp_path: Path
) -> None:
    script = write_metric(tmp_path / "odd.py", body, features)
    with pytest.raises(MetricError, match=f"^eval_metrics: {script}.*{message}"):
        check_metrics(["perplexity", str(script)])


def test_two_results_of_one_name_are_refused(tmp_path: Path) -> None:
    scripts = [str(write_metric(tmp_path / f"{n}.py", "return {'f': 1.0}")) for n in ("a", "b")]
    assert check_metrics(scripts[:1]) == ["f"]
    with pytest.raises(MetricError, match=rf"^eval_metrics: {scripts[1]} calls a result 'f'"):
        check_metrics(scripts)


@pytest.mark.parametrize("name", ["no/such/file.py", "./nothing", "bleu_of_nobody"])
def test_what_cannot_be_loaded_is_refused(name: str) -> None:
    with pytest.raises(MetricError) as refusal:
        check_metrics(["perplexity", name])
    for part in (
        f"eval_metrics: {name} cannot be loaded: ",
        "Python file",
        "hub",
        "token_accuracy",
    ):
        assert part in str(refusal.value)


def test_a_failure_in_the_middle_of_a_run_is_told(tmp_path: Path) -> None:
    script = write_metric(
        tmp_path / "late.py", "assert len(references) < 41, 'too many'\nreturn {'late': 1.0}"
    )
    check_metrics([str(script)])
    with pytest.raises(MetricError, match=f"{script} cannot be computed from token ids: too many"):
        judge([str(script)])
