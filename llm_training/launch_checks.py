"""Where what started this process contradicts itself or our arguments.

Nothing slow is imported here, so a contradiction is reported together with the mistakes in the
arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from arguments import Arguments, batch_problems, resolve_batch_sizes
from llm_training.launch_settings import Given, LaunchSettings, as_number, is_true, shown_value

# A number of the launcher or of DeepSpeed's file, and the argument that says the same.
SAME_AS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "train_batch_size": "global_batch_size",
}


def launch_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    """Where the launch contradicts itself or the arguments, a sentence each."""
    yield from launch.unreadable
    process_problems = list(_process_problems(launch))
    yield from process_problems
    yield from _device_problems(arguments, launch)
    yield from _optimizer_problems(arguments, launch)
    yield from _saving_problems(arguments)
    yield from _precision_problems(arguments, launch)
    # Sizes derived for the wrong number of processes would contradict everything.
    is_counted = not (launch.unreadable or process_problems)
    yield from _number_problems(arguments, launch, with_sizes=is_counted)
    yield from _fsdp_problems(arguments, launch)
    yield from _deepspeed_problems(arguments, launch)


def _process_problems(launch: LaunchSettings) -> Iterator[str]:
    started = launch.num_processes
    cpu, kind = launch.given.get("use_cpu"), launch.given.get("distributed_type")
    if cpu and cpu.says.endswith("--cpu") and kind and kind.value not in ("NO", False):
        advice = "leave --cpu out, and give train_llm.py --device cpu"
        yield f"{cpu.says}, which starts 1 plain process, but {kind.says}: {advice}"
    elif launch.asked_processes not in (None, started):
        happened = f"the environment says WORLD_SIZE={started}"
        advice = "use one launcher only, and count the processes of all machines"
        if started == 1:
            happened = "only 1 process was started"
            advice = (
                "name a file whose distributed_type is MULTI_GPU or FSDP, such as"
                " accelerate_configs/ddp.yaml, and for the CPU give train_llm.py --device cpu"
            )
        yield f"{launch.given['num_processes'].says}, but {happened}: {advice}"
    tp, cp = launch.tp_size, launch.cp_size
    if started % (tp * cp):
        below = started - started % (tp * cp)
        nearest = f"{below} or {below + tp * cp}" if below else tp * cp
        product = f"parallelism_config_tp_size={tp} x parallelism_config_cp_size={cp} = {tp * cp}"
        place = launch.config_file or "the environment"
        advice = f"set num_processes to {nearest}"
        yield f"WORLD_SIZE={started} is not a multiple of {product} ({place}): {advice}"
    sequence = launch.given.get("parallelism_config_sp_size")
    if sequence and as_number(sequence.value) != 1:
        yield f"{sequence.says}, but train_llm.py cannot split sequences so: {sequence.remedy}"


def _device_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    cpu = launch.given.get("use_cpu")
    if cpu and arguments.device in ("cuda", "mps"):
        yield f"device={arguments.device}, but {cpu.says}: keep one; {cpu.remedy}"
    dynamo = launch.given.get("dynamo_backend")
    if dynamo and str(dynamo.value).lower() not in ("no", "false"):
        ours = f"torch_compile={shown_value(arguments.torch_compile)}"
        yield f"{ours}, but {dynamo.says}: torch_compile decides; {dynamo.remedy}"
    if arguments.torch_compile and launch.cp_size > 1:
        # Causal attention takes other turns on each rank; compiled, so would the exchanges in it.
        yield (
            f"torch_compile=true, but parallelism_config_cp_size={launch.cp_size} splits rows over"
            " ranks, which would then wait for each other forever: set torch_compile to false, or"
            " cp_size to 1"
        )


def _optimizer_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    optim, backend = arguments.optim, launch.backend
    if optim == "muon" and backend == "deepspeed":
        yield (
            "optim=muon does not work under DeepSpeed, which lays all parameters end to end, so"
            " that no matrix is left for it: use accelerate_configs/ddp.yaml or fsdp.yaml, or"
            " optim=adamw"
        )
    split = {"deepspeed": "DeepSpeed", "fsdp": "FSDP2"}.get(backend)
    split = "tensor parallelism" if launch.tp_size > 1 else split
    if optim == "adamw_8bit" and split:
        yield (
            f"optim=adamw_8bit is for whole parameters, and {split} splits them: use"
            " accelerate_configs/ddp.yaml, or optim=adamw"
        )


def _saving_problems(arguments: Arguments) -> Iterator[str]:
    if not arguments.async_save:
        return
    if not os.path.isdir("/dev/shm"):
        yield "async_save=true needs the memory folder /dev/shm of Linux: leave it out here"
    elif os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        yield "async_save=true works on one machine, and this run is on several: leave it out"


def _precision_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    half = [launch.in_deepspeed_file(f"{name}.enabled") for name in ("bf16", "fp16")]
    enabled = [given.says for given in half if given and is_true(given.value)]
    if len(enabled) == 2:
        yield f'{" and ".join(enabled)}: keep one, or write "auto" for both'
    elif arguments.mixed_precision != "auto":
        conflict = precision_conflict(arguments.mixed_precision, launch)
        if conflict:
            yield conflict


def precision_conflict(precision: str, launch: LaunchSettings) -> str | None:
    """A sentence where the launcher's files name another precision than this bf16, fp16 or fp32."""
    ours = f"mixed_precision={precision}"
    given = launch.given.get("mixed_precision")
    if given:
        theirs = str(given.value).lower()
        if {"no": "fp32", "false": "fp32"}.get(theirs, theirs) != precision:
            return f"{ours}, but {given.says}: keep one; {given.remedy}"
    for name in ("bf16", "fp16"):
        given = launch.in_deepspeed_file(f"{name}.enabled")
        if given and given.value != "auto" and is_true(given.value) != (name == precision):
            return f"{ours}, but {given.says}: keep one; {given.remedy}"
    return None


