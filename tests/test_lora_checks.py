"""Proves that what adapters cannot be combined with is refused, with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arguments import Arguments
from llm_training import lora_checks
from llm_training.launch_settings import LaunchSettings
from llm_training.lora_checks import lora_problems


def problems(launch: LaunchSettings | None = None, **settings: Any) -> list[str]:
    arguments = Arguments(**{"model_name_or_path": "base", **settings})
    return list(lora_problems(arguments, launch or LaunchSettings()))


def test_good_settings_have_no_problem() -> None:
    assert problems() == []
    assert problems(lora_rank=8, lora_alpha=16.0, use_dora=True, merge_adapter=True) == []
    assert problems(lora_rank=8, lora_target_modules=["q_proj", "v_proj"]) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_name_or_path": None, "model_type": "gpt2"}, ["model_type=gpt2", "weights that"]),
        ({"lora_target_modules": []}, ["lora_target_modules is empty"]),
        ({"lora_target_modules": ["all-linear", "q_proj"]}, ["all-linear holds the others"]),
        ({"optim": "muon"}, ["optim=muon", "use adamw"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision=fp8", "use bf16"]),
    ],
)
def test_what_adapters_exclude(settings: dict[str, Any], words: list[str]) -> None:
    (problem,) = problems(lora_rank=8, **settings)
    assert all(word in problem for word in words)


def test_tensor_parallelism_is_excluded() -> None:
    (problem,) = problems(LaunchSettings(tp_size=2), lora_rank=8)
    assert "tp_size=2 exclude each other" in problem and "fsdp.yaml" in problem


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout", "use_dora", "merge_adapter"])
def test_settings_without_a_rank_are_idle(name: str) -> None:
    (problem,) = problems(**{name: 0.5 if name.startswith("lora") else True})
    assert problem.startswith(f"{name}=") and "has no effect without lora_rank" in problem


@pytest.mark.parametrize("rank", [None, 8])
def test_an_adapter_is_no_model_to_begin_with(rank: int | None, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "someone/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (problem,) = problems(model_name_or_path=str(tmp_path), lora_rank=rank)
    assert "is an adapter for someone/model" in problem and "merge_adapter" in problem
    (tmp_path / "config.json").write_text("{}")
    assert problems(model_name_or_path=str(tmp_path), lora_rank=rank) == []


# ------------------------------------------------------------------------------- frozen matrices


@pytest.fixture
def has_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_checks, "is_installed", lambda package: package == "bitsandbytes")


def test_good_settings_of_frozen_matrices_have_no_problem(has_package: None) -> None:
    for precision in ("auto", "bf16"):
        changes = {"frozen_dtype": "bfloat16", "mixed_precision": precision}
        assert problems(lora_rank=8, **changes) == []
        assert problems(freeze_parameters=["*.h.*"], **changes) == []
        for backend in ("ddp", "fsdp", "deepspeed"):
            launch = LaunchSettings(backend, num_processes=2)
            assert problems(launch, lora_rank=8, merge_adapter=True, **changes) == []
    for precision in ("auto", "bf16", "fp32"):
        ddp = LaunchSettings("ddp", num_processes=2)
        assert problems(ddp, lora_rank=8, frozen_dtype="nf4", mixed_precision=precision) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"frozen_dtype": "bfloat16"},
            ["has no effect: every weight is trained", "give lora_rank or freeze_parameters"],
        ),
        (
            {"frozen_dtype": "bfloat16", "lora_rank": 8, "mixed_precision": "fp32"},
            ["mixed_precision=fp32", "use mixed_precision=bf16"],
        ),
        (
            {"frozen_dtype": "bfloat16", "lora_rank": 8, "mixed_precision": "fp16"},
            ["mixed_precision=fp16", "use mixed_precision=bf16"],
        ),
        ({"frozen_dtype": "nf4"}, ["frozen_dtype=nf4 needs lora_rank", "adapters can"]),
        (
            {"frozen_dtype": "nf4", "freeze_parameters": ["*.h.*"]},
            ["frozen_dtype=nf4 needs lora_rank"],
        ),
        (
            {"frozen_dtype": "nf4", "lora_rank": 8, "use_dora": True},
            ["use_dora=true exclude each other"],
        ),
        (
            {"frozen_dtype": "nf4", "lora_rank": 8, "merge_adapter": True},
            ["merge_adapter=true exclude each other", "frozen_dtype=float32"],
        ),
    ],
)
def test_what_frozen_matrices_exclude(
    settings: dict[str, Any], words: list[str], has_package: None
) -> None:
    (problem,) = problems(**settings)
    assert all(word in problem for word in words), problem


def test_launches_that_cut_matrices_are_excluded(has_package: None) -> None:
    for backend in ("fsdp", "deepspeed"):
        launch = LaunchSettings(backend, num_processes=2)
        (problem,) = problems(launch, lora_rank=8, frozen_dtype="nf4")
        assert f"the launcher's {backend} exclude each other" in problem and "ddp.yaml" in problem
    (problem,) = problems(
        LaunchSettings(tp_size=2), freeze_parameters=["*.h.*"], frozen_dtype="bfloat16"
    )
    assert "tp_size=2 exclude each other" in problem and "fsdp.yaml" in problem
    (problem, _) = problems(LaunchSettings(tp_size=2), lora_rank=8, frozen_dtype="nf4")
    assert "tp_size=2 exclude each other" in problem and "ddp.yaml" in problem


def test_a_missing_package_is_told_with_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_checks, "is_installed", lambda package: False)
    (problem,) = problems(lora_rank=8, frozen_dtype="nf4")
    assert "pip install bitsandbytes" in problem and "frozen_dtype=bfloat16" in problem
