"""What started this process: which backend, how many processes, from which files.

`accelerate launch` tells its script most of its settings through the environment, which is the
truth for what takes effect. Its command line and its YAML file tell the rest: how many processes
were asked for, and which values somebody really wrote down. Nothing slow is imported here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Accelerate's settings that are looked at: their section in its file, and the variable exported.
SETTINGS = {
    "num_processes": ("", ""),
    "distributed_type": ("", ""),
    "use_cpu": ("", "ACCELERATE_USE_CPU"),
    "mixed_precision": ("", "ACCELERATE_MIXED_PRECISION"),
    "dynamo_backend": ("dynamo_config", "ACCELERATE_DYNAMO_BACKEND"),
    "parallelism_config_sp_size": ("parallelism_config", "PARALLELISM_CONFIG_SP_SIZE"),
    "fsdp_version": ("fsdp_config", "FSDP_VERSION"),
    "fsdp_activation_checkpointing": ("fsdp_config", "FSDP_ACTIVATION_CHECKPOINTING"),
    "fsdp_state_dict_type": ("fsdp_config", "FSDP_STATE_DICT_TYPE"),
    "deepspeed_config_file": ("deepspeed_config", "ACCELERATE_DEEPSPEED_CONFIG_FILE"),
    "gradient_accumulation_steps": ("deepspeed_config", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    "gradient_clipping": ("deepspeed_config", "ACCELERATE_GRADIENT_CLIPPING"),
    "zero_stage": ("deepspeed_config", "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
    "zero3_save_16bit_model": ("deepspeed_config", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"),
}

# The launcher's options that take no value; behind any other stands one.
SWITCHES = (
    "help h quiet q cpu multi_gpu tpu enable_cpu_affinity dynamo_use_fullgraph dynamo_use_dynamic"
    " dynamo_use_regional_compilation use_deepspeed use_fsdp use_parallelism_config"
    " use_megatron_lm same_network module m no_python tpu_cluster no_tpu_cluster tpu_use_sudo"
    " downcast_bf16 fp8_use_autocast_during_eval debug"
)


class Given(NamedTuple):
    """A setting that somebody wrote down outside our arguments, and how a message speaks of it."""

    value: Any
    says: str  # accelerate_configs/ddp.yaml says mixed_precision: bf16
    remedy: str  # leave it out of the YAML


@dataclass(frozen=True)
class LaunchSettings:
    """How this process was started; without arguments: plain `python`, one process."""

    backend: str = "single"  # single, ddp (several processes), fsdp or deepspeed
    num_processes: int = 1  # on all machines
    tp_size: int = 1
    cp_size: int = 1
    use_cpu: bool = False
    config_file: str | None = None  # the launcher's YAML, as it was named
    asked_processes: int | None = None  # what the launcher was asked for; None: unknown
    given: Mapping[str, Given] = field(default_factory=dict)  # by their names in SETTINGS
    deepspeed_file: str | None = None
    deepspeed_config: Mapping[str, Any] | None = None  # what that file holds
    unreadable: tuple[str, ...] = ()  # a sentence for everything that could not be read

    @property
    def data_parallel_size(self) -> int:
        """Groups of processes that train on different rows."""
        return max(1, self.num_processes // (self.tp_size * self.cp_size))

    def in_deepspeed_file(self, name: str) -> Given | None:
        """What DeepSpeed's file says under a name such as `bf16.enabled`; None: nothing."""
        *sections, key = name.split(".")
        config: Any = self.deepspeed_config or {}
        for section in sections:
            config = _section(config, section)
        if config.get(key) is None:
            return None
        says = f"{self.deepspeed_file} says {name}: {shown_value(config[key])}"
        return Given(config[key], says, 'write "auto" there')


def read_launch_settings(
    environ: Mapping[str, str] = os.environ, command: Sequence[str] | None = None
) -> LaunchSettings:
    """How this process was started.

    Args:
        command: the words of the command that started it; None: the parent process is asked.
    """
    problems: list[str] = []
    num_processes = _count("WORLD_SIZE", environ, problems)
    tp_size = cp_size = 1
    if environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        tp_size = _count("PARALLELISM_CONFIG_TP_SIZE", environ, problems)
        cp_size = _count("PARALLELISM_CONFIG_CP_SIZE", environ, problems)
    is_counted = not problems
    backend = "ddp" if num_processes > 1 else "single"
    for name in ("fsdp", "deepspeed"):
        if environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            backend = name

    words = _launcher_words(_parent_command() if command is None else command)
    flags = _flags(words or ())
    config_file = flags.get("config_file")
    if config_file is None and words is not None and "cpu" not in flags:
        default = _default_file(environ)
        config_file = default if os.path.isfile(default) else None
    says = f"accelerate launch reads {config_file}"
    file = (_read(config_file, "YAML", says, problems) if config_file else None) or {}
    for other in {"fsdp", "deepspeed"} - {backend}:
        file.pop(f"{other}_config", None)  # it has no effect
    given = {}
    for name in SETTINGS:
        if found := _find(name, flags, config_file, file, environ):
            given[name] = found
    asked = as_number(given["num_processes"].value) if "num_processes" in given else None

    deepspeed_file, deepspeed_config = None, None
    named = given.get("deepspeed_config_file")
    if backend == "deepspeed" and named and named.value != "none":
        deepspeed_file = str(named.value)
        deepspeed_config = _read(deepspeed_file, "JSON", named.says, problems)
    return LaunchSettings(
        backend=backend,
        num_processes=num_processes,
        tp_size=tp_size,
        cp_size=cp_size,
        use_cpu="use_cpu" in given,
        config_file=config_file,
        asked_processes=int(asked) if is_counted and asked and asked > 0 else None,
        given=given,
        deepspeed_file=deepspeed_file,
        deepspeed_config=deepspeed_config,
        unreadable=tuple(problems),
    )


