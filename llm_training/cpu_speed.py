"""What makes a step on a CPU faster without changing what it computes."""

from __future__ import annotations

import ctypes
import os
import platform

import psutil  # type: ignore[import-untyped]
from torch import nn
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
)

# GELU's tanh form, written out in some eight operations that each keep a tensor for the backward
# pass. `quick_gelu` and GELU with erf are other functions; `gelu_pytorch_tanh` is fused already.
TANH_GELUS = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_INT = 2**31 - 1  # what mallopt takes
# glibc up to 2.34 takes no larger M_MMAP_THRESHOLD on 64 bits (HEAP_MAX / 2).
OLD_MMAP_THRESHOLD = 32 * 2**20

KEPT_SHARE = 1 / 4  # of the free memory, at most, by all processes of the machine
LEAST_FREE_BYTES = 2 * 2**30  # with less, every page is needed by someone


def fuse_gelu(model: nn.Module) -> int:
    """Lets one operation compute GELU's tanh form where the model writes it out.

    It is the same function of the same input, rounded once and not eight times. The configuration
    and the names of weights stay as they are, and so does what is saved.

    Returns:
        How many modules were replaced.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units" (arXiv:1606.08415), section 2.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_written_out(child):
                setattr(module, name, nn.GELU(approximate="tanh").train(child.training))
                count += 1
    return count


def keep_memory_warm() -> str:
    """Lets this process keep the memory that a step frees for the next one.

    glibc gives large blocks back to the system as soon as they are freed, and the next step pays
    for each of their pages again: the system finds it, clears it and maps it. Kept are up to a
    quarter of what is free now, shared by the processes of the machine; what is larger is given
    back as before. The peak of a step is hardly touched, only what is held between two peaks.

    Returns:
        What was done, or why nothing was, in words for the log.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "freed memory given back (no glibc)"
    free = psutil.virtual_memory().available
    if free < LEAST_FREE_BYTES:
        return f"freed memory given back (only {free / 2**30:.1f} GiB are free)"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limit = min(int(free * KEPT_SHARE / processes), LARGEST_INT)
    # Blocks above the first are mapped one by one and unmapped when freed; free space at the
    # heap's end above the second is given back.
    mallopt = ctypes.CDLL(None).mallopt
    is_taken = mallopt(M_MMAP_THRESHOLD, limit) or mallopt(M_MMAP_THRESHOLD, OLD_MMAP_THRESHOLD)
    if not (is_taken and mallopt(M_TRIM_THRESHOLD, limit)):
        return "freed memory given back (glibc refused)"
    return f"freed memory kept (up to {limit / 2**30:.1f} GiB)"


def fast_path_line(num_fused: int, num_dropouts: int, memory: str) -> str:
    """The line of the log that says what is done on this CPU.

    Args:
        num_fused: what `fuse_gelu` returned.
        num_dropouts: what `cpu_dropout.speed_up_dropout` returned.
        memory: what `keep_memory_warm` returned.
    """
    gelu = f"GELU fused in {num_fused} blocks, " if num_fused else ""
    dropout = f"dropout from random bits in {num_dropouts} places, " if num_dropouts else ""
    return f"CPU      {gelu}{dropout}{memory}"


def _is_written_out(module: nn.Module) -> bool:
    if type(module) is GELUTanh:  # gelu_python_tanh
        return getattr(module.act, "__name__", "") == "_gelu_tanh_python"
    return type(module) in TANH_GELUS
