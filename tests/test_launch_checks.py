"""Proves that no contradiction between the arguments and the launch passes.

Every case of `CONTRADICTIONS` is one mistake in an otherwise good launch and must give exactly one
problem, which names both values and both places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from arguments import Arguments
from llm_training import launch_settings
from llm_training.argument_parsing import ArgumentProblems, read_arguments
from llm_training.launch_checks import launch_problems, precision_conflict
from llm_training.launch_settings import LaunchSettings
from tests.launches import (
    AUTO,
    DDP,
    DDP_FILE,
    DEEPSPEED,
    DEEPSPEED_FILE,
    FSDP,
    FSDP_FILE,
    NAMES_JSON,
    PARALLEL,
    RANK,
    SINGLE,
    STAGE_2,
    WITH_JSON,
    ZERO_2,
    ZERO_3,
    command,
    launched,
)

LONE = {**SINGLE, "ACCELERATE_USE_CPU": "True"}  # what `accelerate launch --cpu` exports
HALF = {"bf16": {"enabled": True}, **STAGE_2}
STAGE_3 = {"zero_optimization": {"stage": 3}}
GATHER = "stage3_gather_16bit_weights_on_model_save"


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and an environment that says nothing about launchers."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")) or name in RANK:
            monkeypatch.delenv(name)


def problems_of(launch: LaunchSettings, **arguments: Any) -> list[str]:
    return list(launch_problems(Arguments(**arguments), launch))


class Case(NamedTuple):
    """A launch, the arguments it is held against, and what the one problem must say."""

    launch: tuple[dict[str, str], str | None, str, Any]
    arguments: dict[str, Any]
    says: Sequence[str]


def case(
    environ: dict[str, str],
    yaml: str | None = None,
    *,
    options: str = "",
    zero: Any = None,
    says: Sequence[str] = (),
    **arguments: Any,
) -> Case:
    return Case((environ, yaml, options, zero), arguments, says)


def zero_case(zero: Any, says: Sequence[str] = (), **arguments: Any) -> Case:
    """DeepSpeed's file, named in the launcher's."""
    return case(WITH_JSON, NAMES_JSON, zero=zero, says=says, **arguments)


CONTRADICTIONS = {
    # processes
    "--cpu starts one": case(
        LONE,
        options="--cpu --num_processes 2",
        says=[
            "accelerate launch says --num_processes 2, but only 1 process",
            "ddp.yaml",
            "--device",
        ],
    ),
    "a file starts one": case(
        LONE,
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2",
        says=["launch.yaml says num_processes: 2, but only 1 process", "MULTI_GPU or FSDP"],
        global_batch_size=8,
    ),
    "--cpu takes the backend away": case(
        LONE,
        "distributed_type: FSDP\nnum_processes: 1",
        options="--cpu",
        says=["says --cpu", "launch.yaml says distributed_type: FSDP", "leave --cpu out"],
    ),
    "more than asked": case(
        {**DDP, "WORLD_SIZE": "4"},
        DDP_FILE,
        says=["launch.yaml says num_processes: 2", "WORLD_SIZE=4", "processes of all machines"],
    ),
    "more than asked, with sizes for what was asked": case(
        {**WITH_JSON, "WORLD_SIZE": "4"},
        NAMES_JSON,
        zero={**STAGE_2, "train_batch_size": 16},
        says=["launch.yaml says num_processes: 2", "WORLD_SIZE=4"],
    ),
    "not a multiple": case(
        {**PARALLEL, "WORLD_SIZE": "6", "PARALLELISM_CONFIG_CP_SIZE": "2"},
        FSDP_FILE,
        options="--num_processes 6",
        says=[
            "WORLD_SIZE=6 is not a multiple of parallelism_config_tp_size=2 x",
            "parallelism_config_cp_size=2 = 4 (launch.yaml): set num_processes to 4 or 8",
        ],
    ),
    "compiled rows that ranks share": case(
        {**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_CP_SIZE": "2"},
        FSDP_FILE,
        says=["torch_compile=true, but parallelism_config_cp_size=2", "torch_compile to false"],
        torch_compile=True,
    ),
    "fewer than a group": case(
        {**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "4"},
        FSDP_FILE,
        says=["WORLD_SIZE=2 is not a multiple of", "= 4", "set num_processes to 4"],
        gradient_accumulation_steps=4,
        global_batch_size=32,
    ),
    "split sequences": case(
        {**PARALLEL, "PARALLELISM_CONFIG_SP_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "1"},
        FSDP_FILE + "parallelism_config:\n  parallelism_config_sp_size: 2",
        says=["launch.yaml says parallelism_config_sp_size: 2", "leave it out of the YAML"],
    ),
    "no number": case(
        {**DDP, "WORLD_SIZE": "two"},
        DDP_FILE,
        says=["WORLD_SIZE=two in the environment", "no number of processes", "unset it"],
    ),
    "no number, with sizes": case(
        {**WITH_JSON, "WORLD_SIZE": "2x"},
        NAMES_JSON,
        zero={**STAGE_2, "train_batch_size": 16},
        says=["WORLD_SIZE=2x in the environment"],
    ),
    "no processes": case({"WORLD_SIZE": "0"}, says=["WORLD_SIZE=0", "unset it"]),
    "no number of groups": case(
        {**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "x"},
        FSDP_FILE,
        says=["PARALLELISM_CONFIG_TP_SIZE=x"],
    ),
    # the device
    "cuda on the CPU": case(
        DDP,
        DDP_FILE + "use_cpu: true",
        says=["device=cuda, but launch.yaml says use_cpu: true", "leave it out of the YAML"],
        device="cuda",
    ),
    "mps on the CPU": case(
        LONE,
        options="--cpu",
        says=["device=mps, but accelerate launch says --cpu", "leave the flag out"],
        device="mps",
    ),
    "the environment's CPU": case(
        {"ACCELERATE_USE_CPU": "1"},
        says=["device=cuda, but the environment says ACCELERATE_USE_CPU=1", "unset it"],
        device="cuda",
    ),
    # torch.compile
    "compiled by the file": case(
        {**DDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        DDP_FILE + "dynamo_config:\n  dynamo_backend: INDUCTOR",
        says=[
            "torch_compile=false, but launch.yaml says dynamo_backend: INDUCTOR",
            "out of the YAML",
        ],
    ),
    "compiled by the file, shorter": case(
        {**DDP, "ACCELERATE_DYNAMO_BACKEND": "EAGER"},
        DDP_FILE + "dynamo_config:\n  backend: eager",
        says=["torch_compile=true, but launch.yaml says backend: eager"],
        torch_compile=True,
    ),
    "compiled by an option": case(
        {**SINGLE, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        options="--dynamo-backend inductor",
        says=["accelerate launch says --dynamo_backend inductor", "leave the flag out"],
    ),
    # precision
    "bf16 in the file": case(
        {**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"},
        DDP_FILE + "mixed_precision: bf16",
        says=[
            "mixed_precision=fp32, but launch.yaml says mixed_precision: bf16",
            "out of the YAML",
        ],
        mixed_precision="fp32",
    ),
    "none in the file": case(
        DDP,
        DDP_FILE + 'mixed_precision: "no"',
        says=["mixed_precision=bf16, but launch.yaml says mixed_precision: no"],
        mixed_precision="bf16",
    ),
    "fp16 as an option": case(
        {**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"},
        DDP_FILE + "mixed_precision: bf16",
        options="--mixed-precision fp16",
        says=[
            "mixed_precision=bf16, but accelerate launch says --mixed_precision fp16",
            "the flag",
        ],
        mixed_precision="bf16",
    ),
    "fp16 in the environment": case(
        {**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"},
        says=["the environment says ACCELERATE_MIXED_PRECISION=fp16"],
        mixed_precision="bf16",
    ),
    "bf16 for DeepSpeed": zero_case(
        HALF,
        says=["mixed_precision=fp32, but zero.json says bf16.enabled: true", 'write "auto" there'],
        mixed_precision="fp32",
    ),
    "fp16 for DeepSpeed": zero_case(
        {"fp16": {"enabled": True}, **STAGE_2},
        says=["mixed_precision=bf16, but zero.json says fp16.enabled: true"],
        mixed_precision="bf16",
    ),
    "no bf16 for DeepSpeed": zero_case(
        {"bf16": {"enabled": False}, **STAGE_2},
        says=["mixed_precision=bf16, but zero.json says bf16.enabled: false"],
        mixed_precision="bf16",
    ),
    "both for DeepSpeed": zero_case(
        {**HALF, "fp16": {"enabled": True}},
        says=[
            "zero.json says bf16.enabled: true and zero.json says fp16.enabled: true",
            "keep one",
        ],
        mixed_precision="bf16",
    ),
    # numbers
    "accumulation in the file": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        ZERO_2 + "  gradient_accumulation_steps: 4",
        says=[
            "gradient_accumulation_steps=2, but launch.yaml says gradient_accumulation_steps: 4",
            "keep one; leave it out of the YAML",
        ],
        gradient_accumulation_steps=2,
    ),
    "accumulation as an option": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        ZERO_2,
        options="--gradient_accumulation_steps 4",
        says=["accelerate launch says --gradient_accumulation_steps 4", "leave the flag out"],
        gradient_accumulation_steps=2,
    ),
    "accumulation in the environment": case(
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        says=["the environment says ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "unset it"],
        gradient_accumulation_steps=2,
    ),
    "derived accumulation": zero_case(
        {**STAGE_2, "gradient_accumulation_steps": 8},
        says=[
            "gradient_accumulation_steps=4 (derived from per_device_train_batch_size=2 and",
            "global_batch_size=16)",
            "zero.json says gradient_accumulation_steps: 8",
            'write "auto" there',
        ],
        per_device_train_batch_size=2,
        global_batch_size=16,
    ),
    "rows of a process": zero_case(
        {**STAGE_2, "train_micro_batch_size_per_gpu": 4},
        says=["per_device_train_batch_size=8", "zero.json says train_micro_batch_size_per_gpu: 4"],
        per_device_train_batch_size=8,
    ),
    "rows of all": zero_case(
        {**STAGE_2, "train_batch_size": 8},
        says=["global_batch_size=16", "zero.json says train_batch_size: 8"],
        global_batch_size=16,
    ),
    "clipping in the file": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        ZERO_2 + "  gradient_clipping: 0.5",
        says=["max_grad_norm=1.0, but launch.yaml says gradient_clipping: 0.5", "out of the YAML"],
    ),
    "clipping for DeepSpeed": zero_case(
        {**STAGE_2, "gradient_clipping": 1.0},
        says=["max_grad_norm=null, but zero.json says gradient_clipping: 1.0"],
        max_grad_norm=None,
    ),
    "no clipping for DeepSpeed": zero_case(
        {**STAGE_2, "gradient_clipping": 0},
        says=["max_grad_norm=1.0, but zero.json says gradient_clipping: 0"],
    ),
    "clipping that is none": zero_case(
        {**STAGE_2, "gradient_clipping": True},
        says=["max_grad_norm=1.0, but zero.json says gradient_clipping: true"],
    ),
    "clipping in words": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "none"},
        says=["max_grad_norm=1.0, but the environment says ACCELERATE_GRADIENT_CLIPPING=none"],
    ),
    # FSDP
    "FSDP 1": case(
        {**FSDP, "FSDP_VERSION": "1"},
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  version: 1\n",
        says=["launch.yaml says version: 1", "needs version 2", "fsdp_version: 2"],
    ),
    "FSDP 1 unsaid": case(
        {**RANK, "ACCELERATE_USE_FSDP": "true"},
        says=["the environment says no fsdp_version, which means 1", "needs version 2"],
    ),
    "FSDP's checkpointing": case(
        {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        FSDP_FILE + "  fsdp_activation_checkpointing: true",
        says=[
            "gradient_checkpointing=false, but launch.yaml",
            "says fsdp_activation_checkpointing: true",
            "use gradient_checkpointing",
        ],
    ),
    "FSDP's files": case(
        {**FSDP, "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"},
        FSDP_FILE + "  state_dict_type: LOCAL_STATE_DICT",
        says=["launch.yaml says state_dict_type: LOCAL_STATE_DICT", "use SHARDED_STATE_DICT"],
    ),
    # optimizers
    "no matrices for Muon": case(
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        ZERO_2,
        says=["optim=muon does not work under DeepSpeed", "no matrix is left", "fsdp.yaml"],
        optim="muon",
    ),
    "8 bits in DeepSpeed's parts": case(
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        ZERO_2,
        says=["optim=adamw_8bit is for whole parameters, and DeepSpeed splits", "ddp.yaml"],
        optim="adamw_8bit",
    ),
    "8 bits in FSDP's parts": case(
        FSDP, FSDP_FILE, says=["and FSDP2 splits them", "optim=adamw"], optim="adamw_8bit"
    ),
    "8 bits in parts of matrices": case(
        PARALLEL,
        FSDP_FILE,
        says=["and tensor parallelism splits them", "optim=adamw"],
        optim="adamw_8bit",
    ),
    # DeepSpeed's file
    "no JSON": case(
        {**WITH_JSON, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none.json"},
        DEEPSPEED_FILE + "  deepspeed_config_file: none.json",
        says=[
            "launch.yaml says deepspeed_config_file: none.json, but No such file",
            "correct the path",
        ],
    ),
    "a folder for JSON": case(
        {**WITH_JSON, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "."},
        says=["the environment says ACCELERATE_DEEPSPEED_CONFIG_FILE=., but Is a directory"],
    ),
    "broken JSON": zero_case(
        '{\n "zero_optimization": {}\n "bf16": {}\n}',
        says=["deepspeed_config_file: zero.json", "not valid JSON", "line 3 column 2"],
    ),
    "JSON without names": zero_case("[3]", says=["zero.json", "it holds [3]"]),
    "JSON without ZeRO": zero_case({}, says=["zero.json has no zero_optimization", '"stage": 2']),
    "an optimizer": zero_case(
        {**STAGE_2, "optimizer": {"type": "AdamW"}},
        says=["learning_rate=0.25, but zero.json has a section optimizer", "remove optimizer"],
        learning_rate=0.25,
    ),
    "a scheduler": zero_case(
        {**STAGE_2, "scheduler": {"type": "WarmupLR"}},
        says=[
            "lr_scheduler_type=cosine, but zero.json has a section scheduler",
            "remove scheduler",
        ],
    ),
    "stage 3 for DeepSpeed": zero_case(
        STAGE_3,
        says=[f"zero.json says zero_optimization.stage: 3, but zero_optimization.{GATHER}", "true"],
    ),
    "stage 3 by way of auto": case(
        {**WITH_JSON, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        NAMES_JSON,
        zero={"zero_optimization": {"stage": "auto"}},
        says=["the environment says ACCELERATE_DEEPSPEED_ZERO_STAGE=3", GATHER],
    ),
    "stage 3 in the file": case(
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        ZERO_3 + "  zero3_save_16bit_model: false",
        says=["launch.yaml says zero_stage: 3, but zero3_save_16bit_model is not true", "exported"],
    ),
    # the launcher's file
    "no YAML": case(DDP, options="--config_file gone.yaml", says=["gone.yaml, but No such file"]),
    "broken YAML": case(
        DDP,
        "distributed_type: MULTI_GPU\nuse_cpu: true: false",
        says=["accelerate launch reads launch.yaml, but it is not valid YAML", "line 2, column 14"],
    ),
    "YAML without names": case(DDP, "- 1", says=["launch.yaml, but it holds [1]"]),
}


def test_saving_from_memory_is_refused_where_it_cannot_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert problems_of(launched(DDP, DDP_FILE), async_save=True) == []
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    (problem,) = problems_of(launched(DDP, DDP_FILE), async_save=True)
    assert "async_save=true works on one machine, and this run is on several" in problem
    assert problems_of(launched(DDP, DDP_FILE)) == []
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    (problem,) = problems_of(launched(DDP, DDP_FILE), async_save=True)
    assert "needs the memory folder /dev/shm of Linux" in problem


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_one_contradiction(name: str) -> None:
    launch, arguments, says = CONTRADICTIONS[name]
    problems = problems_of(launched(*launch), **arguments)
    assert len(problems) == 1, problems
    assert [phrase for phrase in says if phrase not in problems[0]] == [], problems[0]
    assert "\n" not in problems[0]


# The same launches where nothing is contradicted.
AGREEMENTS = {
    "the same precision": case(
        {**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"},
        DDP_FILE + "mixed_precision: bf16",
        mixed_precision="bf16",
    ),
    "fp32 is Accelerate's no": case(
        DDP, DDP_FILE + 'mixed_precision: "no"', mixed_precision="fp32"
    ),
    "nobody said no": case(DDP, DDP_FILE, mixed_precision="bf16"),
    "auto is judged later": case(
        {**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"},
        DDP_FILE + "mixed_precision: fp16",
        mixed_precision="auto",
    ),
    "the same numbers": zero_case(
        {
            **HALF,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 3,
            "train_batch_size": 24,
            "gradient_clipping": 0,
        },
        per_device_train_batch_size=4,
        global_batch_size=24,
        max_grad_norm=None,
        mixed_precision="bf16",
    ),
    "the same accumulation": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
        ZERO_2 + "  gradient_accumulation_steps: 2",
        gradient_accumulation_steps=2,
    ),
    "accumulation is auto": case(
        {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        ZERO_2 + "  gradient_accumulation_steps: auto",
        gradient_accumulation_steps=2,
    ),
    "sections of other backends": case(
        DDP,
        DDP_FILE
        + "deepspeed_config: {gradient_clipping: 9, zero_stage: 3}\nfsdp_config: {version: 1}",
    ),
    "sections that are empty": case(DEEPSPEED, DEEPSPEED_FILE + "dynamo_config:\nmixed_precision:"),
    "stage 3 that is gathered": zero_case({"zero_optimization": {"stage": 3, GATHER: True}}),
    "stage 3 in the file, gathered": case(
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        ZERO_3 + "  zero3_save_16bit_model: true",
    ),
    "a stage that is auto": case(
        {
            **WITH_JSON,
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        },
        NAMES_JSON,
        zero={"zero_optimization": {"stage": "auto", GATHER: "auto"}},
    ),
    "precision that is auto": zero_case(AUTO, mixed_precision="bf16"),
    "null is nothing": zero_case({**STAGE_2, "gradient_clipping": None}),
    "DeepSpeed's settings without DeepSpeed": case(
        {**DDP, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "gone.json"},
        DDP_FILE,
        options="--zero_stage 3",
    ),
    "Muon on parts of matrices": case(PARALLEL, FSDP_FILE, optim="muon"),
    "8 bits on whole parameters": case(DDP, DDP_FILE, optim="adamw_8bit"),
    "no checkpointing by FSDP": case(FSDP, FSDP_FILE + "  fsdp_activation_checkpointing: false"),
    "the CPU, agreed": case(DDP, DDP_FILE + "use_cpu: true", device="cpu"),
    "the processes of all machines": case(
        {**DDP, "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
        "distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 4",
    ),
    "batch sizes that are wrong themselves": zero_case(
        {**STAGE_2, "gradient_accumulation_steps": 7, "train_batch_size": 7},
        global_batch_size=0,
        gradient_accumulation_steps=4,
    ),
}


@pytest.mark.parametrize("name", AGREEMENTS)
def test_no_contradiction(name: str) -> None:
    launch, arguments, _ = AGREEMENTS[name]
    assert problems_of(launched(*launch), **arguments) == []


def test_precision_is_compared_once_the_hardware_is_known() -> None:
    launch = launched(DDP, DDP_FILE + "mixed_precision: fp8")
    for precision in ("bf16", "fp16", "fp32"):
        conflict = precision_conflict(precision, launch)
        assert conflict is not None
        assert f"mixed_precision={precision}, but launch.yaml says mixed_precision: fp8" in conflict
    assert precision_conflict("bf16", launched(WITH_JSON, NAMES_JSON, "", HALF)) is None
    assert precision_conflict("fp32", launched(WITH_JSON, NAMES_JSON, "", HALF)) is not None
    assert precision_conflict("fp32", LaunchSettings()) is None


# -------------------------------------------------------------------------- beside other mistakes

GOOD = ["--model_type=gpt2", "--tokenizer_name=byte", "--train_file=.", "--report_to=none"]


def test_contradictions_stand_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("launch.yaml").write_text(DDP_FILE + "mixed_precision: bf16\nuse_cpu: true")
    Path("run.json").write_text('{"mixed_precision": "fp32"}')
    monkeypatch.setattr(launch_settings, "_parent_command", command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentProblems) as caught:
        read_arguments(["run.json", *GOOD, "--device=cuda", "--max_steps=0"])
    max_steps, device, precision = caught.value.problems
    assert max_steps.startswith("max_steps=0")
    assert device.endswith("leave it out of the YAML (device: command line)")
    assert precision.endswith("leave it out of the YAML (mixed_precision: run.json line 1)")
    # Given the number of processes, the launch is not asked.
    assert read_arguments(["run.json", *GOOD, "--device=cuda"], 3).global_batch_size == 24


def test_no_contradiction_follows_from_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's accumulation may well be the one that a bad global_batch_size meant."""
    Path("zero.json").write_text(json.dumps({**STAGE_2, "gradient_accumulation_steps": 4}))
    for name, value in WITH_JSON.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentProblems) as caught:
        read_arguments([*GOOD, "--global_batch_size=many"])
    (problem,) = caught.value.problems
    assert problem.startswith("global_batch_size (command line)")


def test_groups_of_processes_share_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PARALLEL, "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_arguments(GOOD).global_batch_size == 16
    assert read_arguments([*GOOD, "--global_batch_size=2"]).per_device_train_batch_size == 1