def _parent_command() -> list[str]:
    """The command line of the process that started this one; empty where the system hides it."""
    parent = os.getppid()
    path = Path(f"/proc/{parent}/cmdline")
    try:
        if path.exists():
            return path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        import subprocess  # only where there is no /proc

        ask = ["ps", "-ww", "-o", "args=", "-p", str(parent)]
        return subprocess.run(ask, capture_output=True, text=True).stdout.split()
    except OSError:
        return []


def _launcher_words(command: Sequence[str]) -> Sequence[str] | None:
    """The words behind `accelerate launch`; None where something else started this process."""
    for index, word in enumerate(command):
        name = word.replace("\\", "/").rpartition("/")[2].removesuffix(".exe")
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[index + 1 :]
        if name == "accelerate" and list(command[index + 1 : index + 2]) == ["launch"]:
            return command[index + 2 :]
    return None


def _flags(words: Sequence[str]) -> dict[str, str]:
    """The launcher's own options, which end where the script is named."""
    flags = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            break
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        flags[name] = value if equals else "true" if name in SWITCHES.split() else next(rest, "")
    return flags


def _default_file(environ: Mapping[str, str]) -> str:
    """The file of `accelerate config`, which is used where none is named."""
    cache = os.path.join(environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folder = os.path.expanduser(environ.get("HF_HOME", cache))
    return os.path.join(folder, "accelerate", "default_config.yaml")


def _read(path: str, kind: str, says: str, problems: list[str]) -> dict[str, Any] | None:
    """The settings in a YAML or JSON file; where there are none, a problem tells why."""
    try:
        text = Path(path).read_text("utf-8")
        values = json.loads(text) if kind == "JSON" else _parse_yaml(text)
        if isinstance(values, dict):
            return values
        reason = f"it holds {shown_value(values)[:80]}, not names with values"
    except OSError as error:
        reason = f"{error.strerror}; correct the path"
    except (ValueError, RecursionError) as error:
        reason = f"it is not valid {kind}: {error}"
    problems.append(f"{says}, but {reason}")
    return None


def _parse_yaml(text: str) -> Any:
    import yaml  # only for a launcher's file, and only now

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None  # on one line


def _count(name: str, environ: Mapping[str, str], problems: list[str]) -> int:
    text = environ.get(name) or "1"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    advice = "unset it, or start with accelerate launch"
    problems.append(f"{name}={text} in the environment is no number of processes: {advice}")
    return 1


def _find(
    name: str,
    flags: Mapping[str, str],
    config_file: str | None,
    file: Mapping[str, Any],
    environ: Mapping[str, str],
) -> Given | None:
    """Who gave the setting; a flag goes before the file, as in Accelerate."""
    section, variable = SETTINGS[name]
    flag = "cpu" if name == "use_cpu" else name
    if flag in flags:
        words = f"--{flag}" if flag in SWITCHES.split() else f"--{flag} {flags[flag]}"
        return Given(flags[flag], f"accelerate launch says {words}", "leave the flag out")
    values = _section(file, section) if section else file
    short = name.removeprefix(section.removesuffix("config"))
    for key in (name, short):  # Accelerate takes fsdp_config.version for fsdp_version
        value = values.get(key)
        # use_cpu: false forbids nothing, so another place may still say true.
        if value is not None and (name != "use_cpu" or is_true(value)):
            says = f"{config_file} says {key}: {shown_value(value)}"
            return Given(value, says, "leave it out of the YAML")
    value = environ.get(variable, "")
    # The launcher exports "no" and "False" also where nobody said so.
    speaks = is_true(value) if name == "use_cpu" else value.lower() not in ("", "no", "false")
    return Given(value, f"the environment says {variable}={value}", "unset it") if speaks else None


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def is_true(value: Any) -> bool:
    return str(value).lower() in ("y", "yes", "t", "true", "on", "1")


def shown_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
