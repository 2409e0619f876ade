"""What a run uses of its machine: processors, memory, disk, network and GPUs; what it holds itself.

The names and units are those that MLflow's own monitor has, so its page of system metrics shows
them. Its monitor stays off: it sends from a thread of its own, by a clock of its own, and what it
sent before a resume would stay there twice.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

# As MLflow's own monitor. On machines with many GPUs their driver takes its time, and each number
# costs a tracker's database a tenth of a millisecond.
SAMPLE_SECONDS = 10.0
HELD_SECONDS = 1.0  # for what one process holds, which changes with its steps
MEGABYTE = 1e6


class SystemMetrics:
    """The load of this machine, and of all of its GPUs, whoever uses them.

    What cannot be measured here is left out: metrics never end a run.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins to measure: processors and network count from here on.

        Args:
            folder: on the disk that is watched; it is there.
            clock: in seconds; tests bring their own.
        """
        self._clock = clock
        self._sources: list[Callable[[], dict[str, float]]] = [
            processor_load,
            memory_use,
            lambda: disk_use(folder),
            NetworkUse().use,
            Gpus().use,
        ]
        self._due_at = clock()
        self.read()  # what the next one is compared with
        self._due_at = clock()

    def read(self) -> dict[str, float]:
        """Metrics by name, such as `system/cpu_utilization_percentage`.

        Nothing, if the last ones were read within `SAMPLE_SECONDS`.
        """
        now = self._clock()
        if now < self._due_at:
            return {}
        self._due_at = now + SAMPLE_SECONDS
        metrics: dict[str, float] = {}
        for source in [*self._sources]:
            try:
                metrics |= source()
            except Exception:  # each system fails in its own way; what fails is not asked again
                self._sources.remove(source)
        return {f"system/{name}": round(value, 1) for name, value in metrics.items()}


def processor_load() -> dict[str, float]:
    """Share of all cores that was busy since the last call, in percent."""
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def memory_use() -> dict[str, float]:
    """Main memory in use."""
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
    }


def disk_use(folder: Path) -> dict[str, float]:
    """The disk that holds `folder`."""
    disk = psutil.disk_usage(str(folder))
    return {
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / MEGABYTE,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }


class NetworkUse:
    """What came and went over all interfaces since the first call."""

    def __init__(self) -> None:
        self._first: Any = None

    def use(self) -> dict[str, float]:
        """Received and sent; nothing where there is no interface."""
        now = psutil.net_io_counters()
        if now is None:
            return {}
        self._first = self._first or now
        return {
            "network_receive_megabytes": (now.bytes_recv - self._first.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (now.bytes_sent - self._first.bytes_sent) / MEGABYTE,
        }


class Gpus:
    """NVIDIA's GPUs of this machine, in the driver's order; none without nvidia-ml-py."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self._nvml = nvml
        except Exception:  # not installed, no driver, no permission
            return

    def use(self) -> dict[str, float]:
        """Load, memory and power of each, as far as its driver tells."""
        metrics: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            for measure in (self._load, self._memory, self._power):
                try:
                    values = measure(handle)
                except self._nvml.NVMLError:  # power of a part of a GPU, for instance
                    continue
                metrics |= {f"gpu_{index}_{name}": value for name, value in values.items()}
        return metrics

    def _load(self, handle: Any) -> dict[str, float]:
        return {"utilization_percentage": self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu}

    def _memory(self, handle: Any) -> dict[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "memory_usage_percentage": memory.used / memory.total * 100,
            "memory_usage_megabytes": memory.used / MEGABYTE,
        }

    def _power(self, handle: Any) -> dict[str, float]:
        milliwatts = self._nvml.nvmlDeviceGetPowerUsage(handle)
        limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return {
            "power_usage_watts": milliwatts / 1000,
            "power_usage_percentage": milliwatts / limit * 100,
        }


class HeldMemory:
    """Memory of this process, in bytes.

    On a GPU the most that its tensors held at once, and that as a share of the GPU's memory; the
    GPU is not asked, and not waited for. Elsewhere what the process holds of main memory, which
    the operating system is asked for once in `HELD_SECONDS` at most.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes where tensors lie; tests bring a clock, in seconds."""
        self._device, self._clock = device, clock
        self._process = psutil.Process()
        self._due_at = clock()

    def read(self) -> dict[str, float]:
        """`perf/memory_bytes`, and of a GPU `perf/memory_ratio`; nothing where it is not due."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            whole = torch.cuda.get_device_properties(self._device).total_memory
            return {"perf/memory_bytes": peak, "perf/memory_ratio": peak / whole}
        now = self._clock()
        if now < self._due_at:
            return {}
        self._due_at = now + HELD_SECONDS
        return {"perf/memory_bytes": self._process.memory_info().rss}
