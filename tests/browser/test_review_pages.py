"""Proves that a person finds a run, its curves, its machine and its files on MLflow's own pages.

The pages are those of a real server, shown by a real browser: metrics and tags under names that
MLflow would store but not show are of no use to anyone. Pictures are left in test-artifacts/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import RUNS, STEPS, Review

if TYPE_CHECKING:
    from tests.browser.pages import Pages

pytestmark = pytest.mark.browser

SEARCH = "//input[@placeholder='Search metric charts']"
# Of the curves that one looks at first, as many as the window has room for: others are not drawn.
SHOWN = r"(/loss|token_accuracy|grad_norm|learning_rate)$"


def path_of(review: Review, name: str, tab: str = "") -> str:
    return f"/experiments/{review.experiment_id}/runs/{review.run_ids[name]}{tab}"


def test_the_experiment_lists_both_runs(pages: Pages, review: Review) -> None:
    pages.open(f"/experiments/{review.experiment_id}/runs", *RUNS, "2 matching runs")
    pages.keep("experiment")


def test_a_runs_page_tells_what_it_was(pages: Pages, review: Review) -> None:
    metrics = ("train/loss", "eval/loss", "eval/token_accuracy", "perf/tokens_per_second")
    parameters = ("learning_rate", str(RUNS["slow"]), "git_revision", "data_fingerprint")
    assert "changed.learning_rate" in review.tags
    tags = [f"{name}\n: {value}" for name, value in review.tags.items()]
    pages.open(path_of(review, "slow"), "slow", "Finished", *metrics, *parameters, *tags)
    pages.keep("overview")


def test_its_curves_are_drawn(pages: Pages, review: Review) -> None:
    pages.open(path_of(review, "slow", "/model-metrics"), "slow (eval/loss)")
    assert all(f"\n{group}\n(" in pages.text() for group in ("eval", "perf", "train"))
    pages.write(SEARCH, SHOWN)
    names = ("eval/loss", "train/loss", "train/grad_norm", "train/learning_rate")
    pages.wait_for(*(f"slow ({name})" for name in names), f"\n{STEPS}\n")
    pages.keep("model_metrics")


def test_the_machine_has_a_page_of_its_own(pages: Pages, review: Review) -> None:
    names = ("cpu_utilization_percentage", "system_memory_usage_megabytes")
    titles = (*names, *(f"slow (system/{name})" for name in names))
    pages.open(path_of(review, "slow", "/system-metrics"), *titles)
    assert "train/loss" not in pages.text()
    pages.keep("system_metrics")


def test_its_files_can_be_read(pages: Pages, review: Review) -> None:
    files = ("arguments.yaml", "train_log.jsonl", "ledger.json")
    pages.open(path_of(review, "slow", "/artifacts"), *files)
    pages.click("//*[normalize-space(text())='arguments.yaml']")
    pages.wait_for(f"learning_rate: {RUNS['slow']}", 'run_name: "slow"')
    pages.keep("artifacts")


def test_runs_are_drawn_in_one_chart(pages: Pages, review: Review) -> None:
    path = f"/experiments/{review.experiment_id}/runs?compareRunsMode=CHART"
    pages.open(path, "slow (eval/loss)", "fast (eval/loss)")
    pages.write(SEARCH, SHOWN)
    pages.wait_for("slow (train/loss)", "fast (train/loss)")
    pages.keep("charts")


def test_the_comparison_shows_what_differs(pages: Pages, review: Review) -> None:
    ids = ",".join(f'"{number}"' for number in review.run_ids.values())
    path = f'/compare-runs?runs=[{ids}]&experiments=["{review.experiment_id}"]'
    pages.open(path, *RUNS, "weight_decay", "eval/loss")
    pages.click("(//button[@role='switch'])[1]")  # of the parameters: show what differs only
    pages.wait_for("learning_rate", *(str(rate) for rate in RUNS.values()))
    pages.wait_until_gone("weight_decay")
    pages.keep("comparison")


def test_no_page_asks_another_host(pages: Pages, review: Review) -> None:
    pages.open(path_of(review, "fast"), "fast", "train/loss")
    assert pages.hosts() == {"127.0.0.1"}
