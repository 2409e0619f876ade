"""Proves that the files that are shipped work as they are: launch files, pins, README.

The files of train_configs/ have their own test, tests/test_presets.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[1]
ACCELERATE_CONFIGS = sorted(ROOT.glob("accelerate_configs/*.yaml"))
DEEPSPEED_CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))
each_accelerate_config = pytest.mark.parametrize(
    "path", ACCELERATE_CONFIGS, ids=lambda path: path.name
)

each_deepspeed_config = pytest.mark.parametrize(
    "path", DEEPSPEED_CONFIGS, ids=lambda path: path.name
)

# In Accelerate's files, where fsdp_config.version means the option --fsdp_version.
PREFIX_OF_OPTIONS = {
    "deepspeed_config": "",
    "parallelism_config": "",
    "fsdp_config": "fsdp_",
    "dynamo_config": "dynamo_",
}

# What the launcher makes of distributed_type: it switches one of these on.
SWITCHES_OF_TYPES = {
    "NO": None,
    "MULTI_GPU": "multi_gpu",
    "FSDP": "use_fsdp",
    "DEEPSPEED": "use_deepspeed",
}

# What Accelerate or train_llm.py fills in for DeepSpeed.
FILLED_IN = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
}

# Only used where somebody installed them.
OPTIONAL_PACKAGES = {"wandb", "torchao"}


def shipped_files() -> list[Path]:
    """What git tracks, and what it would track after `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if (ROOT / name).is_file()]


def source_files() -> list[Path]:
    """The code that runs with requirements.txt alone."""
    patterns = "*.py", "llm_training/**/*.py", "benchmarks/**/*.py", "docs/**/*.py"
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def pinned_packages(path: Path) -> dict[str, str]:
    """Package to version; a line that is no exact pin fails the test."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pins = {}
    for line in lines:
        if line and not line.startswith(("#", "-r ")):
            pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)( ; .+)?", line)
            assert pin, f"{path.name}: not an exact pin: {line}"
            pins[pin[1]] = pin[2]
    return pins


def imported_packages(path: Path) -> set[str]:
    """Top-level names that a file imports and that neither Python nor this project has."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    ours = {"arguments", "train_llm", "llm_training", "benchmarks", "docs", "tests"}
    return {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names)


def read_settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def launcher_arguments(path: Path) -> argparse.Namespace:
    """What `accelerate launch` goes by, given this file."""
    words = ["--config_file", str(path), "train_llm.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@each_accelerate_config
def test_accelerate_config_has_no_unknown_key(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level only
    options = vars(launch_command_parser().parse_args(["train_llm.py"])).keys()
    for group, prefix in PREFIX_OF_OPTIONS.items():
        keys = getattr(config, group)
        named = {key if key.startswith(prefix) else prefix + key for key in keys}
        assert named <= options, f"{group}: Accelerate would drop {sorted(named - options)}"


@each_accelerate_config
def test_accelerate_takes_every_setting(path: Path) -> None:
    """Some settings it reads from the command line only, and drops from a file without a word."""
    settings = read_settings(path)
    taken = launcher_arguments(path)
    switch = SWITCHES_OF_TYPES[settings.pop("distributed_type")]
    for name in filter(None, SWITCHES_OF_TYPES.values()):
        assert getattr(taken, name) == (name == switch)
    assert settings.pop("compute_environment") == "LOCAL_MACHINE"
    for group in PREFIX_OF_OPTIONS:
        settings |= settings.pop(group, {})
    dropped = {name: value for name, value in settings.items() if getattr(taken, name) != value}
    assert dropped == {}


@each_accelerate_config
def test_accelerate_config_explains_every_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in text
    for line in text.splitlines():
        assert len(line) <= 100
        assert not line or line.startswith("#") or re.fullmatch(r" *\w+:.* # \w.+", line), line


@each_accelerate_config
def test_accelerate_config_is_for_gpus_and_leaves_our_arguments_to_us(path: Path) -> None:
    settings = read_settings(path)
    assert settings["use_cpu"] is False
    assert settings["num_processes"] % settings["num_machines"] == 0
    assert "mixed_precision" not in settings
    assert "dynamo_config" not in settings
    ours = {"gradient_accumulation_steps", "gradient_clipping", "zero_stage"}
    assert not ours & settings.get("deepspeed_config", {}).keys()


@each_accelerate_config
def test_accelerate_config_of_several_machines_leaves_them_to_the_command_line(path: Path) -> None:
    settings = read_settings(path)
    assert (settings["num_machines"] > 1) == path.name.startswith("multi_node_")
    assert not {"machine_rank", "main_process_ip"} & settings.keys()
    if settings["num_machines"] > 1 and settings["distributed_type"] == "DEEPSPEED":
        assert settings["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


@each_accelerate_config
def test_fsdp_is_version_2_and_leaves_checkpointing_to_us(path: Path) -> None:
    settings = read_settings(path)
    assert (settings["distributed_type"] == "FSDP") == ("fsdp_config" in settings)
    if fsdp := settings.get("fsdp_config"):
        assert fsdp["fsdp_version"] == 2
        assert fsdp["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
        assert fsdp["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
        assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
        assert fsdp["fsdp_activation_checkpointing"] is False


@each_accelerate_config
def test_what_is_split_fits_the_number_of_processes(path: Path) -> None:
    settings = read_settings(path)
    sizes = settings.get("parallelism_config", {"none": settings["num_processes"]})
    product = math.prod(size for size in sizes.values() if isinstance(size, int))
    assert product == settings["num_processes"]


def test_every_deepspeed_config_is_used_and_every_name_exists() -> None:
    named = {
        read_settings(path).get("deepspeed_config", {}).get("deepspeed_config_file")
        for path in ACCELERATE_CONFIGS
    }
    there = {path.relative_to(ROOT).as_posix() for path in DEEPSPEED_CONFIGS}
    assert named - {None} == there


@each_deepspeed_config
def test_deepspeed_config_leaves_to_us_what_is_ours(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert {name for name, value in settings.items() if value == "auto"} == FILLED_IN
    assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler"} & settings.keys()


@each_deepspeed_config
def test_deepspeed_config_is_the_stage_of_its_name(path: Path) -> None:
    zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    stage, offload = re.fullmatch(r"zero([123])(_offload)?", path.stem).groups()
    assert zero["stage"] == int(stage)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == "3")
    for part in ("offload_optimizer", "offload_param"):
        assert zero.get(part, {}).get("device") == ("cpu" if offload else None)


@each_deepspeed_config
def test_deepspeed_config_has_no_unknown_key(path: Path) -> None:
    """DeepSpeed itself says nothing of a name that it does not know at the first level."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert settings.keys() - {"zero_optimization", "bf16", "fp16"} <= known
    zero = settings["zero_optimization"]
    names = {field.alias or name for name, field in zero_config.model_fields.items()}
    assert zero.keys() <= names
    zero_config(**{name: value for name, value in zero.items() if value != "auto"})


def test_the_guide_names_every_launch_file_and_every_deepspeed_key() -> None:
    guide = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    files = [*ACCELERATE_CONFIGS, *DEEPSPEED_CONFIGS, ROOT / "accelerate_configs" / "slurm.sh"]
    assert [path.name for path in files if f"`{path.name}`" not in guide] == []
    keys = set()
    for path in DEEPSPEED_CONFIGS:
        settings = json.loads(path.read_text(encoding="utf-8"))
        keys |= settings.keys() | settings["zero_optimization"].keys()
        keys |= settings["zero_optimization"].get("offload_param", {}).keys()
    assert [key for key in sorted(keys) if f"`{key}`" not in guide] == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact_pins(name: str) -> None:
    assert pinned_packages(ROOT / name)


def test_every_imported_package_is_pinned() -> None:
    packages_of = importlib.metadata.packages_distributions()
    pinned = {name.lower() for name in pinned_packages(ROOT / "requirements.txt")}
    missing = {}
    for path in source_files():
        for name in imported_packages(path) - OPTIONAL_PACKAGES:
            if not pinned & {package.lower() for package in packages_of.get(name, [name])}:
                missing[name] = path.name
    assert missing == {}


def test_the_table_in_the_readme_is_current() -> None:
    command = [sys.executable, "docs/make_argument_table.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    check = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_no_file_names_a_folder_of_one_machine() -> None:
    """Absolute paths of somebody's machine are of no use to anybody else."""
    places = "home", "Users", "root", "work", "workspace", "mnt", "opt", "scratch", "tmp"
    machine_path = re.compile(r"(?<![\w.}-])/(" + "|".join(places) + r")/\w")
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in shipped_files()
        for match in machine_path.finditer(path.read_text(encoding="utf-8", errors="ignore"))
    }
    assert found == set()
