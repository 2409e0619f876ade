"""What the machine has not: precisions that a CPU does not compute, packages that are missing.

Only what is certain without an import of torch; the rest is told when the device is known.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from arguments import Arguments
from llm_training.launch_settings import LaunchSettings, shown_value


def hardware_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """What is asked of the machine that it certainly has not."""
    yield from _precision_problems(arguments, launch)
    yield from _optimizer_problems(arguments)
    yield from _tracker_problems(arguments)


def _precision_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    precision, device = arguments.mixed_precision, arguments.device
    place = f"device={device}"
    if device == "auto" and launch.use_cpu:
        place = "the CPU, which the launcher asks for"
    elif device != "cpu":
        return
    if precision == "fp16":
        yield f"mixed_precision=fp16 does not train with {place}: use bf16, fp32 or auto"


def _optimizer_problems(arguments: Arguments) -> Iterator[str]:
    if arguments.optim != "adamw_8bit":
        return
    if arguments.device in ("cpu", "mps"):
        both = f"optim=adamw_8bit and device={arguments.device}"
        yield f"{both} exclude each other: it works on CUDA GPUs; use optim=adamw"
    elif not is_installed("bitsandbytes"):
        yield "optim=adamw_8bit needs a package: pip install bitsandbytes, or use optim=adamw"


def _tracker_problems(arguments: Arguments) -> Iterator[str]:
    report_to = arguments.report_to
    if len(set(report_to)) < len(report_to) or ("none" in report_to and len(report_to) > 1):
        yield f"report_to={shown_value(report_to)}: name each tracker once, or none alone"
    for tracker in sorted({*report_to} - {"none"}):
        if not is_installed(tracker):
            yield f"report_to={tracker} is not installed: pip install {tracker}, or report_to=none"
    name = arguments.register_model
    if name is not None and set(name) & set("/:"):
        yield f"register_model={name} cannot name a model in MLflow: use no slash and no colon"


def is_installed(package: str) -> bool:
    """Whether a package could be imported; a folder of its name is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # none: a folder ./wandb of earlier runs
