"""The lines that a run shows on the console: pure functions of the metrics."""

from __future__ import annotations

from llm_training.throughput import format_count, format_duration


def progress_line(
    step: int,
    total_steps: int | None,
    metrics: dict[str, float],
    seconds_left: float | None = None,
) -> str:
    """The line on training; what was not measured is left out, and steps not yet known are a `?`.

    For instance `step 120/400 | loss 4.1234 | grad 0.81 | lr 9.8e-04 | 9.1k tokens/s | 1:52 left`.
    """
    total = "?" if total_steps is None else str(total_steps)
    parts = [f"step {step:>{len(total)}}/{total}"]
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4f}")
    if "train/grad_norm" in metrics:
        parts.append(f"grad {metrics['train/grad_norm']:.2f}")
    if "train/learning_rate" in metrics:
        parts.append(f"lr {metrics['train/learning_rate']:.1e}")
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{format_count(metrics['perf/tokens_per_second'])} tokens/s")
    if seconds_left is not None:
        parts.append(f"{format_duration(seconds_left)} left")
    return " | ".join(parts)


def evaluation_lines(step: int, metrics: dict[str, float]) -> list[str]:
    """The lines on an evaluation: of the main set, and of each further set and source."""
    by_set: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        of_set, _, metric = name.removeprefix("eval/").rpartition("/")
        by_set.setdefault(of_set, {})[metric] = value
    return [evaluation_line(step, own, of_set) for of_set, own in by_set.items()]


def evaluation_line(step: int, metrics: dict[str, float], of_set: str = "") -> str:
    """The line on an evaluation, with all of its metrics in their order.

    For instance `eval  step 120 | loss 3.9012 ± 0.0103 | perplexity 49.5 | token accuracy 0.3106`;
    that of a set has its name behind the step.
    """
    parts = [f"eval  step {step}", *([of_set] if of_set else [])]
    for name, value in metrics.items():
        label = name.removeprefix("eval/").replace("_", " ")
        digits = "," if isinstance(value, int) else ".4f" if value < 10 else ",.1f"
        if label == "loss stderr":
            parts[-1] += f" ± {value:{digits}}"
        else:
            parts.append(f"{label} {value:{digits}}")
    return " | ".join(parts)
