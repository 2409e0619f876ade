"""Proves that choices for GPUs which contradict the device, the launch or each other are refused.

Each case is one mistake and must give exactly one problem, which says what to do; the sets of
arguments below them are none.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments
from llm_training import speed_checks
from llm_training.argument_checks import find_problems, masks_documents
from llm_training.argument_parsing import read_arguments
from llm_training.launch_settings import LaunchSettings
from llm_training.parent_processes import short_run_settings

GRAPHS: dict[str, Any] = {
    "device": "cuda",
    "torch_compile": True,
    "torch_compile_scope": "model",
    "torch_compile_mode": "reduce-overhead",
}
TWO = LaunchSettings(backend="ddp", num_processes=2)

# arguments, launch, what the problem says
MISTAKES: list[tuple[dict[str, Any], LaunchSettings, list[str]]] = [
    ({"tf32": True, "device": "cpu"}, LaunchSettings(), ["tf32=true", "device=cpu", "drop it"]),
    ({"tf32": True, "device": "mps"}, LaunchSettings(), ["tf32=true", "device=mps"]),
    ({"deterministic": False, "device": "cpu"}, LaunchSettings(), ["deterministic=false", "cpu"]),
    ({"torch_compile_scope": "model"}, LaunchSettings(), ["scope=model", "without torch_compile"]),
    ({"torch_compile_mode": "max-autotune"}, LaunchSettings(), ["mode=max-autotune", "without"]),
    ({"use_liger_kernel": True, "device": "cpu"}, LaunchSettings(), ["exclude", "drop the first"]),
    ({"use_liger_kernel": True}, LaunchSettings(), ["pip install liger-kernel"]),
    ({"mixed_precision": "fp8", "device": "cpu"}, LaunchSettings(), ["NVIDIA", "use bf16"]),
    ({"mixed_precision": "fp8"}, LaunchSettings(), ["pip install torchao", "bf16"]),
    (GRAPHS | {"device": "cpu"}, LaunchSettings(), ["reduce-overhead", "only GPUs", "drop it"]),
    (
        GRAPHS | {"torch_compile_scope": "blocks"},
        LaunchSettings(),
        ["write over each other", "torch_compile_scope=model", "torch_compile_mode=default"],
    ),
    (
        GRAPHS | {"gradient_accumulation_steps": 2, "torch_compile_mode": "max-autotune"},
        LaunchSettings(),
        ["a step has 2", "per_device_train_batch_size", "max-autotune-no-cudagraphs"],
    ),
    (
        {"torch_compile": True, "torch_compile_scope": "model"},
        TWO,
        ["2 processes", "torch_compile_scope=blocks"],
    ),
]
FINE: list[dict[str, Any]] = [
    {"tf32": True},
    {"tf32": False, "device": "cpu"},
    {"deterministic": False, "device": "cuda"},
    GRAPHS,
    GRAPHS | {"device": "cpu", "torch_compile_mode": "max-autotune"},
    GRAPHS | {"torch_compile_mode": "max-autotune-no-cudagraphs", "global_batch_size": 64},
    {"torch_compile": True, "gradient_accumulation_steps": 4},
]


def problems_of(changes: dict[str, Any], launch: LaunchSettings) -> list[str]:
    base = {"model_type": "llama", "tokenizer_name": "byte", "train_file": [__file__]}
    arguments = Arguments(**(base | {"report_to": ["none"]} | changes))
    return find_problems(arguments, launch)


@pytest.fixture(autouse=True)
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what is installed beside."""
    monkeypatch.setattr(speed_checks, "_is_installed", lambda package: False)


@pytest.mark.parametrize(("changes", "launch", "phrases"), MISTAKES)
def test_a_choice_without_effect_or_ground(
    changes: dict[str, Any], launch: LaunchSettings, phrases: list[str]
) -> None:
    (problem,) = problems_of(changes, launch)
    for phrase in phrases:
        assert phrase in problem


@pytest.mark.parametrize("changes", FINE)
def test_what_a_gpu_can_do_is_no_problem(changes: dict[str, Any]) -> None:
    assert problems_of(changes, LaunchSettings()) == []


@pytest.mark.parametrize(
    ("launch", "phrase"),
    [
        (LaunchSettings(backend="deepspeed"), "not made for DeepSpeed"),
        (LaunchSettings(num_processes=2, tp_size=2), "parallelism_config_tp_size=2"),
    ],
)
def test_fp8_needs_a_backend_that_can(
    launch: LaunchSettings, phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_checks, "_is_installed", lambda package: True)
    found = [text for text in problems_of({"mixed_precision": "fp8"}, launch) if "fp8" in text]
    assert len(found) == 1 and phrase in found[0]
    assert problems_of({"mixed_precision": "fp8"}, LaunchSettings()) == []


def test_packages_are_looked_up_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert speed_checks._is_installed("torch") is (importlib.util.find_spec("torch") is not None)
    assert not speed_checks._is_installed("no_such_package_at_all")


def test_documents_are_kept_apart_where_asked_or_in_conversations() -> None:
    assert not masks_documents(Arguments())
    assert masks_documents(Arguments(document_mask=True))
    assert masks_documents(Arguments(messages_column="messages"))
    assert not masks_documents(Arguments(messages_column="messages", document_mask=False))


def test_what_the_children_of_a_run_are_given_is_no_problem(tmp_path: Path) -> None:
    """They neither stop early nor keep a best checkpoint, whatever was asked for."""
    asked: dict[str, Any] = {
        "save_best": True,
        "early_stopping_patience": 2,
        "early_stopping_min_delta": 2.0,
        "early_stopping_min_delta_unit": "standard_errors",
    }
    assert problems_of(asked, LaunchSettings()) == []
    base = {"model_type": "llama", "tokenizer_name": "byte", "train_file": [__file__]}
    settings = short_run_settings(Arguments(**base | asked), tmp_path / "run", 4)
    (tmp_path / "child.json").write_text(json.dumps(settings))
    assert read_arguments([str(tmp_path / "child.json")], 1).early_stopping_patience is None


@pytest.mark.parametrize("uri", ["https://me:pw@host", "postgresql://host/runs?user=a&password=pw"])
def test_a_login_in_a_url_is_refused_and_not_repeated(uri: str) -> None:
    """Arguments are kept as they are in arguments.json, which trackers get."""
    found = find_problems(Arguments(tracking_uri=uri), LaunchSettings())
    (told,) = (problem for problem in found if problem.startswith("tracking_uri"))
    assert "holds a login" in told and "pw" not in told
