"""Whoever gets the signal, all ranks stop at one step with one checkpoint, and the run goes on."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, clean_environment, launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("signalled_worker.py")
TRAIN = ROOT / "train_llm.py"
LAST_STEP = 24
EVAL_STEPS = 6
Curve = list[tuple[int, str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Holds run.json: a run with dropout and evaluations that saves nothing before its end."""
    values = {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 1, "n_embd": 16, "n_head": 2},
        "train_file": str(text_folder),
        "tokenizer_name": "byte",
        "block_size": 32,
        "eval_max_batches": 3,
        "global_batch_size": 8,
        "max_steps": LAST_STEP,
        "eval_steps": EVAL_STEPS,
        "save_steps": None,
        "logging_steps": 1,
        "dropout": 0.1,
        "mixed_precision": "fp32",
        "report_to": ["none"],
        "device": "cpu",
        "num_threads": 1,
    }
    folder = tmp_path_factory.mktemp("signals")
    values["cache_dir"] = str(folder / "token_cache")
    (folder / "run.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[str], Curve]:
    """The curve of the run that nobody stops, by how it is launched."""
    known: dict[str, Curve] = {}

    def curve_under(config: str) -> Curve:
        if config not in known:
            output = folder / f"undisturbed_{config}"
            start(config, TRAIN, folder, output, check=True)
            known[config] = curve(output)
        return known[config]

    return curve_under


def start(
    config: str, script: Path, folder: Path, output: Path, *fault: str, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """The run under `accelerate launch`, or by `python` alone where `config` says so."""
    words = [*fault, str(folder / "run.json"), "--output_dir", str(output)]
    if config != "python":
        return launch(config, script, *words, check=check, timeout=150)
    command = [sys.executable, str(script), *words]
    env, options = clean_environment(), {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=ROOT, env=env, check=check, timeout=150, **options)


def curve(output: Path) -> Curve:
    """Every loss of the log, as it was written."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    names = ("train/loss", "eval/loss")
    return [(line["step"], name, line[name]) for line in lines for name in names if name in line]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


def require_stop(stopped: subprocess.CompletedProcess[str], output: Path, first: int) -> int:
    """The step of the one checkpoint: the last one of the log, from `first` on, not the run's."""
    found = checkpoints(output)
    assert len(found) == 1, f"{found}\n{stopped.stdout}\n{stopped.stderr}"
    step = int(found[0].removeprefix("step-"))
    assert first <= step < LAST_STEP
    steps = [step for step, name, _ in curve(output) if name == "train/loss"]
    assert steps == list(range(1, step + 1))
    assert not (output / "result.json").exists()
    return step


def require_same_run(config: str, folder: Path, output: Path, expected: Curve) -> None:
    """The same command goes on, to the same curve bit for bit, and leaves nothing twice."""
    start(config, TRAIN, folder, output, check=True)
    assert curve(output) == expected
    assert (output / "result.json").exists()


@pytest.mark.parametrize(("config", "rank"), [("python", "0"), ("ddp", "1")])
def test_a_save_is_finished(
    config: str, rank: str, folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    output = tmp_path / "run"
    settings = json.loads((folder / "run.json").read_text()) | {"save_steps": 5}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    stopped = start(config, WORKER, tmp_path, output, "self", "SIGTERM", "save", "1", rank)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at step 11; the same command continues" in stopped.stderr
    assert checkpoints(output) == ["step-00000010", "step-00000011"]
    require_same_run(config, tmp_path, output, undisturbed(config))


@pytest.mark.parametrize("whom", ["self", "launcher", "all"])
def test_sigterm_stops_all_ranks_at_one_step(
    whom: str, folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    stopped = start("ddp", WORKER, folder, tmp_path / "run", whom, "SIGTERM", "step", "7", "1")
    step = require_stop(stopped, tmp_path / "run", 8)
    assert stopped.returncode != 0
    said = [line for line in stopped.stderr.splitlines() if line.startswith("train_llm.py: ")]
    how = f"stopped by SIGTERM at step {step}; the same command continues the run."
    assert said == [f"train_llm.py: {how}"]
    if whom == "self":  # otherwise torchrun tells of its own end
        assert step == 8  # in the same step, without another exchange
        assert re.findall(r"exitcode  : (-?\d+)", stopped.stderr)[-1] == "143"
    require_same_run("ddp", folder, tmp_path / "run", undisturbed("ddp"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_single_process_stops_with_the_code_of_the_signal(
    name: str, folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    stopped = start("python", WORKER, folder, tmp_path / "run", "self", name, "step", "7", "0")
    assert stopped.returncode == 128 + signal.Signals[name]
    assert f"train_llm.py: stopped by {name} at step 8; " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert require_stop(stopped, tmp_path / "run", 8) == 8
    require_same_run("python", folder, tmp_path / "run", undisturbed("python"))


def test_the_launcher_of_one_process_takes_it_along(
    folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    # The launch has ended once nobody holds its output: the process that it started included.
    fault = ("launcher", "SIGTERM", "step", "7", "0")
    stopped = start("single", WORKER, folder, tmp_path / "run", *fault)
    assert stopped.returncode == -signal.SIGTERM
    step = require_stop(stopped, tmp_path / "run", 8)
    assert f"stopped by SIGTERM at step {step}; " in stopped.stderr
    require_same_run("single", folder, tmp_path / "run", undisturbed("single"))


@pytest.mark.parametrize(
    ("place", "when"), [("build", "before training began"), ("evaluation", "at step 0")]
)
def test_before_the_first_step_there_is_nothing_to_save(
    place: str, when: str, folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    stopped = start("python", WORKER, folder, tmp_path / "run", "self", "SIGTERM", place, "0", "0")
    assert stopped.returncode == 143
    assert f"train_llm.py: stopped by SIGTERM {when}; " in stopped.stderr
    assert checkpoints(tmp_path / "run") == []
    require_same_run("python", folder, tmp_path / "run", undisturbed("python"))


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("step", EVAL_STEPS - 1),  # at its end an evaluation is due
        ("evaluation", 1),  # which is that one: the first is of step 0
    ],
)
def test_an_evaluation_that_was_cut_off_is_made_by_the_next_start(
    place: str, number: int, folder: Path, tmp_path: Path, undisturbed: Callable[[str], Curve]
) -> None:
    fault = ("self", "SIGTERM", place, str(number), "1")
    stopped = start("ddp", WORKER, folder, tmp_path / "run", *fault)
    assert re.findall(r"exitcode  : (-?\d+)", stopped.stderr)[-1] == "143"
    assert require_stop(stopped, tmp_path / "run", EVAL_STEPS) == EVAL_STEPS
    assert (EVAL_STEPS, "eval/loss") not in [entry[:2] for entry in curve(tmp_path / "run")]
    require_same_run("ddp", folder, tmp_path / "run", undisturbed("ddp"))
