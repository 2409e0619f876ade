"""The script on a small real text: it trains, resumes bit for bit, refuses what it must."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_llm
from llm_training import judging
from llm_training.argument_parsing import read_arguments
from llm_training.checkpointing import CheckpointFolder
from llm_training.checksums import file_note, new_checksum
from llm_training.outputs import OutputFolder
from llm_training.ranks import RankError

ROOT = Path(__file__).resolve().parents[1]
Train = Callable[..., int]


@pytest.fixture
def settings(text_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A model of some thousand weights that meets every part of the loop within 12 steps."""
    return {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2},
        "dropout": 0.1,
        "train_file": str(text_folder),
        "validation_split_percentage": 10,
        "tokenizer_name": "byte",
        "block_size": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "eval_steps": 5,
        "eval_max_batches": 4,
        "save_steps": 5,
        "logging_steps": 2,
        "mixed_precision": "fp32",
        "report_to": "none",
        "cache_dir": str(tmp_path_factory.getbasetemp() / "token_cache"),
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def train(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the script in this process, with some settings changed; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(**changes: object) -> int:
        file = tmp_path / "run.json"
        file.write_text(json.dumps(settings | changes))
        reset_accelerate()
        return train_llm.main(read_arguments([str(file)]))

    return run


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def read_log(folder: Path) -> list[dict]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(folder: Path) -> list[tuple]:
    """What must be equal: every logged number that is not a time."""
    return [
        tuple((k, v) for k, v in sorted(line.items()) if k != "time" and not k.startswith("perf/"))
        for line in read_log(folder)
    ]


def test_the_command_line_from_text_to_a_model(settings: dict, tmp_path: Path) -> None:
    settings |= {"output_dir": None, "eval_metrics": ["token_accuracy"], "report_to": ["mlflow"]}
    settings |= {"sample_prompt": "def ", "save_best": True}
    (tmp_path / "small.json").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "train_llm.py"), "small.json", "--max_steps", "20"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr

    folder = tmp_path / "runs" / "small"
    log = read_log(folder)
    losses = [line["eval/loss"] for line in log if "eval/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(log[1])
    assert any("eval/token_accuracy" in line for line in log)
    assert f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end" in first.stdout
    assert re.search("mlflow ui --backend-store-uri '?sqlite:///", first.stdout)
    assert '\nSample   "def "\n  greedy\n    ' in first.stdout

    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert model.config.vocab_size == len(tokenizer)
    assert json.loads((folder / "arguments.json").read_text())["max_steps"] == 20
    assert (folder / "checkpoints" / "last").resolve().name == "step-00000020"
    assert (folder / "checkpoints" / "best" / "manifest.json").is_file()

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["train_llm"], output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.params["max_steps"] == "20"
    assert run.data.metrics["train/loss"] == log[-2]["train/loss"]
    artifacts = {a.path for a in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"arguments.json", "ledger.json", "train_log.jsonl"} <= artifacts

    # Once more: it says what is there and touches nothing.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "already holds this run, finished" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets a run end before that step, once, as by a broken machine."""
    left = [step]
    step_as_it_is = train_llm.compute_gradients

    def step_or_die(run: train_llm.Run, *args: Any) -> Any:
        if [run.state.step] == left:
            left.clear()
            raise RankError("the machine is gone")
        return step_as_it_is(run, *args)

    monkeypatch.setattr(train_llm, "compute_gradients", step_or_die)


@pytest.mark.parametrize("stop_at", [3, 7])  # before the first checkpoint, and between two
def test_a_stopped_run_continues_bit_for_bit(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    changes = {"save_total_limit": 1, "max_steps": None, "num_train_epochs": 0.02}
    assert train(output_dir=str(tmp_path / "whole"), **changes) == 0

    die_at(monkeypatch, stop_at)
    assert train(output_dir=str(tmp_path / "parts"), **changes) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train(output_dir=str(tmp_path / "parts"), **changes) == 0

    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_comparison_would_notice_a_lost_random_state(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(output_dir=str(tmp_path / "whole"))
    train(
        output_dir=str(tmp_path / "parts"),
        max_steps=5,
        warmup_steps=2,
        lr_scheduler_type="constant",
    )
    load = CheckpointFolder.load

    def load_and_lose(self: object, *args: object, **kwargs: object) -> list[str]:
        lines = load(self, *args, **kwargs)  # type: ignore[arg-type]
        torch.manual_seed(0)
        return lines

    monkeypatch.setattr(CheckpointFolder, "load", load_and_lose)
    train(output_dir=str(tmp_path / "parts"))
    assert curve(tmp_path / "parts") != curve(tmp_path / "whole")


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_curve_bit_for_bit(
    settings: dict, train: Train, tmp_path: Path
) -> None:
    train(output_dir=str(tmp_path / "direct"))
    (tmp_path / "launch.json").write_text(
        json.dumps(settings | {"output_dir": str(tmp_path / "launched")})
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    yaml = str(ROOT / "accelerate_configs" / "single.yaml")
    command = [*launch, yaml, str(ROOT / "train_llm.py"), "launch.json"]
    launched = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr
    assert curve(tmp_path / "launched") == curve(tmp_path / "direct")


@pytest.mark.slow
def test_a_killed_process_continues_bit_for_bit(settings: dict, tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen:
        (tmp_path / f"{name}.json").write_text(
            json.dumps(settings | {"output_dir": str(tmp_path / name), "max_steps": 40})
        )
        command = [sys.executable, str(ROOT / "train_llm.py"), f"{name}.json"]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    process = start("parts")
    log = tmp_path / "parts" / "train_log.jsonl"
    while not log.exists() or log.read_text().count("train/loss") < 7:  # beyond step 12
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "final").exists()
    assert start("parts").wait() == 0
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
)
def test_the_curve_is_the_same_however_a_step_is_split(
    train: Train, tmp_path: Path, split: dict
) -> None:
    # By epochs, so that the last step is a short one.
    same = {"dropout": 0.0, "max_steps": None, "num_train_epochs": 0.0085}
    train(output_dir=str(tmp_path / "one"), **same)
    train(output_dir=str(tmp_path / "other"), **same, **split)
    last = [line for line in read_log(tmp_path / "one") if "train/epoch" in line][-1]
    assert last["train/epoch"] == pytest.approx(0.0085, rel=0.02)  # not that of full steps, 0.0088
    pairs = zip(read_log(tmp_path / "one"), read_log(tmp_path / "other"), strict=True)
    for one, other in pairs:
        for name in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
            assert (name in one) == (name in other)
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5)
        assert one.get("train/tokens") == other.get("train/tokens")


def plain_loop(run: train_llm.Run, rates: list[float], max_norm: float) -> list[tuple]:
    """(loss, gradient norm) of each step of the plainest loop: one batch, the mean loss, AdamW."""
    model = copy.deepcopy(run.network)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if is_matrix(n)]},
            {
                "params": [p for n, p in model.named_parameters() if not is_matrix(n)],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    curve = []
    for step, rate in enumerate(rates):
        ids = torch.cat([batch["input_ids"] for batch in run.windows.window(step * 4)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        curve.append((float(loss.detach()), float(norm)))
    return curve


def is_matrix(name: str) -> bool:
    return ".c_" in name and name.endswith("weight")


def test_the_loop_is_a_plain_loop_with_the_rates_of_the_schedule(
    settings: dict, train: Train, tmp_path: Path
) -> None:
    changes = {
        "dropout": 0.0, "eval_steps": None, "logging_steps": 1, "max_grad_norm": 0.5,
        "lr_scheduler_type": "linear", "min_lr_ratio": 0.0, "max_steps": 10,
    }  # fmt: skip
    train(output_dir=str(tmp_path / "ours"), **changes)
    train(output_dir=str(tmp_path / "sparse"), **changes | {"logging_steps": 4})
    # The same parts once more, before their first step.
    reset_accelerate()
    (tmp_path / "plain.json").write_text(json.dumps(settings | changes))
    run = train_llm.build_run(
        read_arguments([str(tmp_path / "plain.json")]), OutputFolder(tmp_path / "plain")
    )
    rates = [1e-3, 2e-3, *(3e-3 * (8 - k) / 8 for k in range(8))]
    expected = plain_loop(run, rates, max_norm=0.5)

    log = read_log(tmp_path / "ours")
    assert [line["train/learning_rate"] for line in log] == pytest.approx(rates, rel=1e-12)
    for line, (loss, norm) in zip(log, expected, strict=True):
        assert line["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert line["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    means = [np.mean([loss for loss, _ in expected[i : i + 4]]) for i in (0, 4, 8)]
    sparse = [line["train/loss"] for line in read_log(tmp_path / "sparse")]
    assert sparse == pytest.approx(means, rel=1e-5)


def test_early_stopping_counts_on_over_a_resume(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.6, 4.7, 4.8])
    real = judging.evaluate_sets

    def with_next_loss(*args: Any, **named: Any) -> Any:
        judgements = real(*args, **named)
        judgements[""].metrics["loss"] = next(losses)
        return judgements

    monkeypatch.setattr(judging, "evaluate_sets", with_next_loss)
    changes = {"early_stopping_patience": 3, "eval_steps": 2, "save_steps": 6, "max_steps": 100}
    die_at(monkeypatch, 6)
    assert train(**changes) == 1  # after 5.0, 4.0, 4.5, 4.6
    assert train(**changes) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["step"], result["stopped_early"], result["best_step"]) == (8, True, 2)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-00000008"


def test_evaluating_only_gives_the_checkpoints_loss_and_writes_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    final = next(
        line["eval/loss"] for line in reversed(read_log(tmp_path / "run")) if "eval/loss" in line
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(eval_only=True) == 0
    assert f"{final:.4f}" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_model_folder_is_trained_on(train: Train, tmp_path: Path) -> None:
    train()
    code = train(
        model_type=None, config_overrides={}, tokenizer_name=None, dropout=None,
        model_name_or_path=str(tmp_path / "run" / "final"), output_dir=str(tmp_path / "tuned"),
    )  # fmt: skip
    assert code == 0
    before, after = read_log(tmp_path / "run"), read_log(tmp_path / "tuned")
    last = next(line["eval/loss"] for line in reversed(before) if "eval/loss" in line)
    assert after[0]["eval/loss"] == pytest.approx(last, rel=1e-6)


def test_activations_computed_again_give_the_same_curve_with_dropout(
    train: Train, tmp_path: Path
) -> None:
    same = {"max_steps": 4, "eval_steps": None, "save_steps": None}
    train(output_dir=str(tmp_path / "plain"), **same)
    train(output_dir=str(tmp_path / "again"), **same, gradient_checkpointing=True)
    for one, other in zip(read_log(tmp_path / "plain"), read_log(tmp_path / "again"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-5)


# ------------------------------------------------------------------------------------- bad input


def fail(train: Train, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """The message of a run that must end with exit code 1."""
    capsys.readouterr()
    assert train(**changes) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_texts_that_are_too_short_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("some words\n" * 100)
    (tmp_path / "short.txt").write_text("few\n")
    message = fail(train, capsys, train_file="short.txt", validation_file="long.txt")
    assert "makes not one row of 64" in message
    message = fail(train, capsys, train_file="long.txt", validation_file="short.txt")
    assert "The validation data has" in message
    assert "less than one row of 64" in message


def test_binary_junk_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk.txt").write_bytes(b"\x00\xff" * 500)
    assert "junk.txt" in fail(train, capsys, train_file="junk.txt")


def test_ids_beyond_the_model_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.full(1000, 999, np.uint16).tofile(tmp_path / "train.bin")
    np.full(1000, 999, np.uint16).tofile(tmp_path / "val.bin")
    overrides = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 500}
    message = fail(
        train, capsys, train_file="train.bin", tokenizer_name=None, config_overrides=overrides
    )
    assert "vocabulary of 1000 tokens, but the model embeds only 500" in message


def test_a_nan_stops_the_run_and_the_checkpoints_stay(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llm_training import causal_lm

    calls = {"count": 0}
    real = causal_lm.token_loss_sum

    def poisoned(logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
        calls["count"] += 1
        return real(logits, labels, **how) * (float("nan") if calls["count"] == 20 else 1.0)

    monkeypatch.setattr(causal_lm, "token_loss_sum", poisoned)
    message = fail(train, capsys, eval_steps=None, max_skipped_steps=0)
    assert "Loss nan in step 10: 1 in a row had to be left out" in message
    assert "samples 36-39" in message
    weights = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train(eval_steps=None) == 0  # the same command goes on


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 7}, "seed: 42 there, 7 here"),
        ({"config_overrides": {"n_layer": 1, "n_embd": 32, "n_head": 2}}, "model: "),
        ({"block_size": 32}, "block_size: 64 there, 32 here"),
        ({"gradient_accumulation_steps": 4}, "global_batch_size: 4 there, 8 here"),
        ({"tokenizer_name": "char"}, "data: "),
        ({"max_steps": 6}, "is at step 12, beyond the 6 steps asked for"),
        ({"resume_from_checkpoint": "none"}, "already holds a run"),
    ],
)
def test_an_output_folder_with_another_run_is_left_alone(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, expected: str
) -> None:
    train()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    message = fail(train, capsys, **changes)
    assert expected in message
    assert "another --" in message
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_longer_run_goes_on_where_the_shorter_ended(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    capsys.readouterr()
    assert train(max_steps=16) == 0
    output = capsys.readouterr().out
    assert "Changed  max_steps: 12 at the last start, now 16" in output
    assert [line["step"] for line in read_log(tmp_path / "run")][-1] == 16


def test_a_longer_run_that_is_stopped_is_not_taken_for_finished(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    die_at(monkeypatch, 12)
    assert train(max_steps=16) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train(max_steps=16) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 16


GARBAGE = """
import atexit, gc, runpy, sys
atexit.register(lambda: print("collects:", gc.isenabled()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_garbage_is_collected_once_the_imports_are_done(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text. " * 100)
    words = ["--model_type", "gpt2", "--config_overrides", "n_layer=1,n_embd=16,n_head=2"]
    words += ["--train_file", "text.txt", "--tokenizer_name", "byte", "--block_size", "16"]
    words += ["--max_steps", "1", "--eval_steps", "null", "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-c", GARBAGE, str(ROOT / "train_llm.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "collects: True" in ended.stdout, ended.stderr


def test_a_run_that_cannot_be_resumed_is_recorded_as_failed(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    train(max_steps=6, report_to=["mlflow"])
    (tmp_path / "run" / "checkpoints" / "last" / "optimizer.bin").write_bytes(b"")
    manifest = tmp_path / "run" / "checkpoints" / "last" / "manifest.json"
    noted = json.loads(manifest.read_text())
    noted["files"]["optimizer.bin"] = file_note(0, new_checksum().hexdigest())
    manifest.write_text(json.dumps(noted))
    assert "optimizer.bin cannot be read" in fail(train, capsys, max_steps=12, report_to=["mlflow"])
    (run,) = mlflow.search_runs(experiment_names=["train_llm"], output_format="list")
    assert run.info.status == "FAILED"
