"""Trains, continues and converts small runs one after the other in the same processes.

    accelerate launch --config_file accelerate_configs/ddp.yaml resume_worker.py CASES OUTPUT

CASES is a JSON list of cases: a `name`, the environment (`env`) that a launch under its backend
gives its processes, what to do (`action`), and the `words` that `train_llm.py` would be given, or
that `spoil` takes. OUTPUT gets a JSON object: the name of a case to what it came to. Starting
processes takes longer than such a run, hence all in one launch.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed

import train_llm
from arguments import Arguments
from llm_training.argument_parsing import read_arguments
from llm_training.checksums import file_checksum, file_note
from llm_training.launch_settings import read_launch_settings
from llm_training.outputs import OutputFolder
from llm_training.ranks import leave
from llm_training.stopping import StopRequest


def train(words: list[str]) -> dict[str, Any]:
    """A run, begun or continued: its losses and gradient norms by step."""
    arguments = read(words)
    output = OutputFolder(str(arguments.output_dir))
    run = train_llm.build_run(arguments, output)
    train_llm.resume(run)
    train_llm.train(run)
    lines = [json.loads(line) for line in output.log.read_text("utf-8").splitlines()]
    return {
        metric: {str(line["step"]): line[f"train/{metric}"] for line in lines}
        for metric in ("loss", "grad_norm")
    }


def run_wholly(words: list[str]) -> dict[str, Any]:
    """A run to its end, with all that it leaves."""
    train_llm.run_training(read(words), StopRequest())
    return {}


def convert(words: list[str]) -> dict[str, Any]:
    """Loads a checkpoint and saves it again at once, in the form of this backend.

    The run has trained before, so that whatever a step and a forward pass leave must give way.
    """
    arguments = read(words)
    run = train_llm.build_run(arguments, OutputFolder(str(arguments.output_dir)))
    window = run.windows.window(0)
    num_tokens = train_llm.count_window_tokens(run, window)
    loss_sum = train_llm.compute_gradients(run, window, num_tokens)
    train_llm.update_weights(run, loss_sum, num_tokens, run.arguments.learning_rate)
    run.model(**window[0])
    train_llm.resume(run)
    differing = differing_copies(run.model)
    run.checkpoints.save(run.state)
    return {"differing_copies": differing}


def differing_copies(model: Any) -> list[str]:
    """Weights of a DeepSpeed engine that compute with other values than those it keeps in fp32."""
    if not hasattr(model, "zero_optimization"):
        return []
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    differing = []
    for name, parameter in model.module.named_parameters():
        kept = safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.data, kept.to(parameter.dtype)):
                differing.append(name)
    return differing


def spoil(words: list[str]) -> dict[str, Any]:
    """Copies a checkpoint (first word) to another place (second); one file (third) is spoilt.

    It is zeroed from its middle on, or removed where a fourth word says so; the manifest lists
    what is there, as if it had been written like this.
    """
    if os.environ.get("RANK", "0") == "0":
        source, target, name, *removed = words
        shutil.copytree(source, target)
        file, manifest = Path(target, name), Path(target, "manifest.json")
        noted = json.loads(manifest.read_text("utf-8"))
        if removed:
            file.unlink()
            del noted["files"][name]
        else:
            size = file.stat().st_size
            file.write_bytes(file.read_bytes()[: size // 2] + bytes(size - size // 2))
            noted["files"][name] = file_note(size, file_checksum(file))
        manifest.write_text(json.dumps(noted), "utf-8")
    over_ranks("done")
    return {}


def read(words: list[str]) -> Arguments:
    """The arguments of a run of these processes."""
    return read_arguments(words, num_processes=read_launch_settings().data_parallel_size)


ACTIONS = {"train": train, "run_wholly": run_wholly, "convert": convert, "spoil": spoil}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One case from its words to its record; what it left in this process is undone."""
    environment = dict(os.environ)
    os.environ.update(case["env"])
    try:
        return ACTIONS[case["action"]](case["words"])
    except train_llm.EXPECTED_ERRORS as error:
        # If a rank had gone on, this exchange would not come to an end.
        return {"refused": over_ranks(f"{type(error).__name__}: {error}")}
    finally:
        gc.collect()
        gc.freeze()  # what is left, libraries above all, need not be looked through again
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)


def over_ranks(message: str) -> list[str]:
    """What every rank has to say."""
    found: list[Any] = [message]
    if distributed.is_initialized():
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, message)
    return found


def main() -> None:
    """Runs the cases of the file named first, and writes to the file named second."""
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    records = {case["name"]: run_case(case) for case in cases}
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(records), "utf-8")


if __name__ == "__main__":
    main()
    leave(0)
