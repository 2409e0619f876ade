"""What is replaced is the old or the new at every moment, also where a failure falls between."""

import json
import os
from pathlib import Path

import pytest

from llm_training.durable import point_to, replace_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, name: str) -> Path:
    path.mkdir()
    (path / name).write_text("")
    return path


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        make_folder(tmp_path / name, name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path / "old") == ["new"]
    assert names(tmp_path) == ["old"]


def test_a_folder_takes_a_place_that_was_empty(tmp_path: Path) -> None:
    replace_folder(make_folder(tmp_path / "new", "a"), tmp_path / "final")
    assert names(tmp_path) == ["final"]


def test_json_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {"step": 1})

    def fail(source: object, target: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"step": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}


def test_a_link_moves_on_and_stays_relative(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_folder(tmp_path / name, name)
        point_to(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last" / name).exists()
    assert os.readlink(tmp_path / "last") == "two"
    assert names(tmp_path) == ["last", "one", "two"]
