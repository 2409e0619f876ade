"""Proves that compiled models train, resume and export as others do, and mark their steps.

Most of it with torch's tracing alone (aot_eager), which takes no compiler; one test compiles.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn

from arguments import Arguments
from llm_training.compiling import compile_plugin, keep_compiled_code, mark_graph_steps
from tests.small_runs import curve, open_place, train_small, weights

SCOPES = ["blocks", "model"]
# Compiled code draws other masks. Rows of another number in validation: other shapes.
HOW: dict[str, Any] = {
    "dropout": 0.0,
    "eval_steps": 2,
    "validation_split_percentage": 20,
    "per_device_eval_batch_size": 3,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch._dynamo.reset()
    return open_place(tmp_path, monkeypatch)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def plugin(arguments: Arguments) -> TorchDynamoPlugin:
        asked = compile_plugin(arguments)
        backend = "aot_eager" if arguments.torch_compile else "no"
        return TorchDynamoPlugin(
            backend=backend, use_regional_compilation=asked.use_regional_compilation
        )

    monkeypatch.setattr("llm_training.launch.compile_plugin", plugin)


def require_equal(compiled: Path, plain: Path) -> None:
    for ours, theirs in zip(curve(compiled), curve(plain), strict=True):
        error = ours.pop("eval/loss_stderr", 0.0)  # small differences of large sums
        assert error == pytest.approx(theirs.pop("eval/loss_stderr", 0.0), abs=1e-6)
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"document_mask": True}, {"gradient_checkpointing": True}, {"chunked_loss": True}],
    ids=["plain", "document_mask", "checkpointing", "chunked"],
)
def test_the_curve_is_that_of_plain_code(
    scope: str, changes: dict[str, Any], place: Path, traced: None
) -> None:
    train_small(place, "plain", **HOW, **changes)
    train_small(place, "compiled", **HOW, **changes, torch_compile=True, torch_compile_scope=scope)
    require_equal(place / "compiled", place / "plain")


@pytest.mark.parametrize("scope", SCOPES)
def test_it_resumes_bit_for_bit(scope: str, place: Path, traced: None) -> None:
    how = {**HOW, "torch_compile": True, "torch_compile_scope": scope}
    train_small(place, "whole", **how)
    shutil.copytree(place / "whole", place / "stopped", symlinks=True)
    for file in ("result.json", "train_log.jsonl"):
        (place / "stopped" / file).unlink()
    for step in (3, 4):
        shutil.rmtree(place / f"stopped/checkpoints/step-{step:08}")
    for link in ("last", "best"):
        (place / "stopped/checkpoints" / link).unlink(missing_ok=True)
    train_small(place, "stopped", **how)
    assert curve(place / "stopped") == curve(place / "whole")[-len(curve(place / "stopped")) :]
    assert weights(place / "stopped") == weights(place / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_code_computes_the_same(scope: str, place: Path) -> None:
    train_small(place, "plain", **HOW)
    train_small(place, "compiled", **HOW, torch_compile=True, torch_compile_scope=scope)
    require_equal(place / "compiled", place / "plain")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")])
def test_graphs_are_told_where_a_pass_begins(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    for mode, expected in (("default", 0), ("max-autotune-no-cudagraphs", 0), ("max-autotune", 2)):
        model = wrap(nn.Linear(2, 2))
        mark_graph_steps(model, Arguments(torch_compile=True, torch_compile_mode=mode))
        for _ in range(2):
            model(torch.ones(1, 2))
        assert len(marks) == expected
    mark_graph_steps(model := nn.Linear(2, 2), Arguments(torch_compile_mode="reduce-overhead"))
    model(torch.ones(1, 2))
    assert len(marks) == 2


def test_accelerate_is_told_what_was_asked() -> None:
    plugin = compile_plugin(Arguments())
    assert (plugin.backend, plugin.use_regional_compilation) == ("NO", True)
    asked = Arguments(
        torch_compile=True, torch_compile_scope="model", torch_compile_mode="max-autotune"
    )
    plugin = compile_plugin(asked)
    assert (plugin.backend, plugin.mode) == ("INDUCTOR", "max-autotune")
    assert not plugin.use_regional_compilation


def test_compiled_code_is_kept_for_later_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert keep_compiled_code(str(tmp_path)).endswith("find the code in elsewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert keep_compiled_code(str(tmp_path)).endswith(f"find the code in {tmp_path}/compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/compiled"
    assert "compile the model," in keep_compiled_code(str(tmp_path), "model")
