"""What a tracker is told of a run when it begins: settings and data, and where they are from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arguments import Arguments, describe, mixture_sources
from llm_training.data import PreparedData
from llm_training.tracking.record import RunRecord, UsedDataset, build_record, simple_value
from llm_training.validation_sets import validation_set_arguments

# By these runs are searched for; everything else is among the parameters.
USES = (("training", "train"), ("validation", "validation"))  # what for, and the split
FACTS_AS_TAGS = ("git_revision", "backend", "precision", "device_name", "data_fingerprint")


def record_of_run(
    arguments: Arguments,
    facts: dict[str, Any],
    data: PreparedData,
    data_mark: str,
    length: str,
    resumed_step: int | None,
) -> RunRecord:
    """The record of a run that is about to begin.

    Args:
        arguments: resolved, with their origins.
        facts: what `reporting.provenance` found.
        data: that it is trained and judged on.
        data_mark: stands for what is streamed, whose content nobody knows.
        length: for people, such as "700 steps = 1,433,600 tokens".
        resumed_step: of the checkpoint that it goes on from; None: a new run.
    """
    tags = {name: str(facts[name]) for name in FACTS_AS_TAGS if facts.get(name)}
    tags["output_dir"] = str(arguments.output_dir)
    tags |= {f"changed.{name}": text for name, text in changed_arguments(arguments).items()}
    return build_record(
        describe(arguments) | facts,
        tags,
        datasets=tuple(used_datasets(arguments, data, data_mark)),
        sweep=arguments.sweep,
        resumed_step=resumed_step,
        description=description_of(arguments, facts, length),
    )


def changed_arguments(arguments: Arguments) -> dict[str, str]:
    """The arguments that differ from their defaults: value and, where it is known, origin."""
    defaults, origins = describe(Arguments()), arguments.origins
    changed = {}
    for name, value in describe(arguments).items():
        if value != defaults[name]:
            origin = origins.get(name)
            changed[name] = f"{simple_value(value)} ({origin})" if origin else simple_value(value)
    return {name: str(text) for name, text in changed.items()}


def description_of(arguments: Arguments, facts: dict[str, Any], length: str) -> str:
    """What was trained, on what, how long and where, in Markdown."""
    loaded = arguments.model_name_or_path
    model = f"`{loaded}`, trained further" if loaded else f"A new **{arguments.model_type}**"
    named = [name for name in mixture_sources(arguments) if name]
    text = ", ".join(named) or _place(arguments)[0]
    place = f"{facts['num_processes']} x {facts['device_name']}, {facts['backend']}"
    return (
        f"{model}: {facts['num_parameters']:,} parameters, {facts['precision']}.\n\n"
        f"Data: {text}. Length: {length}. Computed on {place}."
    )


def used_datasets(
    arguments: Arguments, data: PreparedData, data_mark: str
) -> Iterator[UsedDataset]:
    """Every source of the run's training and validation data, and its further validation sets."""
    sources, is_judged = mixture_sources(arguments), arguments.eval_steps is not None
    for name, part in (data.parts or {"": data}).items():
        own = sources.get(name, arguments)
        for context, split in USES if is_judged else USES[:1]:
            if (used := _used(own, name, part, context, split)) is not None:
                yield used
    if arguments.streaming:
        source, kind = _place(arguments)
        yield UsedDataset(_name(source), "training", data_mark, source, {}, kind)
    for name, own in validation_set_arguments(arguments).items():
        if is_judged and name in data.validation_sets:
            part = data.validation_sets[name]
            if (used := _used(own, name, part, "validation", "validation")) is not None:
                yield used


def _used(
    arguments: Arguments, name: str, part: PreparedData, context: str, split: str
) -> UsedDataset | None:
    """One split of a source; None where it has none."""
    store = part.stores(split).get("")
    if store is None:
        return None
    source, kind = _place(arguments, split)
    profile = {"num_tokens": store.num_tokens}
    if store.num_documents is not None:
        profile["num_documents"] = store.num_documents
    if counts := part.ledger.splits.get(split):
        profile["num_bytes"] = counts.bytes
    return UsedDataset(name or _name(source), context, store.fingerprint, source, profile, kind)


def _place(arguments: Arguments, split: str = "train") -> tuple[str, str]:
    """Where the text of a split comes from, and what MLflow calls that kind of place."""
    own_files = arguments.validation_file if split == "validation" else []
    files = own_files or arguments.train_file or arguments.validation_file
    if files:
        return ", ".join(files), "local"
    return str(arguments.dataset_name), "hugging_face"


def _name(source: str) -> str:
    """The last part of a path that is no pattern, as data is called for want of a name."""
    parts = [part for part in source.split("/") if part and not set(part) & set("*?[,")]
    return parts[-1] if parts else "text"
