"""What is wrong with patterns of parameter names, before anything slow is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator

from arguments import Arguments

EXCEPT = "!"  # before a pattern whose parameters are taken out of what is frozen again


def pattern_problems(arguments: Arguments) -> Iterator[str]:
    """What no model could make sense of; which names there are, only a model knows."""
    yield from _freeze_problems(arguments)
    yield from _factor_problems(arguments)


def _freeze_problems(arguments: Arguments) -> Iterator[str]:
    patterns = arguments.freeze_parameters
    if not patterns:
        return
    given = f"freeze_parameters={json.dumps(patterns)}"
    if EXCEPT in patterns:
        yield f"{given}: behind a {EXCEPT} stands a pattern of the names that it takes out again"
    elif patterns[0].startswith(EXCEPT):
        yield (
            f"{given}: {patterns[0]} takes out of what the patterns before it freeze, and there are"
            " none; begin with what is frozen, such as *"
        )
    if arguments.lora_rank is not None:
        yield (
            f"{given} and lora_rank={arguments.lora_rank} exclude each other: beside adapters all"
            " weights stay as they are but those of lora_modules_to_save; drop the first"
        )


def _factor_problems(arguments: Arguments) -> Iterator[str]:
    for pattern, factor in arguments.learning_rate_factors.items():
        given = f"learning_rate_factors, {json.dumps(pattern)}: {json.dumps(factor)}"
        if not pattern or pattern.startswith(EXCEPT):
            yield (
                f"{given}: a pattern of names belongs before the colon, such as *.wte.*, without a"
                f" {EXCEPT}; what shall keep the rate as it is takes the factor 1"
            )
        if type(factor) not in (int, float):  # not isinstance, by which True is an int
            yield f"{given} is no factor: write a number above 0, such as 0.1, without quotes"
        elif factor <= 0:
            yield (
                f"{given} is out of range: a factor must be more than 0; what shall not move"
                " belongs in freeze_parameters"
            )
