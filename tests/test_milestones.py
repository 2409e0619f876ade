"""Proves that what is done beside the steps ends no run when it fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from llm_training.deadline import Deadline
from llm_training.milestones import draw_plots, write_card
from llm_training.outputs import OutputFolder
from llm_training.throughput import Throughput


@pytest.mark.parametrize("module", ["plots", "model_card"])
def test_what_cannot_be_imported_costs_a_warning_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """As plots without matplotlib: the model is trained by then."""
    said: list[str] = []
    run: Any = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        output=OutputFolder(tmp_path),
        tracking=SimpleNamespace(say=said.append),
        meter=Throughput(),
        deadline=Deadline(),
    )
    monkeypatch.setitem(sys.modules, f"llm_training.{module}", None)
    draw_plots(run) if module == "plots" else write_card(run, tmp_path / "final")
    (line,) = said
    assert line.startswith("WARNING: ") and "ModuleNotFoundError" in line
