"""Proves what a validation set takes from the run, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from arguments import SOURCE_ARGUMENTS, Arguments
from llm_training.validation_sets import SET_ARGUMENTS, validation_set_arguments

RUN: dict[str, Any] = {
    "train_file": ["text.txt"],
    "validation_file": ["main.txt"],
    "text_column": "content",
    "exclude_files": ["*.py"],
    "cache_dir": "cache",
}
DATASET: dict[str, Any] = {
    "dataset_name": "a/b",
    "dataset_config_name": "small",
    "dataset_split": "train[:9]",
    "dataset_validation_split": "dev",
    "dataset_revision": "main",
    "streaming": True,
}


def own_of(run: dict[str, Any], **settings: Any) -> Arguments:
    (own,) = validation_set_arguments(Arguments(**run, validation_sets={"x": settings})).values()
    return own


def test_files_of_its_own_take_the_place_of_all_other_data() -> None:
    own = own_of(RUN | {"train_file": []} | DATASET, validation_file=["math.txt"])
    assert own == Arguments(
        validation_file=["math.txt"],
        validation_split_percentage=0.0,
        text_column="content",
        exclude_files=["*.py"],
        cache_dir="cache",
    )


def test_another_split_is_of_the_runs_dataset() -> None:
    own = own_of(DATASET | {"validation_file": ["main.txt"]}, dataset_validation_split="test")
    assert (own.validation_file, own.dataset_name, own.streaming) == ([], "a/b", False)
    assert (own.dataset_validation_split, own.dataset_config_name) == ("test", "small")


@pytest.mark.parametrize("name", SET_ARGUMENTS)
def test_what_it_sets_goes_before_what_the_run_says(name: str) -> None:
    assert getattr(own_of(RUN, **{name: "its own"}), name) == "its own"


def test_what_is_of_training_alone_cannot_be_set() -> None:
    left = {*SOURCE_ARGUMENTS} - {*SET_ARGUMENTS}
    assert left == {"train_file", "dataset_split", "validation_split_percentage"}
