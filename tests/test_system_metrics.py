"""Proves that system metrics have MLflow's names, come once in ten seconds, and never end a run."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from llm_training.system_metrics import HELD_SECONDS, SAMPLE_SECONDS, HeldMemory, SystemMetrics
from tests.small_runs import open_place, read_log, train_small


class Clock:
    """A clock that moves when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class NVMLError(Exception):
    pass


def no_power(handle: int) -> int:
    raise NVMLError("Not Supported")


def driver() -> SimpleNamespace:
    """Two GPUs that are not there, the second without a meter of power."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87 + handle),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3_000_000, total=12_000_000),
        nvmlDeviceGetPowerUsage=lambda handle: no_power(handle) if handle else 350_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
    )


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_names_and_units_are_those_of_mlflow(tmp_path: Path) -> None:
    metrics = SystemMetrics(tmp_path).read()
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    theirs: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    assert metrics.keys() == {f"system/{name}" for name in theirs}
    for name in ("system_memory_usage_megabytes", "disk_usage_megabytes"):
        assert metrics[f"system/{name}"] == pytest.approx(theirs[name], rel=0.2)


def test_gpus_have_the_names_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = driver()
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr("mlflow.system_metrics.metrics.gpu_monitor.pynvml", pynvml, raising=False)
    monitor = GPUMonitor()
    monitor.collect_metrics()
    theirs = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
    ours = SystemMetrics(tmp_path).read()
    assert {name: value for name, value in ours.items() if "/gpu_" in name} == theirs
    assert theirs["system/gpu_1_utilization_percentage"] == 88
    assert "system/gpu_1_power_usage_watts" not in theirs


def test_without_a_gpus_driver_there_are_no_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pynvml = driver()
    pynvml.nvmlInit = lambda: no_power(0)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    metrics = SystemMetrics(tmp_path).read()
    assert metrics and not any("gpu" in name for name in metrics)


def test_they_are_read_once_in_a_while(tmp_path: Path) -> None:
    clock = Clock()
    system = SystemMetrics(tmp_path, clock)
    assert system.read()
    clock.now += 0.9 * SAMPLE_SECONDS
    assert system.read() == {}
    clock.now += 0.2 * SAMPLE_SECONDS
    assert system.read()


def test_the_network_counts_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = SimpleNamespace(bytes_recv=5_000_000, bytes_sent=1_000_000)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: counters)
    system = SystemMetrics(tmp_path)
    counters = SimpleNamespace(bytes_recv=7_500_000, bytes_sent=1_000_000)
    metrics = system.read()
    assert metrics["system/network_receive_megabytes"] == 2.5
    assert metrics["system/network_transmit_megabytes"] == 0


def test_what_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    system = SystemMetrics(tmp_path / "not there", clock)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    calls = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: calls.append(1) or 1 / 0)
    for _ in range(2):
        assert system.read().keys() == {"system/cpu_utilization_percentage"}
        clock.now += 2 * SAMPLE_SECONDS
    assert len(calls) == 1


def test_memory_of_the_process_without_a_gpu() -> None:
    clock = Clock()
    memory = HeldMemory(torch.device("cpu"), clock)
    before = memory.read()
    assert memory.read() == {}  # not due again
    clock.now += HELD_SECONDS
    # Straight from the system: what was freed before may be kept, and would be taken again.
    with mmap.mmap(-1, 64_000_000) as kept:
        for place in range(0, len(kept), mmap.PAGESIZE):
            kept[place] = 1
        grown = memory.read()["perf/memory_bytes"] - before["perf/memory_bytes"]
    assert before.keys() == {"perf/memory_bytes"} and grown > 50_000_000


def test_memory_of_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 20)
    total = SimpleNamespace(total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    metrics = HeldMemory(torch.device("cuda", 0)).read()
    assert (metrics["perf/memory_bytes"], metrics["perf/memory_ratio"]) == (20, 0.25)


def test_a_run_logs_them_beside_its_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(tmp_path, monkeypatch)
    line = read_log(train_small(place, report_to="tensorboard"))[0]
    assert line["system/system_memory_usage_megabytes"] > 0
    assert line["perf/memory_bytes"] > 50_000_000
    assert line["perf/step_seconds"] == pytest.approx(128 / line["perf/tokens_per_second"])
    assert 0 < line["perf/data_wait_ratio"] < 1


@pytest.mark.parametrize(
    "changes", [{"report_to": "tensorboard", "log_system_metrics": False}, {"report_to": "none"}]
)
def test_they_are_left_out_where_nobody_asked(
    changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_place(tmp_path, monkeypatch)
    lines = read_log(train_small(place, **changes))
    assert len(lines) == 4 and not any("system/" in name for line in lines for name in line)
