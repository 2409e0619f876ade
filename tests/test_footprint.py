"""Proves that the estimates are those of docs/launching.md, and of rings counted by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_training.footprint import (
    Backend,
    ModelShape,
    activation_bytes,
    exchanged_bytes,
    state_bytes_per_parameter,
    working_bytes,
)

LAUNCHING = (Path(__file__).parents[1] / "docs" / "launching.md").read_text(encoding="utf-8")
MEMORY = LAUNCHING.partition("## Memory")[2]
BLOCK = 4 * 8**2 + 3 * 8 * 32
SHAPE = ModelShape(10_000, 4, 8, 32, 3, 100)
BACKENDS: tuple[Backend, ...] = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_half", [True, False])
def test_the_table_of_the_docs_says_the_same(backend: Backend, is_half: bool) -> None:
    row = re.search(rf"^\| `{backend}\.yaml`.*?\|(.*?)\|(.*?)\|", MEMORY, re.M)
    assert row
    terms = row[2 if is_half else 1].split("+")
    for n in (2, 8, 64):
        stated = sum(float(t.split("/")[0]) / (n if "/N" in t else 1) for t in terms)
        assert state_bytes_per_parameter(backend, n, is_half=is_half) == pytest.approx(stated)


def test_accumulation_keeps_whole_gradients_under_fsdp() -> None:
    assert state_bytes_per_parameter("fsdp", 8, accumulates=True) == 4 + 12 / 8


def test_whole_for_a_moment_are_two_blocks_and_the_table() -> None:
    assert working_bytes(SHAPE, "fsdp") == 2 * (2 * BLOCK + 100 * 8)
    assert working_bytes(SHAPE, "zero3", is_half=False) == 4 * (2 * BLOCK + 100 * 8)
    assert working_bytes(SHAPE, "ddp") == 0


def test_activations_are_those_of_the_paper() -> None:
    gpt = ModelShape(
        0, layers=12, hidden=768, intermediate=4 * 768, matrices_in_mlp=2, vocabulary=0
    )
    # Its 34 s b h, without the two masks of dropout (a byte each).
    per_token = activation_bytes(gpt, 1) / (12 * 768)
    assert per_token == 32
    kept = activation_bytes(gpt, 10, checkpointing=True)
    assert kept == 12 * 2 * 768 * 10 + 32 * 768 * 10


def test_rings_send_what_they_must() -> None:
    whole, half = 4 * 10_000, 2 * 10_000
    share = 7 / 8
    assert exchanged_bytes(SHAPE, "single", 1) == 0
    assert exchanged_bytes(SHAPE, "ddp", 8, micro_batches=4) == 2 * share * whole
    assert exchanged_bytes(SHAPE, "fsdp", 8, micro_batches=4) == share * (8 * half + whole)
    assert exchanged_bytes(SHAPE, "zero1", 8) == share * 3 * half
    assert exchanged_bytes(SHAPE, "zero2", 8, micro_batches=2) == share * 3 * half
    assert exchanged_bytes(SHAPE, "zero3", 8, micro_batches=2) == share * 6 * half
