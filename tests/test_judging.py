"""Proves that each validation set has its own curve, and that any of them may decide.

Whole small runs: several sets against each alone, early stopping and the best checkpoint by one of
them or by standard errors, and all of that over a kill. And the rules of which result decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import train_llm
from arguments import Arguments, BatchSizes
from llm_training import judging
from llm_training.evaluation import Judgement
from llm_training.judging import aim_of, deciding_sets, result_of
from llm_training.metrics import MetricError
from llm_training.ranks import RankError
from llm_training.run import Run
from llm_training.run_data import check_metric_for_best_model
from llm_training.tracking import evaluation_lines
from tests.small_runs import curve, open_place, read_log, train_small

Train = Callable[..., Path]
SUMS = "".join(f"{i} + {i} = {2 * i}\n" for i in range(80))
NAMES = "".join(f"Name {i} of many, and none of them is known.\n" for i in range(30))
SETS = {"sums": {"validation_file": "sums.txt"}, "names": {"validation_file": "names.txt"}}
WITH_SETS: dict[str, Any] = {
    "validation_file": "other.txt",
    "validation_sets": SETS,
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}
IN_ERRORS = {"early_stopping_min_delta": 2.0, "early_stopping_min_delta_unit": "standard_errors"}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    place = open_place(tmp_path, monkeypatch)
    (place / "sums.txt").write_text(SUMS)
    (place / "names.txt").write_text(NAMES)
    (place / "other.txt").write_text("Nothing of this is in the text that is learned. " * 12)
    return partial(train_small, place, **WITH_SETS)


def values(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_log(folder) if name in line]


def result_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def state_in(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "checkpoints" / "last").glob("*state.json")
    return dict(json.loads(path.read_text()))


# ----------------------------------------------------------------------------------------- curves


def test_several_sets_have_the_curves_of_each_alone(train: Train) -> None:
    together = train("together")
    for name, file in (("", "other.txt"), ("sums/", "sums.txt"), ("names/", "names.txt")):
        alone = train(f"alone_{file}", validation_file=file, validation_sets={})
        for metric in ("loss", "perplexity", "token_accuracy"):
            curves = values(together, f"eval/{name}{metric}"), values(alone, f"eval/{metric}")
            assert len(curves[0]) == 3
            assert curves[0] == pytest.approx(curves[1], rel=1e-6)
        assert values(together, "train/loss") == values(alone, "train/loss")
    assert values(together, "eval/sums/loss") != values(together, "eval/names/loss")


def test_losses_of_training_and_validation_can_be_laid_over_each_other_by_tokens(
    train: Train,
) -> None:
    folder = train(logging_steps=3, max_steps=7, save_steps=None)
    tokens = {}
    for line in read_log(folder):
        if "train/tokens" in line:
            assert line["step"] not in tokens, "noted twice"
            tokens[line["step"]] = line["train/tokens"]
    assert {line["step"] for line in read_log(folder)} == {0, 2, 3, 4, 6, 7} == tokens.keys()
    assert [tokens[step] / 124 for step in (0, 2, 4, 6)] == [0, 2, 4, 6]  # 4 rows of 31 predicted


def test_where_there_is_no_main_set_the_others_decide_together(train: Train) -> None:
    folder = train(validation_file=None, validation_split_percentage=0)
    losses = [values(folder, f"eval/{name}loss") for name in ("", "sums/", "names/")]
    for both, one, other in zip(*losses, strict=True):
        assert min(one, other) < both < max(one, other)
    assert result_in(folder)["best_loss"] == min(losses[0])


def test_each_set_has_a_line_also_in_an_evaluation_alone(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train()
    capsys.readouterr()
    train(eval_only=True)
    said = capsys.readouterr().out
    for label, name in (("", ""), (" | sums", "sums/"), (" | names", "names/")):
        assert f"eval  step 4{label} | loss {values(folder, f'eval/{name}loss')[-1]:.4f}" in said


def test_what_a_run_notes_of_its_sets(train: Train) -> None:
    folder = train(max_steps=2)
    ledger = json.loads((folder / "ledger.json").read_text())["validation_sets"]
    noted = json.loads((folder / "provenance.json").read_text())
    assert list(ledger) == list(noted["validation_set_fingerprints"]) == ["sums", "names"]
    for name, size in (("sums", len(SUMS)), ("names", len(NAMES))):
        assert ledger[name]["documents"][""]["splits"]["validation"]["bytes"] == size
        account = ledger[name]["rows"]["validation"][""]
        assert account["predicted"] + account["row_starts"] == account["tokens"] == size + 1
        assert noted["validation_set_tokens"][name] == size + 1
        assert ledger[name]["leakage"]["overlapping_tokens"] == 0


def test_beside_a_stream_and_a_source_of_a_mixture_sets_are_judged_too(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    rows = [json.dumps({"text": f"Row {i} has this text. " * 4}) for i in range(40)]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows))
    stream = {"train_file": None, "dataset_name": str(tmp_path / "rows"), "streaming": True}
    sources = {"a": {"train_file": "text.txt"}, "b": {"train_file": "names.txt", "weight": 2}}
    mixture = {"train_file": None, "train_mixture": sources, "validation_file": None}
    sets = {"sums": SETS["sums"]}
    streamed = train("streamed", validation_sets=sets, **stream)
    assert len(values(streamed, "eval/loss")) == len(values(streamed, "eval/sums/loss")) == 3
    mixed = train(
        "mixed", validation_sets=sets, metric_for_best_model="eval/b/loss",
        validation_split_percentage=20, **mixture,
    )  # fmt: skip
    names = [name for name in read_log(mixed)[0] if name.endswith("loss")]
    assert names == ["eval/loss", "eval/a/loss", "eval/b/loss", "eval/sums/loss"]
    assert result_in(mixed)["best"]["value"] == min(values(mixed, "eval/b/loss"))


def test_sets_may_come_and_go_between_two_starts(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("whole", validation_sets={})
    die_at(monkeypatch, 2)
    train("parts", code=1, validation_sets={})
    folder = train("parts")
    assert "Changed  validation_sets: {} at the last start" in capsys.readouterr().out
    assert values(folder, "train/loss") == values(whole, "train/loss")
    assert values(folder, "eval/loss") == values(whole, "eval/loss")
    assert len(values(folder, "eval/sums/loss")) == 1


def test_the_line_of_a_set_names_it() -> None:
    metrics = {"eval/loss": 3.9, "eval/loss_stderr": 0.0103, "eval/perplexity": 49.4}
    metrics |= {"eval/web/en/loss": 12.25, "eval/web/en/token_accuracy": 0.25}
    assert evaluation_lines(120, metrics) == [
        "eval  step 120 | loss 3.9000 ± 0.0103 | perplexity 49.4",
        "eval  step 120 | web/en | loss 12.2 | token accuracy 0.2500",
    ]


# ---------------------------------------------------------------------------------- what decides


def judged(values_of: dict[str, list[tuple[float, ...]]]) -> Callable[..., dict[str, Judgement]]:
    """In place of `evaluate_sets`: in each call the next losses of two groups of 100 tokens."""
    scripts = {name: iter(script) for name, script in values_of.items()}

    def evaluate(*args: Any, **named: Any) -> dict[str, Judgement]:
        found = {}
        for name, script in scripts.items():
            losses = np.array(next(script))
            metrics = {"loss": float(losses.sum()) / 200, "tokens": 200}
            found[name] = Judgement(metrics, losses, np.array([100, 100]))
        return found

    return evaluate


FALLING = [(400.0 - 10 * i, 400.0 - 10 * i) for i in range(9)]
RISING_AT_LAST = [(400.0, 400.0), (300.0, 300.0), *[(310.0 + i, 310.0) for i in range(7)]]
# By 0.05 a token each time, and always by the same: surely better, but by little.
SMALL_AND_SURE = [(400.0 - 5 * i, 400.0 - 5 * i) for i in range(9)]
# By 0.25 a token on average, all of it in one of the two groups: its standard error is as large.
LARGE_AND_NOISY = [(400.0, 400.0 - 50 * i) for i in range(9)]


@pytest.mark.parametrize(
    ("metric", "stopped_at", "best"), [("eval/loss", 12, 12), ("eval/sums/loss", 6, 2)]
)
def test_any_set_may_decide_when_to_stop_and_what_is_best(
    train: Train, monkeypatch: pytest.MonkeyPatch, metric: str, stopped_at: int, best: int
) -> None:
    script = {"": FALLING, "sums": RISING_AT_LAST, "names": FALLING}
    monkeypatch.setattr(judging, "evaluate_sets", judged(script))
    folder = train(
        max_steps=12,
        metric_for_best_model=metric,
        early_stopping_patience=2,
        save_best=True,
        save_steps=None,
    )
    result = result_in(folder)
    assert (result["step"], result["best"]["step"]) == (stopped_at, best)
    assert result["stopped_early"] is (stopped_at < 12)
    assert result["best"]["metric"] == metric
    assert (folder / "checkpoints" / "best").resolve().name == f"step-{best:08}"


@pytest.mark.parametrize(
    ("script", "unit", "stopped_at"),
    [
        (SMALL_AND_SURE, "absolute", 4),
        (SMALL_AND_SURE, "standard_errors", 12),
        (LARGE_AND_NOISY, "absolute", 12),
        (LARGE_AND_NOISY, "standard_errors", 4),
    ],
)
def test_standard_errors_go_by_how_sure_a_gain_is(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    script: list[tuple[float, ...]],
    unit: str,
    stopped_at: int,
) -> None:
    """Gains of 0.05 without an error, or 0.25 with one as large, against 0.2 or two errors."""
    monkeypatch.setattr(judging, "evaluate_sets", judged({"": script}))
    folder = train(
        max_steps=12,
        validation_sets={},
        early_stopping_patience=2,
        early_stopping_min_delta=0.2 if unit == "absolute" else 2.0,
        early_stopping_min_delta_unit=unit,
    )
    assert result_in(folder)["step"] == stopped_at


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets a run end before the step after that one, once, as by a broken machine."""
    left = [step]
    step_as_it_is = train_llm.compute_gradients

    def step_or_die(run: Run, *args: Any) -> Any:
        if [run.state.step] == left:
            left.clear()
            raise RankError("the machine is gone")
        return step_as_it_is(run, *args)

    monkeypatch.setattr(train_llm, "compute_gradients", step_or_die)


