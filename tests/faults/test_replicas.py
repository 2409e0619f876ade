"""Real processes that hold copies of a model notice one bit that differs, under every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import environment_of, launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("replica_worker.py")
COPYING = ("ddp", "zero1", "zero2")
CUTTING = ("fsdp", "zero3")
Q_PROJ, NORM, INV_FREQ = "q_proj.weight", "norm.weight", "inv_freq"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both ranks found under each backend; all are tried in one launch."""
    folder = tmp_path_factory.mktemp("replicas")
    others = [*COPYING[1:], *CUTTING, "tp"]
    cases = {"ddp": {}} | {name: environment_of(name, 2) for name in others}
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    launch("ddp", WORKER, str(folder / "cases.json"), str(folder / "records.json"), timeout=500)
    return json.loads((folder / "records.json").read_text("utf-8"))


@pytest.mark.parametrize("backend", COPYING)
def test_one_bit_is_found_and_the_weight_named(backend: str, records: dict) -> None:
    found, of_rank_1 = records[backend]
    assert found == of_rank_1
    assert found["copies"] is True
    assert found["sound"] is None and found["mended"] is None
    for suffix, name in {
        Q_PROJ: "model.model.layers.0.self_attn.q_proj.weight",
        INV_FREQ: "model.model.rotary_emb.inv_freq",
    }.items():
        assert found[suffix] == f"rank 1 holds other values of {name} than rank 0"


@pytest.mark.parametrize("backend", CUTTING)
def test_parts_are_no_copies(backend: str, records: dict) -> None:
    for found in records[backend]:
        assert found["copies"] is False
        assert {found[name] for name in ("sound", Q_PROJ, NORM, INV_FREQ, "mended")} == {None}


def test_tensor_parallel_ranks_share_what_is_not_cut(records: dict) -> None:
    for found in records["tp"]:
        assert found["copies"] is True
        assert found["sound"] is None and found["mended"] is None
        assert found[Q_PROJ] is None  # each rank has its own columns
        assert "rank 1 holds other values of" in found[NORM] and "norm.weight" in found[NORM]
        assert "inv_freq" in found[INV_FREQ]


def test_copies_of_parts_are_compared(records: dict) -> None:
    for found in records["ddp"]:
        assert found["copied"] == [None, "rank 1 holds other values of weight than rank 0"]
        assert found["cut"] == [None, None]
