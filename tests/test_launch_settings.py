"""Proves that what a launcher says is read as it takes effect; some tests start real processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from arguments import Arguments
from llm_training.launch_checks import launch_problems
from llm_training.launch_settings import SWITCHES, LaunchSettings, read_launch_settings
from tests.launches import (
    AUTO,
    DDP,
    DDP_FILE,
    DEEPSPEED,
    FSDP,
    FSDP_FILE,
    NAMES_JSON,
    PARALLEL,
    RANK,
    SINGLE,
    SINGLE_FILE,
    WITH_JSON,
    ZERO_2,
    command,
    launched,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and an environment that says nothing about launchers."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")) or name in RANK:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environ", "yaml", "options", "zero", "expected"),
    [
        (SINGLE, SINGLE_FILE, "", None, ("single", 1, 1, False)),
        (SINGLE, None, "", None, ("single", 1, 1, False)),
        ({**SINGLE, "ACCELERATE_USE_CPU": "True"}, None, "--cpu", None, ("single", 1, 1, True)),
        (DDP, DDP_FILE, "", None, ("ddp", 2, 2, False)),
        (DDP, DDP_FILE + "use_cpu: true", "", None, ("ddp", 2, 2, True)),
        ({**DDP, "WORLD_SIZE": "4"}, DDP_FILE, "--num-processes 4", None, ("ddp", 4, 4, False)),
        (FSDP, FSDP_FILE, "", None, ("fsdp", 2, 2, False)),
        (PARALLEL, FSDP_FILE, "", None, ("fsdp", 2, 1, False)),
        (DEEPSPEED, ZERO_2, "", None, ("deepspeed", 2, 2, False)),
        (WITH_JSON, NAMES_JSON, "", AUTO, ("deepspeed", 2, 2, False)),
    ],
    ids=lambda part: part.strip() if isinstance(part, str) and "\n" not in part else "",
)
def test_a_good_launch_is_read_and_has_no_problem(
    environ: dict[str, str], yaml: str | None, options: str, zero: Any, expected: tuple[Any, ...]
) -> None:
    launch = launched(environ, yaml, options, zero)
    found = (launch.backend, launch.num_processes, launch.data_parallel_size, launch.use_cpu)
    assert found == expected
    assert launch.config_file == ("launch.yaml" if yaml else None)
    assert list(launch_problems(Arguments(), launch)) == []


def test_plain_python_is_one_process() -> None:
    assert read_launch_settings({}, ["bash"]) == LaunchSettings()
    assert list(launch_problems(Arguments(), LaunchSettings())) == []


@pytest.mark.parametrize("name", ["SINGLE", "DDP", "FSDP", "DEEPSPEED"])
def test_torchrun_without_a_file_is_read_from_the_environment(name: str) -> None:
    launch = read_launch_settings(globals()[name], ["python", "/bin/torchrun", "--nproc", "2"])
    assert (launch.backend, launch.config_file) == (name.lower(), None)
    assert launch.asked_processes is None
    assert list(launch_problems(Arguments(), launch)) == []


@pytest.mark.parametrize(
    "words",
    [
        "python3 /a/bin/accelerate launch",
        "/a/bin/accelerate-launch",
        "python -m accelerate.commands.launch",
        r"C:\venv\Scripts\python.exe C:\venv\Scripts\accelerate.exe launch",
    ],
)
@pytest.mark.parametrize("option", ["--config_file x.yaml", "--config-file=x.yaml"])
def test_the_launcher_is_recognised(words: str, option: str) -> None:
    launch = read_launch_settings({}, [*words.split(), "--quiet", *option.split(), "train_llm.py"])
    assert launch.config_file == "x.yaml"


@pytest.mark.parametrize(
    "words",
    [
        "bash -c accelerate",
        "python accelerate config --config_file x.yaml",
        "python my_accelerate launch --config_file x.yaml",
        "torchrun --config_file x.yaml train_llm.py",
    ],
)
def test_something_else_is_no_launcher(words: str) -> None:
    assert read_launch_settings({}, words.split()) == LaunchSettings()


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("--num_processes 3", 3),
        ("--num_processes=3", 3),
        ("--num-processes 2 --num-processes 3", 3),
        ("--debug --num_processes 3 --cpu", 3),
        ("--gpu_ids 0,1 --num_processes 3", 3),
        ("--main_process_port 0", 2),
        ("--log_dir logs.py --num_processes 3", 3),
        ("-t 3 --num_processes 3", 3),
        ("train_llm.py --num_processes 3", 2),
        ("-m train_llm --num_processes 3", 2),
        ("--debug train_llm.py --num_processes 3", 2),
    ],
)
def test_options_end_at_the_script_and_go_before_the_file(options: str, asked: int) -> None:
    assert launched(DDP, DDP_FILE, options).asked_processes == asked


def test_the_launchers_switches_are_those_of_accelerate() -> None:
    actions = launch_command_parser()._actions
    names = {name for action in actions if action.nargs == 0 for name in action.option_strings}
    assert {name.lstrip("-").replace("-", "_") for name in names} == set(SWITCHES.split())


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME"])
def test_the_default_file_is_read_where_accelerate_reads_it(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / ("huggingface" if variable == "XDG_CACHE_HOME" else "") / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(DDP_FILE)
    environ = {**DDP, variable: str(tmp_path)}
    default = str(folder / "default_config.yaml")
    assert read_launch_settings(environ, command("", None)).config_file == default
    assert read_launch_settings(environ, command("", None)).asked_processes == 2
    assert read_launch_settings(environ, command("--cpu", None)).config_file is None
    assert read_launch_settings(environ, ["bash"]).config_file is None
    Path("other.yaml").write_text(DDP_FILE)
    assert read_launch_settings(environ, command("", "other.yaml")).config_file == "other.yaml"


@pytest.mark.parametrize("value", ["True", "1", "yes"])
def test_use_cpu_is_heard_from_every_place(value: str) -> None:
    assert read_launch_settings({"ACCELERATE_USE_CPU": value}, []).use_cpu
    assert launched(DDP, DDP_FILE + "use_cpu: true").use_cpu
    assert launched({**SINGLE, "ACCELERATE_USE_CPU": value}, SINGLE_FILE + "use_cpu: false").use_cpu
    assert not launched({**SINGLE, "ACCELERATE_USE_CPU": "0"}, SINGLE_FILE).use_cpu
    assert not launched(DDP, DDP_FILE + "use_cpu: false").use_cpu


def test_processes_of_one_row_count_once() -> None:
    environ = {**PARALLEL, "WORLD_SIZE": "8", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    launch = read_launch_settings(environ, [])
    assert (launch.tp_size, launch.cp_size, launch.data_parallel_size) == (2, 2, 2)
    assert read_launch_settings({**environ, "WORLD_SIZE": "1"}, []).data_parallel_size == 1
    environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"
    assert read_launch_settings(environ, []).data_parallel_size == 8


# ------------------------------------------------------------------------------- real processes


def test_the_parent_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from llm_training.launch_settings import _parent_command as p; print(p())"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    (shown,) = run.stdout.splitlines()
    mine = Path("/proc/self/cmdline")
    if mine.exists():
        assert ast.literal_eval(shown) == mine.read_text().rstrip("\0").split("\0")
    else:
        assert Path(sys.executable).name[:6].lower() in shown.lower()


def test_where_there_is_no_proc_ps_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "python accelerate launch --cpu a.py\n")

    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(subprocess, "run", run)
    assert read_launch_settings({}).use_cpu
    assert asked == [["ps", "-ww", "-o", "args=", "-p", str(os.getppid())]]

    def fail(words: list[str], **_: Any) -> None:
        raise FileNotFoundError(words[0])

    monkeypatch.setattr(subprocess, "run", fail)
    assert read_launch_settings({}) == LaunchSettings()


@pytest.mark.distributed
def test_real_launchers(tmp_path: Path) -> None:
    """A file starts two processes; --cpu starts one in silence, which is noticed."""
    script = tmp_path / "show.py"
    script.write_text(
        "import os\n"
        "from arguments import Arguments\n"
        "from llm_training.launch_checks import launch_problems\n"
        "from llm_training.launch_settings import read_launch_settings\n"
        "launch = read_launch_settings()\n"
        "found = launch.backend, launch.num_processes, launch.use_cpu, launch.config_file\n"
        "problems = list(launch_problems(Arguments(mixed_precision='fp32'), launch))\n"
        "open(f'shown{os.environ.get(\"RANK\", \"\")}', 'w').write(repr((found, problems)))\n"
    )
    Path("ddp.yaml").write_text(DDP_FILE + "use_cpu: true\nmain_process_port: 0\n")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}

    def start(*options: str) -> None:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "show.py"]
        ended = subprocess.run(launcher, env=environ, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr

    start("--config_file", "ddp.yaml")
    for rank in "01":
        shown = ast.literal_eval(Path(f"shown{rank}").read_text())
        assert shown == (("ddp", 2, True, "ddp.yaml"), [])
    start("--cpu", "--num_processes", "2")
    found, (problem,) = ast.literal_eval(Path("shown").read_text())
    assert found == ("single", 1, True, None)
    assert problem.startswith("accelerate launch says --num_processes 2, but only 1 process")