def test_standard_errors_count_on_over_a_kill_as_if_there_had_been_none(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = IN_ERRORS | {
        "metric_for_best_model": "eval/sums/loss",
        "early_stopping_patience": 3,
        "learning_rate": 0.1,  # so high that the loss soon rises again
        "max_steps": 30,
        "save_steps": 3,
    }
    whole = train("whole", **changes)
    for step in (4, 7):  # between two checkpoints, after an evaluation and before one
        die_at(monkeypatch, step)
        train("parts", code=1, **changes)
        monkeypatch.undo()
        monkeypatch.chdir(whole.parent)
    parts = train("parts", **changes)
    assert result_in(whole)["stopped_early"]
    assert curve(parts) == curve(whole)
    states = state_in(parts), state_in(whole)
    assert states[0] == states[1]
    reference = states[0]["reference"]
    assert len(reference["group_losses"]) == len(reference["group_tokens"]) > 10
    assert reference["value"] == pytest.approx(
        sum(reference["group_losses"]) / sum(reference["group_tokens"]), rel=1e-6
    )


def test_a_signal_in_the_last_evaluation_ends_the_next_start_too(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"validation_sets": {}, "max_steps": 3, "save_steps": 2}
    whole = train("whole", **changes)
    ask = judging.is_asked_to_stop

    def interrupt(run: Run) -> bool:
        if run.state.step == 3:
            run.request._signal = 2
        return ask(run)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "is_asked_to_stop", interrupt)
        train("parts", code=130, **changes)
        train("parts", code=130, **changes)  # which has no step left
    parts = train("parts", **changes)
    assert values(parts, "eval/loss") == values(whole, "eval/loss")


