"""Launches as Accelerate's launchers really make them: what they export, which files they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_training.launch_settings import LaunchSettings, read_launch_settings

# What each launcher exports.
ALWAYS = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
DYNAMO = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}
SINGLE = {**ALWAYS, **DYNAMO, "ACCELERATE_USE_CPU": "False"}
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
DDP = {**ALWAYS, **DYNAMO, **RANK}
FSDP = {
    **DDP,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
DEEPSPEED = {**ALWAYS, **RANK, "ACCELERATE_USE_DEEPSPEED": "true"}
WITH_JSON = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}
PARALLEL = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
    "PARALLELISM_CONFIG_SP_SIZE": "1",
}

# The file given to each.
SINGLE_FILE = 'distributed_type: "NO"\nnum_processes: 1\n'
DDP_FILE = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
FSDP_FILE = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  fsdp_version: 2\n"
DEEPSPEED_FILE = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n"
ZERO_2 = DEEPSPEED_FILE + "  zero_stage: 2\n"
ZERO_3 = DEEPSPEED_FILE + "  zero_stage: 3\n"
NAMES_JSON = DEEPSPEED_FILE + "  deepspeed_config_file: zero.json\n"
STAGE_2 = {"zero_optimization": {"stage": 2}}
AUTO = {
    **STAGE_2,
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}


def command(options: str = "", file: str | None = "launch.yaml") -> list[str]:
    """How the launcher was called; what follows the script is the script's own."""
    named = ["--config_file", file] if file else []
    words = ["python", "/bin/accelerate", "launch", *named, *options.split()]
    return [*words, "train_llm.py", "run.json", "--mixed_precision", "fp32", "--num_processes", "9"]


def launched(
    environ: dict[str, str], yaml: str | None = None, options: str = "", zero: Any = None
) -> LaunchSettings:
    """What is read where the launcher's file is `yaml` and DeepSpeed's is `zero`."""
    if yaml is not None:
        Path("launch.yaml").write_text(yaml)
    if zero is not None:
        Path("zero.json").write_text(zero if isinstance(zero, str) else json.dumps(zero))
    environ = {"HF_HOME": str(Path("no_default_file").resolve()), **environ}
    return read_launch_settings(environ, command(options, "launch.yaml" if yaml else None))
