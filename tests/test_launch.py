"""Device, precision, threads and seeds are what was asked for, or the launch is refused."""

from pathlib import Path

import pytest
import torch

from arguments import Arguments
from llm_training import launch
from llm_training.launch import (
    LaunchError,
    agree_on_seed,
    build_accelerator,
    choose_precision,
    find_device_type,
    seed_everything,
    set_threads,
)


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_accelerator_has_our_windows_and_precision(tmp_path: Path) -> None:
    arguments = Arguments(
        device="cpu", output_dir=str(tmp_path), report_to=["none"], mixed_precision="fp32"
    )
    accelerator = build_accelerator(arguments, accumulation=3, processes=1)
    assert accelerator.gradient_accumulation_steps == 3
    assert not accelerator.gradient_state.sync_with_dataloader
    assert accelerator.mixed_precision == "no"
    assert accelerator.device.type == "cpu"


def test_fewer_processes_than_asked_for_are_noticed(tmp_path: Path) -> None:
    arguments = Arguments(device="cpu", output_dir=str(tmp_path), report_to=["none"])
    with pytest.raises(LaunchError, match=r"2 processes were started .* Accelerate runs 1"):
        build_accelerator(arguments, accumulation=1, processes=2)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(LaunchError, match=f"--device {device}: this machine has none"):
        find_device_type(device)
    assert find_device_type("auto") == "cpu"


def test_use_cpu_of_accelerates_file_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device_type("auto") == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert find_device_type("auto") == "cpu"


@pytest.mark.parametrize(
    ("asked", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "no"),
        ("auto", "cuda", True, "bf16"),
        ("fp32", "cpu", True, "no"),
        ("bf16", "cpu", False, "bf16"),  # slow but exact: asked for, so given
        ("fp16", "cuda", True, "fp16"),
    ],
)
def test_precision(
    asked: str, device: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "has_bf16", lambda _: has_bf16)
    assert choose_precision(asked, device) == expected


def test_precision_that_would_fall_back_in_silence_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "has_bf16", lambda _: False)
    with pytest.raises(LaunchError, match="fp16 does nothing on a CPU"):
        choose_precision("fp16", "cpu")
    with pytest.raises(LaunchError, match="this GPU has no bf16"):
        choose_precision("bf16", "cuda")


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    set_threads(None)
    assert torch.get_num_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    set_threads(None)
    assert torch.get_num_threads() == 2
    set_threads(1)
    assert torch.get_num_threads() == 1


def test_seeds() -> None:
    assert agree_on_seed(7) == 7
    assert agree_on_seed(None) != agree_on_seed(None)
    seed_everything(3, each_rank_its_own=False)
    first = torch.rand(2)
    seed_everything(3, each_rank_its_own=False)
    assert torch.equal(torch.rand(2), first)


def test_cores_are_counted_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert launch.count_cores() == 6


@pytest.mark.parametrize(("machine", "expected"), [("aarch64", True), ("arm64", False)])
def test_bf16_on_arm_is_what_the_library_says(
    machine: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert launch.has_bf16("cpu") is expected
