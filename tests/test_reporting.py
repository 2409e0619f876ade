"""What a run says of itself is true and complete, before it begins and after it has ended."""

import subprocess
from pathlib import Path

import pytest

from llm_training import reporting
from llm_training.reporting import git_revision, resume_lines, summary_lines

RESULT = {
    "step": 1200,
    "stopped_early": False,
    "tokens": 2_448_000,
    "first_loss": 8.3,
    "last_loss": 3.25,
    "best_loss": 3.2,
    "best_step": 1100,
    "samples": [
        {"step": 1200, "tokens": 1, "prompt": "def ", "kind": "greedy", "text": "f():\n    pass"}
    ],
    "model": "runs/a/final",
    "review": "mlflow ui",
}


def test_the_summary_has_losses_sample_and_places() -> None:
    assert summary_lines(RESULT) == [
        "Done     1,200 steps, 2,448,000 tokens predicted",
        "Loss     8.3000 at the start, 3.2500 at the end, 3.2000 at best (step 1100): validation,"
        " nats per token",
        'Sample   "def "',
        "  greedy",
        "    f():",
        "        pass",
        "Model    runs/a/final",
        "Review   mlflow ui",
    ]


def test_where_another_metric_decides_its_best_has_a_line() -> None:
    def lines(metric: str) -> list[str]:
        return summary_lines(RESULT | {"best": {"metric": metric, "value": 1.234, "step": 40}})

    assert lines("eval/math/loss")[2] == "Best     eval/math/loss 1.2340 at step 40"
    assert lines("eval/loss") == summary_lines(RESULT)


def test_the_result_of_a_run_with_one_sample_is_still_read() -> None:
    before = {name: value for name, value in RESULT.items() if name != "samples"}
    lines = summary_lines(before | {"sample": "def f():\n    return 1"})
    assert lines[2:5] == ["Sample", "    def f():", "        return 1"]
    assert summary_lines(before | {"sample": None}) == summary_lines(RESULT | {"samples": []})


def test_what_there_was_not_is_not_said() -> None:
    result = RESULT | {"stopped_early": True, "best_loss": None, "samples": []}
    assert summary_lines(result) == [
        "Done     1,200 steps, stopped early, 2,448,000 tokens predicted",
        "Model    runs/a/final",
        "Review   mlflow ui",
    ]


def test_a_resume_names_what_changed_and_what_follows() -> None:
    changed = {"learning_rate": (3e-4, 1e-4), "logging_steps": (10, 5), "train_file": ("a", "b")}
    assert resume_lines(Path("c/step-1"), 1000, changed) == [
        "Resume   from c/step-1 at step 1,000",
        "Changed  learning_rate: 0.0003 at the last start, now 0.0001: the curve changes from here"
        " on",
        "Changed  logging_steps: 10 at the last start, now 5",
        "Changed  train_file: a at the last start, now b: held against the checkpoint's data",
    ]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    monkeypatch.setattr(reporting, "__file__", str(tmp_path / "code.py"))
    return tmp_path


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_says_whether_files_differ_from_it(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert git_revision() == commit
    (repository / "code.py").write_text("2")
    assert git_revision() == commit + "+changes"


def test_outside_of_git_there_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
