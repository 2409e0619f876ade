"""Proves that every argument has its place among what a resumed run may change, and only one."""

from __future__ import annotations

from arguments import KINDS
from llm_training.resume_classes import BREAKS_RESUME, CHANGES_RESULT, SAFE, effect_of_change


def test_every_argument_is_in_exactly_one_class() -> None:
    names = [*SAFE, *CHANGES_RESULT, *BREAKS_RESUME]
    assert sorted(names) == sorted(KINDS)


def test_what_can_be_allowed_is_what_breaks_a_resume() -> None:
    """The model and its optimizer have no permit; all other groups are those of the argument."""
    groups = set(BREAKS_RESUME.values()) - {"model", "optimizer"}
    assert groups == {*KINDS["allow_resume_change"].choices}
    for group in groups - {"data"}:
        assert BREAKS_RESUME[group] == group


def test_what_follows_from_a_change_is_said() -> None:
    said = {name: effect_of_change(name) for name in KINDS}
    assert {name for name, text in said.items() if text is None} == SAFE
    assert said["learning_rate"] == "the curve changes from here on"
    assert said["max_steps"] == (
        "the run may end elsewhere, and a decay up to its end changes from here on"
    )
    assert said["per_device_train_batch_size"] == (
        "the curve changes from here on, by rounding and dropout masks alone"
    )
    assert str(said["validation_sets"]).endswith("the curve of training does not")
    assert said["seed"] == "held against the checkpoint's seed"
    assert said["model_type"] == "held against the checkpoint's model"
    assert effect_of_change("an_argument_of_a_later_version") is None
