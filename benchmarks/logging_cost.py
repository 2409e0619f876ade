"""What it costs to log every step, as a share of the training.

    python benchmarks/logging_cost.py --rounds 5 --steps 250 --sendings 60

The model of the quickstart, `logging_steps=1`, in fresh processes: every round trains once for each
way, in turns that alternate: without a tracker, with MLflow (SQLite) and with TensorBoard.
Evaluation and saving are left out, but for the last checkpoint.

- `share`: of the seconds between the first and the last logged step, those that the loop spent in
  logging (measuring, the log's line, the console's line, the queue) and those that the tracker's
  thread computed, for which the loop may have waited: all of them are counted. `process` is what
  MLflow's own process computed, for which no loop waits where a core is idle
- `kept`: how long the training's threads were ready to run and had no core (Linux's run delay,
  /proc/PID/task/*/schedstat; all threads added up), as a share of the same seconds: what other
  processes took from the training. What it is more with MLflow than without, MLflow's process took
- `sending`: by how much the steps in which MLflow is sent to are longer than those just before and
  after them, by the wall clock. From minute to minute steps vary by more than logging could cost;
  those that lie beside each other vary little, and many sendings are averaged.

The first is what logging costs by account, the others what the loop really waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

WAYS = ("none", "mlflow", "tensorboard")
SENT_STEPS = 40  # points in a sending: half as many as by itself, so the fixed costs count double
WINDOW = 5  # steps: longer than a sending takes
SETTINGS: dict[str, Any] = {
    "logging_steps": 1,
    "warmup_steps": 1,
    "eval_steps": None,
    "save_steps": None,
    "save_best": False,
    "leakage_report": False,
    "sample_prompt": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--sendings", type=int, default=30, help="to be watched; 0: none")
    parser.add_argument("--one", choices=WAYS, help="train once, and print what it took as JSON")
    parser.add_argument("--watch", type=int, help="so many sendings; prints the times as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one, options.steps)))
        return
    if options.watch:
        print(json.dumps(watch_sendings(options.watch)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        train_elsewhere("none", 2, Path(folder))  # makes the tokens
        for number in range(options.rounds):
            for way in WAYS if number % 2 else WAYS[::-1]:
                found[way].append(train_elsewhere(way, options.steps, Path(folder)))
                print(f"round {number + 1}, {way}: {found[way][-1]}", flush=True)
        watch = ["--watch", str(options.sendings)]
        excesses = run_elsewhere(watch, Path(folder)) if options.sendings else []
    report(found)
    report_sendings(excesses)


def train_elsewhere(way: str, steps: int, folder: Path) -> dict[str, float]:
    """Trains in a process of its own, in `folder`."""
    return dict(run_elsewhere(["--one", way, "--steps", str(steps)], folder))


def run_elsewhere(words: list[str], folder: Path) -> Any:
    """What this script prints last, as JSON, when it is started so in `folder`."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train(way: str, steps: int) -> dict[str, float]:
    """Trains here; returns the seconds of all and of what logging took."""
    import psutil  # type: ignore[import-untyped]

    import train_llm
    from llm_training.run import Run
    from llm_training.tracking.steady_tracker import SteadyTracker

    spent: dict[str, float] = defaultdict(float)
    logged_at: list[float] = []
    log_progress = train_llm.log_progress

    def log_and_note(run: Run, *rest: Any) -> None:
        logged_at.append(time.perf_counter())
        log_progress(run, *rest)
        if len(logged_at) == 1:
            processes.extend(child.pid for child in psutil.Process().children() if way == "mlflow")
            spent["process"] -= computed()
            spent["kept"] -= kept_waiting()
            return
        spent["loop"] += time.perf_counter() - logged_at[-1]
        if len(logged_at) == steps:
            spent["process"] += computed()
            spent["kept"] += kept_waiting()

    turn = SteadyTracker.turn
    processes: list[int] = []

    def computed() -> float:
        """Seconds, by MLflow's process."""
        times = [psutil.Process(number).cpu_times() for number in processes]
        return sum(each.user + each.system for each in times)

    def turn_and_note(self: SteadyTracker) -> float | None:
        began, pause = time.thread_time(), turn(self)
        if len(logged_at) > 1 and self._end is None:
            spent["thread"] += time.thread_time() - began
        return pause

    train_llm.log_progress = log_and_note  # type: ignore[assignment]
    SteadyTracker.turn = turn_and_note  # type: ignore[method-assign]
    folder = run_quickstart(way, steps)
    seconds = logged_at[-1] - logged_at[0]
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    num_metrics = max(len(json.loads(line)) - 2 for line in lines)  # without step and time
    return {"seconds": seconds, **spent, "steps": steps, "metrics_a_step": num_metrics}