def run_of(**settings: Any) -> Run:
    """What `result_of` asks of a run."""
    rows = SimpleNamespace(num_rows=7, block_size=32)
    return cast(
        Run,
        SimpleNamespace(
            arguments=Arguments(**settings),
            state=SimpleNamespace(step=5),
            plan=SimpleNamespace(batch=BatchSizes(2, 1, 1, 2)),
            validation={"": rows, "sums": rows},
            facts={
                "data_fingerprint": "f" * 64,
                "validation_set_fingerprints": {"sums": "a" * 64, "names": "b" * 64},
            },
        ),
    )


def judgements_of(*names: str) -> dict[str, Judgement]:
    return {
        name: Judgement({"loss": 1.0}, np.array([10.0, 12.0 + i]), np.array([10, 12]))
        for i, name in enumerate(names)
    }


def test_a_metric_that_is_not_there_is_refused_with_those_that_are() -> None:
    run = run_of(metric_for_best_model="eval/bleu")
    with pytest.raises(MetricError, match=r"eval/bleu is not among .*: eval/loss, eval/x\. Name"):
        result_of(run, judgements_of(""), {"eval/loss": 1.0, "eval/x": 2.0}, aim_of(run.arguments))


def test_a_metric_that_nothing_computes_is_refused_before_the_first_step() -> None:
    arguments = Arguments(metric_for_best_model="eval/sums/bleu")
    check_metric_for_best_model(arguments, ["perplexity", "bleu"])
    with pytest.raises(MetricError, match=r"not be there: .* called loss, perplexity"):
        check_metric_for_best_model(arguments, ["perplexity"])


