"""What is noted of a run once, the same for every tracker; plain data that outlives the process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_training.tracking.redaction import redact, redact_text

Parameters = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class UsedDataset:
    """Data that a run was trained or judged on, as a tracker lists it among its inputs.

    Attributes:
        name: the source's name, or what the data is called for want of one.
        context: `training` or `validation`.
        fingerprint: changes if, and only if, its tokens do.
        source: where it was read from: paths, globs, a hub id; without logins.
        profile: counts, such as `{"num_documents": 812, "num_tokens": 1_204_112}`.
        source_type: `local` or `hugging_face`, as MLflow calls them.
    """

    name: str
    context: str
    fingerprint: str
    source: str
    profile: dict[str, int] = field(default_factory=dict)
    source_type: str = "local"


@dataclass(frozen=True)
class RunRecord:
    """What a tracker notes when the run begins there. Secrets are taken out already.

    Attributes:
        parameters: arguments and provenance in simple values.
        tags: short texts about it.
        datasets: what it is trained and judged on.
        sweep: name of the run that this one is filed under, if any.
        resumed_step: of the checkpoint that it goes on from; None: a new run.
        description: for people, in Markdown.
    """

    parameters: Parameters
    tags: dict[str, str] = field(default_factory=dict)
    datasets: tuple[UsedDataset, ...] = ()
    sweep: str | None = None
    resumed_step: int | None = None
    description: str = ""


def build_record(
    parameters: dict[str, Any],
    tags: dict[str, str] | None = None,
    *,
    datasets: Sequence[UsedDataset] = (),
    sweep: str | None = None,
    resumed_step: int | None = None,
    description: str = "",
) -> RunRecord:
    """A record of values of any kind, without their secrets."""
    return RunRecord(
        parameters={name: simple_value(value) for name, value in redact(parameters).items()},
        tags={name: redact_text(text) for name, text in redact(tags or {}).items()},
        datasets=tuple(replace(used, source=redact_text(used.source)) for used in datasets),
        sweep=sweep,
        resumed_step=resumed_step,
        description=redact_text(description),
    )


def simple_value(value: Any) -> bool | int | float | str:
    """The value where every tracker can store it, else its JSON (null for None)."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, default=str)
