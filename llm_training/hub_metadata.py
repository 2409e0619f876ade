"""What the hub reads of a model card, and what of a run may be published there.

What the training machine calls its folders is nobody's business: of absolute paths the last name is
kept, or the id on the hub where one is known. Language and license are not known, and left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INDEXED = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PATH = re.compile(r"(?:file:|~|/|[A-Za-z]:[\\/])")
# What the hub's client calls the folder of a model that it has downloaded.
CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?(?=[\\/]|$)")
CLONED = re.compile(r"url\s*=\s*https://(?:[^@/\s]+@)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
ADAPTER_CONFIG = "adapter_config.json"
# Configurations that may say from where a model was loaded.
CONFIGS = (ADAPTER_CONFIG, "config.json", "tokenizer_config.json")
# What an export writes: of an earlier upload, these would be read beside or before a new one's.
EXPORTED = re.compile(
    r"[\w.-]+\.safetensors(\.index\.json)?|(adapter_|generation_|tokenizer_)?config\.json"
    r"|tokenizer\.json|chat_template\.jinja|special_tokens_map\.json"
)


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
    if datasets := dataset_ids(arguments):
        matter["datasets"] = datasets
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


def dataset_ids(arguments: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that it was trained on."""
    mixture = arguments.get("train_mixture") or {}
    sources = [source for source in mixture.values() if isinstance(source, Mapping)]
    names = [own.get("dataset_name") for own in (arguments, *sources)]
    return [*dict.fromkeys(str(name) for name in names if name and is_hub_id(name))]


def base_model(arguments: Mapping[str, Any]) -> str | None:
    """What the model was made from: a hub id, or the name of a local folder; None: nothing."""
    base = arguments.get("model_name_or_path")
    return published_name(str(base)) if base else None


def published_name(base: str) -> str:
    """What others call a model: its id on the hub; where none is known, the name of its folder."""
    if (known := known_id(base)) is not None:
        return known
    parts = [part for part in re.split(r"[\\/]", base) if part]
    while len(parts) > 1 and parts[-1] in ("final", "best", "."):
        parts.pop()
    return parts[-1]


def known_id(base: str) -> str | None:
    """The id on the hub of a model that is named so here; None: it came from nowhere known.

    Of a local folder, it stands in the path that the hub's client gives it, in git's configuration
    of a clone, or in `_name_or_path` of its own configuration.
    """
    if is_hub_id(base):
        return base
    folder = Path(base).expanduser()
    if cached := CACHED.search(str(folder)):
        return "/".join(filter(None, cached.groups()))
    try:
        cloned = CLONED.search((folder / ".git" / "config").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cloned = None
    if cloned:
        return cloned[1].removesuffix(".git")
    name = str(_read_json(folder / "config.json").get("_name_or_path") or "")
    return name if is_hub_id(name) else None


def publishable(folder: Path) -> dict[str, Path | bytes]:
    """The files of a model's folder by their name there, as others may see them.

    A configuration that names a folder of this machine stands there as its changed content; the
    file itself stays as it is.
    """
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_ours = not any(part.startswith(".") for part in name.parts) and path.suffix != ".tmp"
        if path.is_file() and is_ours:
            found[name.as_posix()] = path
    for config in CONFIGS:
        before = _read_json(folder / config)
        if (after := _without_places(before)) != before:
            found[config] = (json.dumps(after, indent=2) + "\n").encode()
    return found


def published_line(noted: Mapping[str, Any]) -> str:
    """Where a model was published, from what result.json notes of it."""
    seen = "private" if noted["private"] else "public"
    return f"Hub      {noted['url']} ({seen}), commit {noted['commit'][:7]}"


def unknown_base(folder: Path) -> str | None:
    """The folder of this machine that an adapter needs and no hub is known to have; else None."""
    base = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return str(base) if base and known_id(str(base)) is None else None


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The same, but for folders of this machine from which a model was loaded."""
    places = {
        key: published_name(value)
        for key, value in config.items()
        if key.endswith("name_or_path") and isinstance(value, str) and value
    }
    return config | places


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


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
    return (folder / ADAPTER_CONFIG).is_file()