def test_standard_errors_of_a_single_row_are_refused() -> None:
    run = run_of(**IN_ERRORS)
    of_one = {"": Judgement({"loss": 1.0}, np.array([10.0]), np.array([10]))}
    with pytest.raises(MetricError, match="eval/loss is of a single row"):
        result_of(run, of_one, {"eval/loss": 1.0}, aim_of(run.arguments))


@pytest.mark.parametrize(
    ("metric", "names", "expected"),
    [
        ("eval/loss", ("", "sums"), [""]),
        ("eval/sums/loss", ("", "sums"), ["sums"]),
        ("eval/code/loss", ("", "sums"), [""]),  # of a source: among the rows of the main set
        ("eval/loss", ("sums", "names"), ["sums", "names"]),
    ],
)
def test_whose_groups_a_metric_is_of(
    metric: str, names: tuple[str, ...], expected: list[str]
) -> None:
    assert deciding_sets(judgements_of(*names), metric) == expected


def test_a_result_knows_its_rows_and_their_losses() -> None:
    run = run_of(metric_for_best_model="eval/sums/loss", eval_max_batches=3, **IN_ERRORS)
    result = result_of(
        run, judgements_of("", "sums"), {"eval/sums/loss": 1.0}, aim_of(run.arguments)
    )
    assert result.rows == f"{'a' * 12}:32:6"
    assert (result.group_losses, result.group_tokens) == ((10.0, 13.0), (10, 12))
    run = run_of()
    assert result_of(run, judgements_of(""), {"eval/loss": 1.0}, aim_of(run.arguments)).rows == (
        f"{'f' * 12}:32:7"
    )


@pytest.mark.parametrize(
    ("metric", "given", "rises"),
    [
        ("eval/loss", None, False),
        ("eval/math/perplexity", None, False),
        ("eval/bits_per_byte", None, False),
        ("eval/token_accuracy", None, True),
        ("eval/my_error_rate", False, False),
    ],
)
def test_which_way_is_better(metric: str, given: bool | None, rises: bool) -> None:
    arguments = Arguments(metric_for_best_model=metric, greater_is_better=given)
    assert aim_of(arguments).rises is rises
