"""Proves that imports point down: who may know whom in this project, held with `ast`.

    floor 6   train_llm.py
    floor 5   judging, milestones, mishaps, speaking, steps, trial
    floor 4   run, evaluate_only, verify_resume, batch_finder, show_data,
              dry_run
    floor 3   argument_parsing, convert, run_data, network, needs,
              checkpoint_comparison
    floor 2   argument_values, earlier_run, planning, evaluation, checkpointing, reporting,
              memory_needs, disk_needs, streams, run_record
    floor 1   every other room of llm_training; a folder is one room
    floor 0   arguments.py

A module imports from lower floors only. Rooms of one floor do not know each other, but every room
may use the ones in `OPEN_ROOMS`. Imports inside functions count as much as those at the top.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "llm_training"

FLOORS = {
    "train_llm": 6,
    "llm_training.judging": 5,
    "llm_training.milestones": 5,
    "llm_training.speaking": 5,
    "llm_training.mishaps": 5,
    "llm_training.steps": 5,
    "llm_training.trial": 5,
    "llm_training.batch_finder": 4,
    "llm_training.dry_run": 4,
    "llm_training.evaluate_only": 4,
    "llm_training.run": 4,
    "llm_training.show_data": 4,
    "llm_training.verify_resume": 4,
    "llm_training.argument_parsing": 3,
    "llm_training.checkpoint_comparison": 3,
    "llm_training.convert": 3,
    "llm_training.needs": 3,
    "llm_training.network": 3,
    "llm_training.run_data": 3,
    "llm_training.argument_values": 2,
    "llm_training.earlier_run": 2,
    "llm_training.packed_rows": 1,
    "llm_training.disk_needs": 2,
    "llm_training.memory_needs": 2,
    "llm_training.planning": 2,
    "llm_training.evaluation": 2,
    "llm_training.evaluation_checks": 1,
    "llm_training.checkpointing": 2,
    "llm_training.reporting": 2,
    "llm_training.run_record": 2,
    "llm_training.streams": 2,
    "llm_training.validation_sets": 1,
    "llm_training.argument_checks": 1,
    "llm_training.argument_files": 1,
    "llm_training.argument_help": 1,
    "llm_training.causal_lm": 1,
    "llm_training.causality": 1,
    "llm_training.checkpoint_files": 1,
    "llm_training.checkpoint_writing": 1,
    "llm_training.checksums": 1,
    "llm_training.chunked_loss": 1,
    "llm_training.compiling": 1,
    "llm_training.control_files": 1,
    "llm_training.cpu_backends": 1,
    "llm_training.cpu_dropout": 1,
    "llm_training.cpu_speed": 1,
    "llm_training.data": 1,
    "llm_training.deadline": 1,
    "llm_training.document_mask": 1,
    "llm_training.durable": 1,
    "llm_training.export": 1,
    "llm_training.export_checks": 1,
    "llm_training.float8": 1,
    "llm_training.flops": 1,
    "llm_training.footprint": 1,
    "llm_training.foreign_names": 1,
    "llm_training.frozen_dtype": 1,
    "llm_training.generate": 2,
    "llm_training.generation": 1,
    "llm_training.gpu_speed": 1,
    "llm_training.hardware_checks": 1,
    "llm_training.health": 1,
    "llm_training.imports": 1,
    "llm_training.launch": 1,
    "llm_training.launch_checks": 1,
    "llm_training.launch_settings": 1,
    "llm_training.length_checks": 1,
    "llm_training.lora": 1,
    "llm_training.lora_checks": 1,
    "llm_training.losses": 1,
    "llm_training.metrics": 1,
    "llm_training.model_state": 1,
    "llm_training.modeling": 1,
    "llm_training.nanogpt_checkpoint": 2,
    "llm_training.neftune": 1,
    "llm_training.new_tokens": 1,
    "llm_training.optim": 1,
    "llm_training.outputs": 1,
    "llm_training.parameter_patterns": 1,
    "llm_training.parent_processes": 1,
    "llm_training.pattern_checks": 1,
    "llm_training.pretrained": 1,
    "llm_training.ranks": 1,
    "llm_training.replicas": 1,
    "llm_training.resolved_arguments": 1,
    "llm_training.resume_classes": 1,
    "llm_training.samples": 1,
    "llm_training.schedules": 1,
    "llm_training.speed_checks": 1,
    "llm_training.state": 1,
    "llm_training.stopping": 1,
    "llm_training.throughput": 1,
    "llm_training.traced_memory": 1,
    "llm_training.tracking": 1,
    "llm_training.updates": 1,
    "llm_training.vocab_padding": 1,
    "llm_training.zero_init": 1,
    "arguments": 0,
    "llm_training.compare": 5,
    "llm_training.plots": 4,
    "llm_training.model_card": 4,
    "llm_training.recorded_runs": 3,
    "llm_training.comparison_table": 1,
    "llm_training.hub": 4,
    "llm_training.hub_checks": 1,
    "llm_training.hub_client": 3,
    "llm_training.hub_metadata": 1,
    "llm_training.system_metrics": 1,
    "llm_training.uncertainty": 1,
    "llm_training.local_metrics": 1,
}

OPEN_ROOMS = {
    "llm_training.causal_lm",
    "llm_training.checkpoint_files",
    "llm_training.checksums",
    "llm_training.chunked_loss",
    "llm_training.compiling",
    "llm_training.cpu_backends",
    "llm_training.durable",
    "llm_training.evaluation_checks",
    "llm_training.export_checks",
    "llm_training.frozen_dtype",
    "llm_training.float8",
    "llm_training.hardware_checks",
    "llm_training.hub_checks",
    "llm_training.imports",
    "llm_training.launch_checks",
    "llm_training.launch_settings",
    "llm_training.length_checks",
    "llm_training.lora",
    "llm_training.lora_checks",
    "llm_training.local_metrics",
    "llm_training.losses",
    "llm_training.model_state",
    "llm_training.neftune",
    "llm_training.new_tokens",
    "llm_training.outputs",
    "llm_training.packed_rows",
    "llm_training.parameter_patterns",
    "llm_training.pattern_checks",
    "llm_training.pretrained",
    "llm_training.ranks",
    "llm_training.resolved_arguments",
    "llm_training.schedules",
    "llm_training.speed_checks",
    "llm_training.state",
    "llm_training.throughput",
    "llm_training.vocab_padding",
    "llm_training.zero_init",
    "llm_training.validation_sets",
}

# They take plain values and tensors.
PURE_MODULES = {
    "llm_training.deadline",
    "llm_training.footprint",
    "llm_training.losses",
    "llm_training.schedules",
    "llm_training.throughput",
    "llm_training.uncertainty",
    "llm_training.data.ledger",
    "llm_training.data.rows.order",
    "llm_training.data.rows.packing",
}
KEPT_OUT_OF_PURE_MODULES = {"accelerate", "arguments"}

# `--help` and mistakes in the settings come from these alone, and at once.
QUICK_MODULES = {
    "arguments",
    "llm_training.argument_checks",
    "llm_training.argument_files",
    "llm_training.argument_help",
    "llm_training.argument_parsing",
    "llm_training.argument_values",
    "llm_training.convert",
    "llm_training.earlier_run",
    "llm_training.evaluation_checks",
    "llm_training.foreign_names",
    "llm_training.hardware_checks",
    "llm_training.hub_checks",
    "llm_training.launch_checks",
    "llm_training.launch_settings",
    "llm_training.length_checks",
    "llm_training.lora_checks",
    "llm_training.pattern_checks",
    "llm_training.speed_checks",
    "llm_training.validation_sets",
    "llm_training.resolved_arguments",
    "llm_training.resume_classes",
    "llm_training.stopping",
}


def house_problems(root: Path) -> list[str]:
    """Everything in the house under `root` that breaks a rule of this file, a line each."""
    return [
        f"{path.relative_to(root)}: {problem}"
        for path in source_files(root)
        for problem in module_problems(module_name(path.relative_to(root)), path)
    ]


def source_files(root: Path) -> list[Path]:
    entries = [root / "arguments.py", root / "train_llm.py"]
    return [path for path in entries if path.exists()] + sorted((root / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    """`llm_training/state.py` is llm_training.state; an __init__.py is its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_problems(name: str, path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Relative imports start at the folder: the module itself where it is an __init__.py.
    folder = name if path.stem == "__init__" else name.rpartition(".")[0]
    imported = set(imported_names(ast.walk(tree), folder))
    room = room_of(name)

    if path.stem == "utils":
        yield "a name must say what is inside, and utils does not"
    if name == PACKAGE:
        if inside := sorted({room_of(other) for other in imported} & FLOORS.keys()):
            yield f"imports {', '.join(inside)}; the package's own __init__.py imports no room"
        return
    if room not in FLOORS:
        yield f"{room} has no floor yet: give it one in FLOORS of tests/test_house.py"
        return
    for other in sorted({room_of(other) for other in imported} & FLOORS.keys() - {room}):
        open_neighbour = other in OPEN_ROOMS and FLOORS[other] == FLOORS[room]
        if FLOORS[other] >= FLOORS[room] and not open_neighbour:
            yield f"floor {FLOORS[room]} imports {other} of floor {FLOORS[other]}"
    if name in PURE_MODULES:
        for other in sorted({top_of(other) for other in imported} & KEPT_OUT_OF_PURE_MODULES):
            yield f"is pure and imports {other}; it takes plain values"
    if name in QUICK_MODULES:
        at_import = set(imported_names(outside_functions(tree), folder))
        slow = {other for other in at_import if not is_quick(other)}
        for other in sorted({top_of(other) for other in slow}):
            yield f"imports {other} at module level; only the standard library starts fast enough"


def imported_names(nodes: Iterator[ast.AST], folder: str) -> Iterator[str]:
    """Full dotted names: `from .order import seek` in llm_training.data: ...data.order.seek."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")[: len(folder.split(".")) - node.level + 1]
            start = [*(above if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*start, alias.name]) for alias in node.names)


def is_quick(name: str) -> bool:
    return top_of(name) in sys.stdlib_module_names or room_of(name) in QUICK_MODULES


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


def top_of(name: str) -> str:
    return name.split(".")[0]


def room_of(name: str) -> str:
    """llm_training.data.rows.order.seek stands in the room llm_training.data."""
    return ".".join(name.split(".")[: 2 if top_of(name) == PACKAGE else 1])


def test_imports_point_down() -> None:
    assert house_problems(ROOT) == []


def test_nothing_is_called_utils() -> None:
    folders = ("benchmarks", "docs", "tests")
    assert list(ROOT.glob("utils.py")) == []
    assert [path for folder in folders for path in (ROOT / folder).rglob("utils.py")] == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("llm_training/state.py", "import train_llm", "floor 1 imports train_llm of floor 6"),
        ("llm_training/optim.py", "from llm_training import planning", "planning of floor 2"),
        ("llm_training/planning.py", "from llm_training.evaluation import a", "evaluation of"),
        ("llm_training/optim.py", "from .modeling import a", "modeling of floor 1"),
        ("llm_training/data/chat.py", "from ..export import a", "export of floor 1"),
        ("llm_training/data/__init__.py", "from .. import health", "health of floor 1"),
        ("llm_training/optim.py", "def f():\n    import train_llm", "train_llm of floor 6"),
        ("llm_training/__init__.py", "from . import launch", "imports llm_training.launch"),
        ("llm_training/losses.py", "from accelerate import Accelerator", "pure and imports acc"),
        ("llm_training/data/rows/order.py", "import arguments", "pure and imports arguments"),
        ("llm_training/novelty.py", "", "llm_training.novelty has no floor yet"),
        ("llm_training/data/utils.py", "", "a name must say what is inside"),
        ("arguments.py", "import json\nimport yaml", "imports yaml at module level"),
        ("llm_training/argument_checks.py", "import torch", "imports torch at module level"),
        ("arguments.py", "def f():\n    import llm_training.state", "floor 0 imports"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str, problem: str) -> None:
    write(tmp_path / path, source)
    found = house_problems(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert problem in found[0]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    write(tmp_path / "train_llm.py", "import torch\nfrom llm_training import planning, state")
    write(tmp_path / "llm_training/planning.py", "from llm_training.data.rows.order import seek")
    write(tmp_path / "llm_training/data/dataset.py", "from .order import seek\nimport arguments")
    write(tmp_path / "llm_training/optim.py", "from llm_training import schedules")
    write(tmp_path / "arguments.py", "import json\ndef f():\n    import yaml")
    assert house_problems(tmp_path) == []


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