def _number_problems(
    arguments: Arguments, launch: LaunchSettings, *, with_sizes: bool
) -> Iterator[str]:
    limit = arguments.max_grad_norm
    ours: dict[str, float] = {"max_grad_norm": limit or 0.0}
    said = {"max_grad_norm": f"max_grad_norm={shown_value(limit)}"}
    if with_sizes and (sizes := _batch_sizes(arguments, launch)):
        ours |= sizes
        for name in sizes:
            said[name] = f"{name}={sizes[name]}"
            if getattr(arguments, name) is None:
                others = [other for other in sizes if other != name]
                inputs = [f"{other}={shown_value(getattr(arguments, other))}" for other in others]
                said[name] += f" (derived from {' and '.join(inputs)})"
    for theirs, name in SAME_AS.items():
        for given in (launch.given.get(theirs), launch.in_deepspeed_file(theirs)):
            if given is None or given.value == "auto" or name not in ours:
                continue
            if as_number(given.value) != ours[name]:
                yield f"{said[name]}, but {given.says}: keep one; {given.remedy}"


def _batch_sizes(arguments: Arguments, launch: LaunchSettings) -> dict[str, int] | None:
    """The batch sizes of this run; None where those given are wrong, which is told elsewhere."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
    given = [getattr(arguments, name) for name in names]
    if any(size is not None and size < 1 for size in given):
        return None
    if any(batch_problems(arguments, launch.data_parallel_size)):
        return None
    sizes = resolve_batch_sizes(arguments, launch.data_parallel_size)
    return dict(zip(names, (sizes.per_device, sizes.accumulation, sizes.global_batch), strict=True))


def _fsdp_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    if launch.backend != "fsdp":
        return
    version = launch.given.get("fsdp_version")
    if version is None or str(version.value) != "2":
        place = launch.config_file or "the environment"
        says = version.says if version else f"{place} says no fsdp_version, which means 1"
        yield f"{says}, but train_llm.py needs version 2: set fsdp_version: 2 in fsdp_config"
    checkpointing = launch.given.get("fsdp_activation_checkpointing")
    if checkpointing and is_true(checkpointing.value):
        ours = f"gradient_checkpointing={shown_value(arguments.gradient_checkpointing)}"
        advice = "it draws new random numbers the second time; use gradient_checkpointing instead"
        yield f"{ours}, but {checkpointing.says}: {advice}"
    kind = launch.given.get("fsdp_state_dict_type")
    if kind and str(kind.value).upper() == "LOCAL_STATE_DICT":
        advice = "FSDP2 has no such checkpoints; use SHARDED_STATE_DICT"
        yield f"{kind.says}, but train_llm.py needs fsdp_version 2: {advice}"


def _deepspeed_problems(arguments: Arguments, launch: LaunchSettings) -> Iterator[str]:
    path, config = launch.deepspeed_file, launch.deepspeed_config
    if launch.backend != "deepspeed":
        return
    if config is not None and not isinstance(config.get("zero_optimization"), dict):
        advice = 'Accelerate needs it; add "zero_optimization": {"stage": 2}'
        yield f"DeepSpeed's file {path} has no zero_optimization: {advice}"
    owners = {
        "optimizer": f"learning_rate={arguments.learning_rate}",
        "scheduler": f"lr_scheduler_type={arguments.lr_scheduler_type}",
    }
    for section, ours in owners.items():
        if section in (config or {}):
            advice = f"our arguments decide; remove {section}"
            yield f"{ours}, but {path} has a section {section}: {advice}"
    stage = _zero_setting(launch, "zero_stage", "stage")
    key = "stage3_gather_16bit_weights_on_model_save"
    gather = _zero_setting(launch, "zero3_save_16bit_model", key)
    if stage and as_number(stage.value) == 3 and not (gather and is_true(gather.value)):
        name = f"zero_optimization.{key}" if path else "zero3_save_16bit_model"
        advice = "set it to true, without it the trained model cannot be exported"
        yield f"{stage.says}, but {name} is not true: {advice}"


def _zero_setting(launch: LaunchSettings, name: str, key: str) -> Given | None:
    """A setting of ZeRO: DeepSpeed's file goes before the launcher but where it says auto."""
    given = launch.in_deepspeed_file(f"zero_optimization.{key}")
    is_open = given.value == "auto" if given else launch.deepspeed_file is None
    return launch.given.get(name) if is_open else given
