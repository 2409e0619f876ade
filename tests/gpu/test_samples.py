"""On a GPU, too, a run with samples is the run without, and speaks at the steps that are due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training.samples import read_samples
from tests.small_runs import curve, open_place, train_small, weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_samples_is_the_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    place = open_place(tmp_path, monkeypatch)
    # Nothing else is due at the steps of the samples, so that they alone wait for the device.
    changes: dict[str, Any] = {"device": device, "mixed_precision": precision, "max_steps": 9}
    changes |= {"save_steps": None, "logging_steps": 9, "learning_rate": 1e-2}
    plain = train_small(place, "plain", **changes)
    prompts: dict[str, Any] = {
        "sample_prompt": ["Die 3"],
        "sample_steps": 4,
        "sample_max_new_tokens": 8,
    }
    folder = train_small(place, "speaking", **changes, **prompts)
    samples = read_samples(folder / "samples.jsonl")
    assert [sample.step for sample in samples] == [0, 0, 4, 4, 8, 8, 9, 9]
    assert curve(folder) == curve(plain)
    assert weights(folder) == weights(plain)