def kept_waiting() -> float:
    """The seconds that this process's threads were ready and waited for a core; 0 without Linux."""
    waits = (path.read_text().split()[1] for path in Path("/proc/self/task").glob("*/schedstat"))
    return sum(int(nanoseconds) for nanoseconds in waits) / 1e9


def run_quickstart(way: str, steps: int) -> Path:
    """Trains the quickstart's model here; returns the run's folder."""
    import train_llm
    from llm_training.argument_parsing import read_arguments

    name = f"{way}-{time.time_ns()}"
    flags = ["--report_to", way, "--max_steps", str(steps), "--output_dir", name]
    Path("settings.json").write_text(json.dumps(SETTINGS))
    config = str(ROOT / "train_configs" / "quickstart.json")
    assert train_llm.main(read_arguments([config, "settings.json", *flags], 1)) == 0
    return Path(name)


def watch_sendings(num_sendings: int) -> list[list[float]]:
    """Trains here; returns of each sending its excess in seconds, and the seconds of a step.

    What waits is sent every `SENT_STEPS` steps and at no other time. The excess is the time of the
    `WINDOW` steps that follow, less the mean time of as many before them and as many after.
    """
    import train_llm
    from llm_training.run import Run
    from llm_training.tracking import steady_tracker

    began: list[float] = []
    log_progress = train_llm.log_progress

    def log(run: Run, *rest: Any) -> None:
        log_progress(run, *rest)
        if run.state.step % SENT_STEPS == 0:
            run.tracking.flush(())
        began.append(time.perf_counter())

    train_llm.log_progress = log  # type: ignore[assignment]
    steady_tracker.SEND_INTERVAL_SECONDS = 1e9
    run_quickstart("mlflow", SENT_STEPS * (num_sendings + 1))
    excesses = []
    for step in range(SENT_STEPS, SENT_STEPS * (num_sendings + 1), SENT_STEPS):
        first = step - 1  # `began[i]` is the end of step i + 1
        before, now, after = (
            began[first + shift + WINDOW] - began[first + shift] for shift in (-WINDOW, 0, WINDOW)
        )
        excesses.append([now - (before + after) / 2, (before + after) / (2 * WINDOW)])
    return excesses


def report_sendings(excesses: list[list[float]]) -> None:
    """How much longer a sending keeps the loop, as a share of the steps that it sends."""
    if not excesses:
        return
    step = statistics.median(seconds for _, seconds in excesses)
    waits = [excess for excess, _ in excesses]
    draws = random.Random(0)
    means = sorted(statistics.fmean(draws.choices(waits, k=len(waits))) for _ in range(10_000))
    share, low, high = (
        100 * seconds / (SENT_STEPS * step)
        for seconds in (statistics.fmean(waits), means[250], means[-250])
    )
    mean, median = 1000 * statistics.fmean(waits), 1000 * statistics.median(waits)
    print(
        f"a sending of {SENT_STEPS} points: {mean:.1f} ms longer in the mean of {len(waits)}"
        f" (median {median:.1f}), {share:.3f}% of its steps"
        f" (95% of resampled means: {low:.3f} to {high:.3f})"
    )


def report(found: dict[str, list[dict[str, float]]]) -> None:
    import torch

    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores; torch {torch.__version__}")
    say("ms a step, none", [1000 * run["seconds"] / run["steps"] for run in found["none"]])
    for way in WAYS:
        for part in ("loop", "thread", "process", "kept"):
            shares = [100 * run.get(part, 0.0) / run["seconds"] for run in found[way]]
            say(f"{way}: share of the {part}, %", shares)
    pairs = zip(found["mlflow"], found["none"], strict=True)
    say("time, two processes", [ours["seconds"] / base["seconds"] for ours, base in pairs])


def say(what: str, values: list[float]) -> None:
    middle = statistics.median(values)
    print(f"{what}: {middle:.3f} (from {min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
