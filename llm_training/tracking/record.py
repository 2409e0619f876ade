"""What is noted of a run once, the same for every tracker; plain data that outlives the process."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    name: str
    context: str
    fingerprint: str
    source: str
    profile: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """What a tracker notes when the run begins there. Secrets are taken out already.

    Attributes:
        parameters: arguments and provenance in simple values.
        tags: short texts about it.
        datasets: what it is trained and judged on.
        sweep: name of the run that this one is filed under, if any.
        resumed_step: of the checkpoint that it goes on from; None: a new run.
    """

    parameters: Parameters
    tags: dict[str, str] = field(default_factory=dict)
    datasets: tuple[UsedDataset, ...] = ()
    sweep: str | None = None
    resumed_step: int | None = None
