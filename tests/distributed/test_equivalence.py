"""Proves that every backend trains the same curve, with the runs and bounds of `make equivalence`.

Every case of `benchmarks/equivalence.py` is trained; the table is made of the same cells that are
held here. Two processes are started once and get the environment of one backend after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import equivalence
from benchmarks.equivalence import (
    BACKENDS,
    GLOBAL_BATCH_SIZE,
    REFUSALS,
    RESUMED_STEP,
    SETTINGS,
    Case,
    Cell,
    Record,
    cases_of,
    compare_case,
    largest_difference,
)

REFERENCE = Case("llama", 1)
BF16_REFERENCE = Case("llama", 1, "bf16")
SPLIT = Case("llama", 2)


@pytest.fixture(scope="session")
def records_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Record]]:
    """What each run of a backend noted; they are launched when one is first asked for."""
    folder = tmp_path_factory.mktemp("equivalence")
    equivalence.write_inputs(folder)
    known: dict[str, dict[str, Record]] = {}

    def records(backend: str) -> dict[str, Record]:
        if not known:
            known["single"] = equivalence.run_backend("single", cases_of("single"), folder)
            known.update(equivalence.run_together([b for b in BACKENDS if b != "single"], folder))
        return known[backend]

    return records


launched = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # two launches in one test, on a busy machine
]


class TestRuns:
    """The runs themselves."""

    pytestmark = launched

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_run_is_the_run_of_one_process(self, backend, records_of):
        cells = equivalence.compare(
            backend, cases_of(backend), records_of(backend), records_of("single")
        )
        assert [line for cell in cells for line in cell.problems()] == [], "\n".join(
            equivalence.detail_lines(cells)
        )

    def test_the_reference_has_what_the_comparison_is_about(self, records_of):
        from tests.distributed.equivalence_worker import kept_labels  # imports torch

        record = records_of("single")[REFERENCE.name]
        samples = record["samples"]
        assert len(record["loss"]) == len(record["grad_norm"]) == len(samples) == 10
        assert len(record["eval_loss"]) == 3
        # The last window is short, and one before it runs over the end of an epoch.
        assert [len(window) for window in samples] == [GLOBAL_BATCH_SIZE] * 10
        assert [row == -1 for row in samples[-1]] == [False] * 5 + [True] * 3
        assert sorted([row for window in samples for row in window][:55]) == list(range(55))
        # Rows predict unequally much, and some of them nothing.
        lengths = [max(0, kept_labels(row, SETTINGS["block_size"]) - 1) for row in range(55)]
        assert 0 in lengths and 1 in lengths and len(set(lengths)) > 20
        seen = [sum(lengths[row] for row in window if row >= 0) for window in samples]
        assert record["tokens"] == [sum(seen[: step + 1]) for step in range(10)]
        # Some steps are clipped and some are not, and the model learns.
        assert min(record["grad_norm"]) < SETTINGS["max_grad_norm"] < max(record["grad_norm"])
        assert record["loss"][-1] < 0.9 * record["loss"][0]
        assert len(set(record["learning_rate"])) == 10

    @pytest.mark.parametrize("backend", ["tp", "cp"])
    def test_gpt2_is_refused_where_it_cannot_be_split(self, backend, records_of):
        said = records_of(backend)[Case("gpt2", 1).name]["refused"]
        assert said.startswith("ModelError: ") and REFUSALS[backend, "gpt2"] in said
        # The message says what to do.
        assert "llama, qwen3" in said and "accelerate_configs/" in said


def a_record(**changes: Any) -> Record:
    """What a run of two steps notes."""
    record = {
        "loss": [4.0, 3.0],
        "grad_norm": [2.0, 1.0],
        "eval_loss": [4.5, 3.5],
        "learning_rate": [0.1, 0.2],
        "tokens": [10, 20],
        "samples": [[3, 1], [0, -1]],
        "active": "2 replicated",
        "compiled_graphs": 0,
    }
    return record | changes


def problems(record: Record, case: Case = SPLIT, backend: str = "ddp") -> list[str]:
    """What is found wrong with a run, held against `a_record()`."""
    references = {REFERENCE.name: a_record(), BF16_REFERENCE.name: a_record(loss=[4.01, 3.01])}
    return compare_case(backend, case, record, references).problems()


class TestComparison:
    """The comparison finds what is wrong."""

    def test_an_equal_run_has_no_problem(self):
        assert problems(a_record()) == []

    @pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
    @pytest.mark.parametrize("step", [0, 1])
    def test_every_step_of_every_curve_counts(self, name, step):
        curve = a_record()[name]
        curve[step] *= 1 + 0.9e-5
        assert problems(a_record(**{name: curve})) == []
        curve[step] *= 1 + 0.2e-5
        assert problems(a_record(**{name: curve})) == [
            f"{name} differs by 1.1e-05, more than 1.0e-05"
        ]

    @pytest.mark.parametrize("curve", [[4.0], [], [4.0, math.nan], [math.inf, 3.0]])
    def test_a_curve_that_is_short_or_not_finite_is_no_equal_curve(self, curve):
        assert len(problems(a_record(loss=curve))) == 1

    def test_other_rates_samples_or_token_counts_are_found(self):
        assert problems(a_record(learning_rate=[0.1, 0.2 + 1e-16])) == ["other learning rates"]
        assert problems(a_record(samples=[[1, 3], [0, -1]])) == ["other samples"]
        assert problems(a_record(tokens=[10, 21])) == ["other samples"]

    def test_a_fallback_to_another_backend_is_found(self):
        assert problems(a_record(), backend="fsdp") == ["ran as '2 replicated'"]

    def test_a_compiled_run_has_compiled_something(self):
        references = {REFERENCE.name: a_record()}
        case = Case("llama", 2, variant="compiled")
        cell = compare_case("ddp", case, a_record(compiled_graphs=2), references)
        assert cell.problems() == []
        cell = compare_case("ddp", case, a_record(), references)
        assert cell.problems() == ["was not compiled"]

    def test_a_resumed_run_reads_only_the_later_samples(self):
        samples = [[step] for step in range(RESUMED_STEP + 2)]
        references = {REFERENCE.name: a_record(samples=samples)}
        case = Case("llama", 2, variant="resumed")
        cell = compare_case("ddp", case, a_record(samples=samples[RESUMED_STEP:]), references)
        assert cell.problems() == []
        cell = compare_case("ddp", case, a_record(samples=samples), references)
        assert cell.problems() == ["other samples"]

    def test_bf16_has_wider_bounds_but_must_differ_from_fp32(self):
        case = Case("llama", 2, "bf16")
        assert problems(a_record(loss=[4.012, 3.012]), case) == []
        assert problems(a_record(loss=[4.02, 3.01]), case) == [
            "loss differs by 2.5e-03, more than 1.0e-03"
        ]
        assert problems(a_record(), case)[-1].startswith("differs by only 0.0e+00 from fp32")

    def test_a_refusal_counts_only_where_it_is_expected(self):
        said = {"refused": "ModelError: ... transformers has no plan for gpt2. Use ..."}
        assert problems(said, Case("gpt2", 1), "tp") == []
        assert len(problems(said, Case("gpt2", 1), "ddp")) == 1
        assert len(problems({"refused": "other"}, Case("gpt2", 1), "tp")) == 1
        trained = Cell("tp", Case("gpt2", 1), {"loss": 0.0}, active="TP over 2")
        assert len(trained.problems()) == 1

    def test_difference_is_relative_to_the_reference(self):
        assert largest_difference([2.0, 110.0], [1.0, 100.0]) == 1.0
        assert largest_difference([1.0, 99.0], [1.0, 100.0]) == pytest.approx(0.01)


class TestTable:
    """The printed table and its exit code."""

    def run_main(self, monkeypatch, changes: Record, *words: str) -> int:
        """`main` over records as they would be, with `changes` in every record of DDP."""

        def run_backend(backend: str, cases: tuple[Case, ...], folder: Path) -> dict[str, Record]:
            assert (folder / "run.json").exists()
            common = a_record(samples=[[row] for row in range(10)], active=BACKENDS[backend].active)
            records = {}
            for case in cases:
                record = common | (changes if backend == "ddp" else {})
                if case.precision == "bf16":
                    record["loss"] = [value * 1.0001 for value in record["loss"]]
                if case.variant == "resumed":
                    record["samples"] = record["samples"][RESUMED_STEP:]
                records[case.name] = record
            return records

        monkeypatch.setattr(equivalence, "run_backend", run_backend)
        monkeypatch.setattr("sys.argv", ["equivalence.py", *words])
        return equivalence.main()

    def test_a_row_for_each_backend_and_precision(self, monkeypatch, capsys):
        assert self.run_main(monkeypatch, {}, "--backends", "single", "ddp", "zero3") == 0
        output = capsys.readouterr().out
        rows = [line for line in output.splitlines() if line.startswith("| ")]
        assert [row.split(" | ")[:2] for row in rows[1:]] == [
            [f"| {title}", precision]
            for title in ("1 process", "2 x DDP", "2 x ZeRO-3")
            for precision in ("fp32", "bf16")
        ]
        assert all("identical | identical" in row for row in rows[1:])
        assert "torch 2" in output and "accelerate 1" in output
        assert "BROKEN" not in output

    def test_a_broken_bound_shows_and_fails(self, monkeypatch, capsys):
        changes = {"grad_norm": [2.0, 1.1], "learning_rate": [0.1, 0.3]}
        assert self.run_main(monkeypatch, changes, "--backends", "ddp") == 1
        output = capsys.readouterr().out
        assert "| 2 x DDP | fp32 | 0.0e+00 | 1.0e-01 | 0.0e+00 | DIFFERENT | identical |" in output
        broken = output.partition("BROKEN\n")[2].splitlines()
        assert len(broken) == len(cases_of("ddp"))
        assert "grad_norm differs by 1.0e-01, more than 1.0e-05, other learning rates" in broken[0]

    def test_details_have_a_line_for_each_run(self, monkeypatch, capsys):
        assert self.run_main(monkeypatch, {}, "--backends", "ddp", "--details") == 0
        lines = capsys.readouterr().out.splitlines()
        named = [line for line in lines if line.startswith("2 x DDP, ") and line.endswith(", ok")]
        assert len(named) == len(cases_of("ddp"))


def test_cases_cover_what_is_promised():
    plain = {(c.model, c.accumulation) for c in cases_of("ddp") if c == replace(c, variant="")}
    assert plain == {(model, x) for model in ("llama", "gpt2") for x in (1, 2, 4)}
    assert {c.variant for c in cases_of("tp")} == {"", "resumed", "checkpointed", "masked"}
    assert {c.variant for c in cases_of("cp")} == {"", "resumed", "checkpointed"}
    assert {c.precision for c in cases_of("tp")} == {"fp32", "bf16"}
    assert [c for c in cases_of("tp") if c.model == "gpt2"] == [Case("gpt2", 1)]
    assert {case.reference for case in equivalence.CASES} <= set(cases_of("single"))
