"""Proves that the files that are shipped work as they are: configurations, pins, README."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from llm_training.argument_parsing import read_arguments

ROOT = Path(__file__).parents[1]
TRAIN_CONFIGS = sorted(ROOT.glob("train_configs/*.json"))
ACCELERATE_CONFIGS = sorted(ROOT.glob("accelerate_configs/*.yaml"))
each_train_config = pytest.mark.parametrize("path", TRAIN_CONFIGS, ids=lambda path: path.name)
each_accelerate_config = pytest.mark.parametrize(
    "path", ACCELERATE_CONFIGS, ids=lambda path: path.name
)

# In Accelerate's files, where fsdp_config.version means the option --fsdp_version.
PREFIX_OF_OPTIONS = {
    "deepspeed_config": "",
    "parallelism_config": "",
    "fsdp_config": "fsdp_",
    "dynamo_config": "dynamo_",
}

# Only used where somebody installed them.
OPTIONAL_PACKAGES = {"wandb"}


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
    ours = {"arguments", "train_llm", "llm_training", "benchmarks", "docs"}
    return {name.split(".")[0] for name in names} - ours - set(sys.stdlib_module_names)


@each_train_config
def test_train_config_parses(path: Path) -> None:
    read_arguments([str(path)])


@each_accelerate_config
def test_accelerate_config_has_no_unknown_key(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level only
    options = vars(launch_command_parser().parse_args(["train_llm.py"])).keys()
    for group, prefix in PREFIX_OF_OPTIONS.items():
        keys = getattr(config, group)
        named = {key if key.startswith(prefix) else prefix + key for key in keys}
        assert named <= options, f"{group}: Accelerate would drop {sorted(named - options)}"


@each_accelerate_config
def test_accelerate_config_leaves_precision_and_accumulation_to_us(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    assert "mixed_precision" not in settings
    assert "gradient_accumulation_steps" not in settings.get("deepspeed_config", {})


@each_accelerate_config
def test_accelerate_config_names_files_that_exist(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = settings.get("deepspeed_config", {}).get("deepspeed_config_file")
    assert named is None or (ROOT / named).is_file()


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
