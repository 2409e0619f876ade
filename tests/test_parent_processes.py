"""Parents start their children together, end them together and hear how they ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_training import parent_processes
from llm_training.parent_processes import ParentError, Parents

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def parents(folder: Path, count: int = 2) -> list[Parents]:
    return [Parents(folder / "shared", rank, count, timeout_seconds=20) for rank in range(count)]


def at_once(work: Callable[[Parents], Any], all_of_them: list[Parents]) -> list[Any]:
    """The same in each parent, at the same time."""
    with ThreadPoolExecutor(len(all_of_them)) as threads:
        return list(threads.map(work, all_of_them))


def test_all_get_the_same_order_and_tell_how_their_children_ended(tmp_path: Path) -> None:
    def run(parent: Parents) -> dict[str, Any]:
        parent.meet()
        order = parent.order(1)
        parent.run_child(1, order["port"], [sys.executable, "-c", f"exit({parent.rank})"])
        return order

    both = parents(tmp_path)
    first, second = at_once(run, both)
    assert first == second
    assert abs(first["since"] - time.time()) < 60
    expected = [{"code": rank, "was_killed": False} for rank in (0, 1)]
    assert both[0].reports(1) == expected


def test_children_are_killed_when_it_is_due(tmp_path: Path) -> None:
    sign = tmp_path / "sign"

    def run(parent: Parents) -> None:
        parent.meet()
        parent.run_child(1, 0, SLEEP, is_due=sign.exists)

    both = parents(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(at_once, run, both)
        time.sleep(0.5)
        assert not running.done()
        sign.touch()
        running.result(20)
    assert both[0].reports(1) == [{"code": -9, "was_killed": True}] * 2


def test_a_child_that_ends_by_itself_does_not_count_as_killed(tmp_path: Path) -> None:
    (alone,) = parents(tmp_path, 1)
    alone.meet()
    alone.run_child(1, 0, [sys.executable, "-c", ""], is_due=lambda: True, poll_seconds=2)
    assert alone.reports(1) == [{"code": 0, "was_killed": False}]


def test_a_child_whose_peer_has_failed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_processes, "PATIENCE_SECONDS", 0.5)

    def run(parent: Parents) -> None:
        parent.meet()
        parent.run_child(1, 0, SLEEP if parent.rank else [sys.executable, "-c", "exit(3)"])

    both = parents(tmp_path)
    began = time.monotonic()
    at_once(run, both)
    assert time.monotonic() - began < 30
    assert [report["code"] for report in both[0].reports(1)] == [3, -9]


def test_words_are_kept_and_children_meet_at_a_port_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    (alone,) = parents(tmp_path, 1)
    alone.meet()
    asked = f"import os; print([os.environ.get(n) for n in {list(names)}])"
    alone.run_child(1, 4321, [sys.executable, "-c", asked])
    assert alone.words(1, 0).read_text().strip() == "['0', '4321', None]"
    assert os.environ["MASTER_PORT"] == "1"


def test_parents_that_do_not_meet_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent_processes, "MEETING_SECONDS", 0.3)
    with pytest.raises(ParentError, match="rank 1 and rank 0 do not meet in"):
        parents(tmp_path)[0].meet()
    with pytest.raises(ParentError, match="on storage that all machines share"):
        Parents(tmp_path / "other", 1, 2, 5).meet()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    with pytest.raises(ParentError, match="is in the way; move it elsewhere"):
        parents(tmp_path, 1)[0].meet()
    assert (tmp_path / "shared" / "notes.txt").read_text() == "mine"


def test_a_folder_of_an_earlier_time_is_made_anew(tmp_path: Path) -> None:
    (alone,) = parents(tmp_path, 1)
    alone.meet()
    alone.run_child(1, 0, [sys.executable, "-c", "exit(1)"])
    alone.meet()
    assert sorted(path.name for path in alone.folder.iterdir()) == [
        "of_parent_processes",
        "present.json",
    ]
