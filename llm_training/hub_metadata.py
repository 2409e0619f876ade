"""What the hub reads of a model card, and what of a run may be published there.

What the training machine calls its folders is nobody's business: of absolute paths the last name is
kept. Language and license are not known, and left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INDEXED = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PATH = re.compile(r"(?:file:|~|/|[A-Za-z]:[\\/])")


def front_matter(
    folder: Path, arguments: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What the hub reads of the card."""
    is_peft = is_adapter(folder)
    matter: dict[str, Any] = {
        "library_name": "peft" if is_peft else "transformers",
        "pipeline_tag": "text-generation",
    }
    if (base := base_model(arguments)) is not None:
        matter["base_model"] = base
        matter["base_model_relation"] = "adapter" if is_peft else "finetune"
    dataset = arguments.get("dataset_name")
    if dataset and is_hub_id(dataset):
        matter["datasets"] = [dataset]
    if results := list(index_results(metrics)):
        name = str(arguments.get("run_name") or "model")
        matter["model-index"] = [{"name": name, "results": results}]
    return matter


def index_results(metrics: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """An entry for each validation set, as the hub lists evaluations."""
    for name, measured in by_set(metrics).items():
        values = {kind: value for kind, value in measured.items() if kind in INDEXED}
        if values:
            yield {
                "task": {"type": "text-generation"},
                "dataset": {"name": name or "validation", "type": name or "validation"},
                "metrics": [{"type": kind, "value": value} for kind, value in values.items()],
            }


def base_model(arguments: Mapping[str, Any]) -> str | None:
    """What the model was made from: a hub id, or the name of a local folder; None: nothing."""
    base = arguments.get("model_name_or_path")
    if not base:
        return None
    if is_hub_id(base):
        return str(base)
    parts = [part for part in re.split(r"[\\/]", str(base)) if part]
    while len(parts) > 1 and parts[-1] in ("final", "best", "."):
        parts.pop()
    return parts[-1]


def is_hub_id(name: str) -> bool:
    """Whether it names something on the hub: it looks so, and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def by_set(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of each validation set by their last name; "" is the main set. Numbers alone."""
    sets: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/") and math.isfinite(value):
            of_set, _, kind = name.removeprefix("eval/").rpartition("/")
            sets.setdefault(of_set, {})[kind] = float(value)
    return dict(sorted(sets.items()))


def without_folders(value: Any) -> Any:
    """A copy in which absolute paths are cut down to their last name, however deep they lie."""
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(element) for element in value]
    if not isinstance(value, str) or not PATH.match(value):
        return value
    parts = [part for part in re.split(r"[\\/]", value) if part]
    first_pattern = next((i for i, part in enumerate(parts) if set("*?[") & set(part)), None)
    return "/".join(parts[-1:] if first_pattern is None else parts[first_pattern:])


def is_adapter(folder: Path) -> bool:
    """Whether a model's folder holds what peft puts on another model."""
    return (folder / "adapter_config.json").is_file()
