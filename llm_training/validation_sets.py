"""The further validation sets of a run: what each may set, and what it takes from the run."""

from __future__ import annotations

import dataclasses

from arguments import SOURCE_ARGUMENTS, Arguments

# What a source of train_mixture may set, but for what is of training alone.
_OF_TRAINING = ("train_file", "dataset_split", "validation_split_percentage")
SET_ARGUMENTS = tuple(name for name in SOURCE_ARGUMENTS if name not in _OF_TRAINING)
_OF_DATASETS = (
    *("dataset_name", "dataset_config_name", "dataset_revision", "dataset_validation_split"),
)


def validation_set_arguments(arguments: Arguments) -> dict[str, Arguments]:
    """The arguments of each set by its name, as if it were all the data there is.

    A set has files or a dataset of its own, or another split of the run's dataset. What it does
    not set itself, such as its columns, is as for the run.
    """
    sets = {}
    for name, settings in arguments.validation_sets.items():
        own = {"validation_file": [], "train_mixture": {}, "validation_sets": {}, **settings}
        if own["validation_file"]:
            own = dict.fromkeys(_OF_DATASETS) | own
        sets[name] = dataclasses.replace(
            arguments,
            train_file=[],
            dataset_split="train",
            validation_split_percentage=0.0,
            streaming=False,
            **own,
        )
    return sets
