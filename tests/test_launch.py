"""Device, precision, threads and seeds are what was asked for, or the launch is refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arguments import Arguments, BatchSizes
from llm_training import launch
from llm_training.launch import (
    LaunchError,
    build_accelerator,
    check_combination,
    check_speed_choices,
    choose_precision,
    describe_threads,
    fill_deepspeed_config,
    find_device_type,
    make_deterministic,
    seed_everything,
    set_threads,
)
from llm_training.launch_settings import Given, LaunchSettings

ONE_PROCESS = LaunchSettings()


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    return Arguments(
        device="cpu", output_dir=str(tmp_path), report_to=["none"], mixed_precision="fp32"
    )


def sizes(accumulation: int) -> BatchSizes:
    return BatchSizes(8, accumulation, 1, 8 * accumulation)


def test_the_accelerator_has_our_windows_and_precision(arguments: Arguments) -> None:
    accelerator = build_accelerator(arguments, ONE_PROCESS, batch=sizes(3))
    assert accelerator.gradient_accumulation_steps == 3
    assert not accelerator.gradient_state.sync_with_dataloader
    assert accelerator.mixed_precision == "no"
    assert accelerator.device.type == "cpu"


def test_fewer_processes_than_asked_for_are_noticed(arguments: Arguments) -> None:
    two = LaunchSettings(backend="ddp", num_processes=2)
    with pytest.raises(LaunchError, match=r"2 processes were started .* Accelerate runs 1"):
        build_accelerator(arguments, two, batch=sizes(1))


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_a_backend_that_does_not_run_is_noticed(backend: str, arguments: Arguments) -> None:
    asked = LaunchSettings(backend=backend, config_file="my.yaml")
    with pytest.raises(LaunchError, match=f"my.yaml asks for {backend}, but Accelerate runs"):
        build_accelerator(arguments, asked, batch=sizes(1))


def test_a_precision_that_the_launchers_file_contradicts_is_refused(arguments: Arguments) -> None:
    arguments.mixed_precision = "auto"  # known only when the device is
    says_fp16 = LaunchSettings(given={"mixed_precision": Given("fp16", "my.yaml says fp16", "")})
    with pytest.raises(LaunchError, match="says fp16"):
        build_accelerator(arguments, says_fp16, batch=sizes(1))


def test_deepspeed_gets_our_values() -> None:
    config = {
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
    }
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    fill_deepspeed_config(accelerator, Arguments(max_grad_norm=0.3), BatchSizes(4, 3, 2, 24))
    assert config == {
        "gradient_clipping": 0.3,
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
    }
    # DeepSpeed would clip at 1.0 where nothing is said.
    fill_deepspeed_config(accelerator, Arguments(max_grad_norm=None), BatchSizes(4, 3, 2, 24))
    assert config["gradient_clipping"] == 0.0
    config["zero_optimization"] = {"stage": 0}
    with pytest.raises(LaunchError, match="stage 0 splits nothing"):
        fill_deepspeed_config(accelerator, Arguments(), BatchSizes(4, 3, 2, 24))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(LaunchError, match=f"--device {device}: this machine has none"):
        find_device_type(device, ONE_PROCESS)
    assert find_device_type("auto", ONE_PROCESS) == "cpu"


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "deepspeed"])
def test_several_processes_do_not_fall_back_to_the_cpu_unasked(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    several = LaunchSettings(backend=backend, num_processes=2, config_file="my.yaml")
    with pytest.raises(LaunchError, match=r"no accelerator .* my.yaml .* Give --device cpu"):
        find_device_type("auto", several)
    assert find_device_type("cpu", several) == "cpu"


def test_use_cpu_of_accelerates_file_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device_type("auto", ONE_PROCESS) == "cuda"
    assert find_device_type("auto", LaunchSettings(use_cpu=True)) == "cpu"


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
    monkeypatch.setattr(launch, "read_cpu_quota", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    set_threads(None)
    assert torch.get_num_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    set_threads(None)
    assert torch.get_num_threads() == 2
    set_threads(1)
    assert torch.get_num_threads() == 1


def test_what_the_environment_said_of_threads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(2)
    assert describe_threads() == "2 threads (OMP_NUM_THREADS=1 undone)"
    set_threads(1)
    assert describe_threads() == "1 thread"
    monkeypatch.delenv("OMP_NUM_THREADS")
    set_threads(2)
    assert describe_threads() == "2 threads"


def test_one_openmp_thread_of_the_environment_is_undone_in_torch_and_its_libraries() -> None:
    code = (
        "import torch; from llm_training.launch import set_threads; before = [];"
        "before.append(torch.get_num_threads()); set_threads(3);"
        "info = torch.__config__.parallel_info();"
        "print(before[0], torch.get_num_threads(), *[line.split(':')[1].strip() for line in"
        " info.splitlines() if 'get_max_threads()' in line or 'at::get_num_threads' in line])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    before, *after = ended.stdout.split()
    assert before == "1"
    assert len(after) >= 3  # torch, OpenMP, and MKL where torch has it
    assert set(after) == {"3"}


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("1600000 100000", 8),  # more than there are
        ("max 100000", 8),
        ("", 8),
    ],
)
def test_the_share_of_a_container_is_heeded(
    text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    quota = launch.read_cpu_quota(tmp_path / "cpu.max")
    assert launch.read_cpu_quota(tmp_path / "missing") is None
    monkeypatch.setattr(launch, "read_cpu_quota", lambda: quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert launch.count_cores() == cores


def test_seeds() -> None:
    seed_everything(3)
    first = torch.rand(2)
    seed_everything(3)
    assert torch.equal(torch.rand(2), first)
    seed_everything(3, rank=1)
    assert not torch.equal(torch.rand(2), first)
    seed_everything(2**32 - 1, rank=4)  # the largest seed, on a later rank
    assert torch.equal(torch.rand(2), first)


def test_cores_are_counted_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(launch, "read_cpu_quota", lambda: None)
    assert launch.count_cores() == 6


@pytest.mark.parametrize(("machine", "expected"), [("aarch64", True), ("arm64", False)])
def test_bf16_on_arm_is_what_the_library_says(
    machine: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert launch.has_bf16("cpu") is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fsdp", "tp_size": 2, "num_processes": 4}, "ReplicateParallel"),
        ({"backend": "ddp", "tp_size": 2, "num_processes": 4}, "give as many processes"),
        ({"backend": "ddp", "tp_size": 2, "cp_size": 2, "num_processes": 4}, "cp_size 1"),
        ({"backend": "ddp", "cp_size": 2, "num_processes": 2}, "only together with FSDP2"),
        ({"backend": "deepspeed", "cp_size": 2, "num_processes": 2}, "only together with FSDP2"),
    ],
)
def test_splits_that_accelerate_cannot_combine_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        check_combination(LaunchSettings(**settings))
    check_combination(LaunchSettings(backend="ddp", tp_size=2, num_processes=2))
    check_combination(LaunchSettings(backend="fsdp", cp_size=2, num_processes=4))


def test_what_only_gpus_compute_is_refused_elsewhere(arguments: Arguments) -> None:
    arguments.device = "auto"  # known only when the device is
    arguments.mixed_precision = "fp8"
    with pytest.raises(LaunchError, match=r"fp8 needs an NVIDIA GPU .* on cpu"):
        check_speed_choices(arguments, ONE_PROCESS, "cpu")
    arguments.mixed_precision = "auto"
    arguments.tf32 = arguments.use_liger_kernel = True
    with pytest.raises(LaunchError, match=r"--tf32 true and --use_liger_kernel true: .* on cpu"):
        check_speed_choices(arguments, ONE_PROCESS, "cpu")
    check_speed_choices(arguments, ONE_PROCESS, "cuda")


def test_determinism_on_a_gpu_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filling = torch.utils.deterministic
    try:
        make_deterministic("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        assert not filling.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        filling.fill_uninitialized_memory = True
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        os.environ.pop("FLASH_ATTENTION_DETERMINISTIC", None)


@pytest.mark.parametrize("is_asked", [True, False])
def test_determinism_can_be_left_out(
    is_asked: bool, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(launch, "make_deterministic", called.append)
    arguments.deterministic = is_asked
    build_accelerator(arguments, ONE_PROCESS, batch=sizes(1))
    assert called == (["cpu"] if is_asked else [])
