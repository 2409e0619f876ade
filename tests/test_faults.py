"""What docs/faults.md promises of faults that no room meets alone: through whole small runs.

Every run is the real script in this process, on a text of a few kilobytes; one is a process of its
own, because its environment is what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

import train_llm
from llm_training.data.tokens import encoding
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.stopping import Stopped
from llm_training.tracking import Tracking
from tests.small_runs import (
    TEXT,
    curve,
    open_place,
    read_log,
    train_small,
    weights,
)

ROOT = Path(__file__).resolve().parents[1]
Train = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text that is not plain ASCII."""
    return open_place(tmp_path, monkeypatch)


@pytest.fixture
def train(place: Path) -> Train:
    """Runs the script with some settings changed; returns the folder of the run."""
    return partial(train_small, place)


# --------------------------------------------------------------------------------- configuration


def test_a_folder_that_cannot_be_made_ends_the_run_before_any_work(
    train: Train, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("theirs")
    train("file/below", code=1)
    assert "--output_dir file/below cannot be written: Not a directory" in capsys.readouterr().err
    assert sorted(p.name for p in place.iterdir()) == ["file", "settings.json", "text.txt"]


def test_files_of_others_in_the_output_folder_stay(train: Train, place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "notes.txt").write_text("mine")
    assert (train(max_steps=1) / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------ data


def test_windows_without_a_predicted_token_are_left_out(
    train: Train, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    tokenizer.save_pretrained("tokenizer")
    # Documents of one token each: under the document mask, nothing is left to predict in them.
    ids = np.full(32 * 16, tokenizer.eos_token_id, np.uint16)
    ids[: 32 * 3] = np.arange(32 * 3) + 32
    ids.tofile("train.bin")
    folder = train(
        train_file="train.bin", tokenizer_name="tokenizer", document_mask=True, max_steps=None,
        num_train_epochs=1, global_batch_size=2, per_device_train_batch_size=1,
        validation_split_percentage=0,
    )  # fmt: skip
    log = read_log(folder)
    assert log[-1]["train/tokens"] == 3 * 31
    assert all(0 < line[name] < 9 for line in log for name in ("train/loss", "train/grad_norm"))
    # The three rows that have something lie in one, two or three of the eight windows.
    num_left_out = capsys.readouterr().out.count("left out: no token to predict")
    assert len(log) + num_left_out == 8 and num_left_out >= 5
    assert all(math.isfinite(x) for t in weights(folder).values() for x in np.ravel(t))


def test_fewer_rows_than_a_step_make_one_shorter_step(train: Train) -> None:
    whole = {"max_steps": None, "num_train_epochs": 1, "validation_split_percentage": 0}
    folder = train(**whole, global_batch_size=512, per_device_train_batch_size=8)
    (line,) = read_log(folder)
    account = json.loads((folder / "ledger.json").read_text())["rows"]["train"][""]
    assert line["train/epoch"] == 1.0
    assert line["train/tokens"] == account["predicted"]  # each row once, however many are missing
    assert account["rows"] < 512


def test_a_pad_token_that_is_the_end_of_text_changes_nothing(train: Train) -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    tokenizer.save_pretrained("plain")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("padded")
    packed = {"packing": "best_fit", "document_separator": "line"}
    plain, padded = (train(name, tokenizer_name=name, **packed) for name in ("plain", "padded"))
    assert curve(padded) == curve(plain)
    rows = [
        json.loads((folder / "ledger.json").read_text())["rows"]["train"][""]
        for folder in (plain, padded)
    ]
    assert rows[0] == rows[1] and rows[0]["padding"] > 0
    assert weights(padded) == weights(plain)


def test_a_stream_that_breaks_off_is_gone_on_with(
    train: Train,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # So little is read ahead that steps lie before the place where it breaks off.
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1000)
    folder = place / "dataset"
    folder.mkdir()
    rows = [json.dumps({"text": line * 3}) + "\n" for line in TEXT.splitlines() * 4]
    (folder / "train-0.jsonl").write_text("".join(rows[:120]), encoding="utf-8")
    second = folder / "train-1.jsonl"
    stream = {"train_file": [], "dataset_name": "dataset", "streaming": True, "max_steps": 12}
    stream |= {"shuffle_buffer_size": 32, "global_batch_size": 64}
    second.write_text("".join(rows[120:]), encoding="utf-8")
    whole = train("whole", **stream)

    second.write_text('{"text": \n', encoding="utf-8")
    capsys.readouterr()
    broken = train("parts", code=1, **stream)
    message = capsys.readouterr().err
    assert "cannot be read on after row 120" in message
    assert "goes on from the last checkpoint" in message and "Traceback" not in message
    saved = json.loads((broken / "checkpoints" / "last" / "manifest.json").read_text())["step"]
    assert 0 < saved < 12

    second.write_text("".join(rows[120:]), encoding="utf-8")
    assert curve(train("parts", **stream)) == curve(whole)
    assert weights(broken) == weights(whole)


# ------------------------------------------------------------------------- checkpoints and resume


@pytest.mark.parametrize("step", [1, 6, 8, 11], ids=["first", "within", "end of epoch", "end"])
def test_a_run_goes_on_from_every_place_in_an_epoch(train: Train, step: int) -> None:
    rows = {"max_steps": None, "num_train_epochs": 2.75, "validation_split_percentage": 0}
    rows |= {"train_file": "short.txt"}
    # 16 rows: four steps make an epoch, and eleven the run.
    Path("short.txt").write_text("".join(str(i * i) for i in range(200))[: 16 * 32 - 1])
    whole = train("whole", **rows)
    log, final = curve(whole), weights(whole)
    assert [line["step"] for line in log if line["train/epoch"] % 1 == 0] == [4, 8]

    # As a kill leaves it: the checkpoint of that step is the newest, and nothing has ended.
    shutil.rmtree(whole / "final")
    (whole / "result.json").unlink()
    for path in (whole / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    train("whole", **rows)
    assert (curve(whole), weights(whole)) == (log, final)


@pytest.mark.parametrize(("policy", "code", "left"), [("stop", 1, [1]), ("continue", 0, [1, 3, 4])])
def test_a_full_disk_stops_the_run_or_is_a_warning(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    code: int,
    left: list[int],
) -> None:
    disk_usage, saves = shutil.disk_usage, iter(range(1, 99))

    def full_at_the_second_save(path: Path) -> Any:
        found = disk_usage(path)
        is_full = Path(path).name == "checkpoints" and next(saves) == 2
        return found._replace(free=0) if is_full else found

    monkeypatch.setattr(shutil, "disk_usage", full_at_the_second_save)
    folder = train(code=code, on_save_error=policy)
    said = capsys.readouterr()
    message = "step-00000002 was not begun: it needs about"
    assert (said.err if code else said.out).count(message) == 1
    assert "Traceback" not in said.err
    found = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert found == [f"step-0000000{step}" for step in left]


def test_the_best_model_opened_again_has_the_best_loss(
    train: Train, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate so high that the loss rises again.
    folder = train(
        save_best=True, eval_steps=1, max_steps=12, learning_rate=0.3, lr_scheduler_type="constant"
    )
    result = json.loads((folder / "result.json").read_text())
    assert result["best_loss"] < result["last_loss"] - 0.01
    capsys.readouterr()
    train(
        "other", eval_only=True, model_type=None, config_overrides={}, dropout=None,
        model_name_or_path=str(folder / "best"),
    )  # fmt: skip
    assert f"loss {result['best_loss']:.4f}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- process


@pytest.mark.parametrize("fault", [None, MemoryError])
def test_nothing_is_left_running(
    train: Train, monkeypatch: pytest.MonkeyPatch, fault: type[Exception] | None
) -> None:
    def others() -> set[Any]:
        return {*threading.enumerate(), *psutil.Process().children(recursive=True)}

    train("first")  # libraries keep pools of threads, which they start with their first work
    before = others()
    if fault is None:
        train("second")
    else:

        def fail(run: train_llm.Run, _: Any) -> None:
            raise fault

        monkeypatch.setattr(train_llm, "finish", fail)
        with pytest.raises(fault):
            train("second")
    assert others() <= before


def test_a_clock_that_jumps_changes_no_result(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = train("steady")
    clock, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: clock() + (-1) ** next(jumps) * 10**6)
    jumping = train("jumping")
    assert abs(read_log(jumping)[0]["time"] - read_log(steady)[0]["time"]) > 10**5
    assert curve(jumping) == curve(steady)
    assert weights(jumping) == weights(steady)


@pytest.mark.slow
def test_locale_and_hash_seed_change_no_result(train: Train, place: Path) -> None:
    here = train("here", sample_prompt="Größe", sample_max_new_tokens=5)
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, **ascii_only, "PYTHONHASHSEED": "7"}
    command = [sys.executable, str(ROOT / "train_llm.py"), "settings.json"]
    command += ["--output_dir", "there", "--cache_dir", "there_cache"]
    ended = subprocess.run(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    assert curve(place / "there") == curve(here)
    assert weights(place / "there") == weights(here)


# -------------------------------------------------------------------------------------- tracking


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (Stopped("SIGTERM", "at step 3"), "KILLED"),
        (SystemExit(3), "FAILED"),
        (ZeroDivisionError(), "FAILED"),
    ],
)
def test_the_status_tells_how_a_run_ended(
    train: Train, monkeypatch: pytest.MonkeyPatch, end: BaseException, status: str
) -> None:
    statuses = []
    finish = Tracking.finish

    def note(self: Tracking, status: Any, *args: Any, **named: str) -> None:
        statuses.append(status)
        finish(self, status, *args, **named)

    def raise_it(run: train_llm.Run) -> None:
        raise end

    monkeypatch.setattr(Tracking, "finish", note)
    monkeypatch.setattr(train_llm, "train", raise_it)
    if isinstance(end, Stopped):
        train(code=143)
    else:
        with pytest.raises(type(end)):
            train()
    assert statuses == [status]


def test_without_mlflow_a_run_that_does_not_report_to_it_trains(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mlflow"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert len(read_log(train())) == 4


# -------------------------------------------------------------------------------------- numerics


def test_one_row_is_learned_by_heart(train: Train) -> None:
    Path("row.txt").write_text("The quick brown fox jumps over.")
    folder = train(
        train_file="row.txt", global_batch_size=1, max_steps=120, learning_rate=2e-2,
        dropout=0.0, save_steps=None, validation_split_percentage=0,
    )  # fmt: skip
    losses = [line["train/loss"] for line in read_log(folder)]
    assert losses[0] > 4 and losses[-1] < 0.02
