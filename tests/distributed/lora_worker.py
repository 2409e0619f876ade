"""The runs of `resume_worker.py`, and ones that go to their end and look at the base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

import train_llm
from llm_training.export import gather_weights
from llm_training.launch_settings import read_launch_settings
from llm_training.milestones import export
from llm_training.ranks import leave
from llm_training.run import Run
from tests.distributed import resume_worker

resume = train_llm.resume


def finish(words: list[str]) -> dict[str, Any]:
    """A run to its end: its curve, and which of the base's weights are not as in its file."""
    built: list[tuple[Run, int]] = []

    def note(run: Run) -> None:  # before a step: whole copies of 16 bits stay after one
        num_half = sum(p.dtype == torch.bfloat16 for p in run.model.parameters())
        built.append((run, num_half))
        resume(run)

    with patch.object(train_llm, "resume", note):
        curve = resume_worker.train(words)
    ((run, num_half),) = built
    found = gather_weights(run.model, keep=True)
    before = load_file(Path(str(run.arguments.model_name_or_path)) / "model.safetensors")
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}
    changed = [name for name in before if not torch.equal(before[name], plain[name])]
    moved = [name for name in plain if ".lora_B." in name and plain[name].any()]
    export(run, run.output.final)
    return {**curve, "changed": changed, "num_moved": len(moved), "num_half": num_half}


resume_worker.ACTIONS["finish"] = finish

if __name__ == "__main__":
    assert read_launch_settings().num_processes > 1
    resume_worker.main()
    leave(0)
