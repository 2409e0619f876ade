"""What is wrong with where a model is to be published, before anything slow is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from arguments import Arguments, HubArguments

MAX_NAME = 96  # characters that the hub takes, for an owner and for a name each
_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_FORM = "OWNER/NAME or NAME, of letters a to z, digits, - _ and ., at most 96 characters each"


def hub_problems(arguments: Arguments) -> Iterator[str]:
    """What is at odds between the upload, its repository and what the start is for."""
    wished = arguments.hub_model_id
    if not arguments.push_to_hub:
        defaults = HubArguments()
        for name in ("hub_model_id", "hub_private_repo"):
            if (value := getattr(arguments, name)) != getattr(defaults, name):
                given = f"{name}={json.dumps(value)}"
                yield f"{given} has no effect without push_to_hub: drop it, or give that"
    elif arguments.eval_only:
        yield (
            "push_to_hub=true has no effect with eval_only, which makes no model: drop the first,"
            " or send what a run has made with python -m llm_training.hub push RUN_FOLDER"
        )
    if wished is not None and not is_repository_id(wished):
        yield f"hub_model_id={wished} cannot name a repository of the hub: use {_FORM}"


def is_repository_id(text: str) -> bool:
    """Whether the hub would take it, as OWNER/NAME or NAME; it begins and ends with a character."""
    parts = text.split("/")
    is_formed = len(parts) <= 2 and all(_NAME.fullmatch(part) for part in parts)
    return is_formed and not re.search(r"--|\.\.|\.git$", text)


def repository_name(text: str) -> str:
    """The nearest name to a text that the hub takes: of `run 3: Größe`, `run-3-Gr-e`."""
    name = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
    name = re.sub(r"([-.])[-.]+", r"\1", name).strip("-.")[:MAX_NAME].strip("-.")
    return name.removesuffix(".git").strip("-.") or "model"
