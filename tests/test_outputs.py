"""The output folder is ours before anything is written, and nothing in it is lost."""

from pathlib import Path

import pytest

from arguments import Arguments
from llm_training.outputs import OutputError, OutputFolder


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "a" / "b")
    output.claim(start_anew=False)
    assert list(output.path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "final", "best", "train_log.jsonl"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(OutputError, match=f"holds {name}, but no arguments.json"):
        OutputFolder(tmp_path).claim(start_anew=False)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["theirs"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(tmp_path / "file").claim(start_anew=False)
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(tmp_path / "file" / "below").claim(start_anew=False)


def test_a_run_is_continued_but_not_started_anew(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.write_opening(Arguments(), {}, {})
    output.claim(start_anew=False)
    with pytest.raises(OutputError, match="already holds a run"):
        output.claim(start_anew=True)


def test_changed_arguments_are_named_with_both_values(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    assert output.changed_arguments(Arguments()) == {}
    output.write_opening(Arguments(learning_rate=0.1, num_threads=1), {}, {})
    changed = output.changed_arguments(Arguments(learning_rate=0.2, num_threads=2))
    assert changed == {"learning_rate": (0.1, 0.2)}


def test_a_result_is_read_back_and_a_torn_one_is_none(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    assert output.read_result() is None
    output.write_result({"step": 3})
    assert output.read_result() == {"step": 3}
    output.result.write_text('{"step"')
    assert output.read_result() is None
