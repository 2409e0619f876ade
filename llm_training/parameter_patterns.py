"""Parameters chosen by patterns of their names: which stay as they are, and which learn slower.

Patterns are those of file names (`*`, `?`, `[0-5]`; a `*` also stands for dots), over the full
names of the Hugging Face model, as in its files. A tied weight goes by each of its names.

Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models"
(arXiv:2402.12354), for what `{"*lora_B*": 16}` is good for.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from arguments import OptimizationArguments
from llm_training.lora import LoraError, base_mark
from llm_training.vocab_padding import trained_shape

EXCEPT = "!"  # before a pattern whose parameters are taken out again
RATE_FACTOR = "rate_factor"  # in a group of an optimizer, where it is not 1
MARK = "frozen_base"  # on a model: what `frozen_base` finds
NUM_SHOWN = 12

# A parameter and all of its names.
Named = tuple[nn.Parameter, list[str]]


class PatternError(ValueError):
    """A pattern does not do what was meant; the message says why and what to do."""


def freeze_parameters(
    model: PreTrainedModel, arguments: OptimizationArguments, *, held_in: str = "fp32"
) -> list[str]:
    """Takes what `freeze_parameters` names out of what is trained.

    Args:
        model: before any backend has seen it; its vocabulary is padded by now, if ever.
        held_in: the type in which the backend will hold what is not trained: DeepSpeed keeps
            float32 of what its optimizer updates, and of nothing else.

    Returns:
        What the log says of it; nothing without patterns.

    Raises:
        PatternError: a pattern fits nothing, nothing stays frozen, or nothing is left to train.
    """
    patterns = arguments.freeze_parameters
    if not patterns:
        return []
    named = _named_parameters(model)
    globs = [pattern.removeprefix(EXCEPT) for pattern in patterns]
    _check_all_fit(model, "freeze_parameters", zip(patterns, globs, strict=True), named)

    def is_frozen(names: Sequence[str]) -> bool:
        last = _last_fitting(names, globs)
        return last is not None and not patterns[last].startswith(EXCEPT)

    frozen = [parameter for parameter, names in named if is_frozen(names)]
    given = " ".join(patterns)
    if not frozen:
        raise PatternError(
            f"--freeze_parameters {given} freezes nothing: what the last patterns take out is all"
            f" that the others name. Drop it, or put what begins with {EXCEPT} first."
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter, _ in named):
        raise PatternError(
            f"--freeze_parameters {given} leaves nothing to train. Take some out again with a"
            f" pattern behind it, such as {EXCEPT}{named[-1][1][0]}, or name fewer."
        )
    setattr(model, MARK, _base_of(model))
    sizes = [trained_shape(parameter).numel() for parameter, _ in named]
    held, total = sum(trained_shape(parameter).numel() for parameter in frozen), sum(sizes)
    line = (
        f"Frozen   {len(frozen)} of {len(named)} tensors: {held:,} of {total:,} parameters stay as"
        f" they are, {total - held:,} are trained"
    )
    lines = [line + _tied_remark(named, lambda names: "frozen" if is_frozen(names) else "trained")]
    if held_in != "fp32":
        lines.append(
            f"Frozen   held in {held_in} by DeepSpeed, also in final/: unchanged where they were"
            " stored so, else rounded"
        )
    return lines


def rate_factors(model: nn.Module, patterns: Mapping[str, float]) -> dict[int, float]:
    """What the learning rate of trained parameters is multiplied with, by their `id`.

    Args:
        model: the Hugging Face model, or what it is wrapped in before a backend sees it.
        patterns: `learning_rate_factors`; those for which none fits are left out, with factor 1.

    Raises:
        PatternError: a pattern fits nothing that is trained.
    """
    if not patterns:
        return {}
    own: nn.Module = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    named = _named_parameters(own)
    trained = [(parameter, names) for parameter, names in named if parameter.requires_grad]
    for pattern in patterns:
        frozen = next((n for _, names in named for n in names if fnmatchcase(n, pattern)), None)
        if frozen and not any(_fits(names, pattern) for _, names in trained):
            raise PatternError(
                f"--learning_rate_factors {pattern}: what fits it, such as {frozen}, is not"
                f" trained, and has no learning rate. Trained are {_listed(_kinds(trained))}."
            )
    pairs = [(pattern, pattern) for pattern in patterns]
    _check_all_fit(own, "learning_rate_factors", pairs, trained)
    found = {id(parameter): _factor(names, patterns) for parameter, names in trained}
    return {key: factor for key, factor in found.items() if factor != 1}


def rate_lines(model: PreTrainedModel, arguments: OptimizationArguments) -> list[str]:
    """What the log says of `learning_rate_factors`; raises as `rate_factors`."""
    patterns = arguments.learning_rate_factors
    if not patterns:
        return []
    factors = rate_factors(model, patterns)
    trained = [pair for pair in _named_parameters(model) if pair[0].requires_grad]
    parts = []
    for factor in sorted({*factors.values()}):
        sizes = [trained_shape(p).numel() for p, _ in trained if factors.get(id(p)) == factor]
        plural = "" if len(sizes) == 1 else "s"
        parts.append(f"x {factor:g}: {len(sizes)} tensor{plural}, {sum(sizes):,} parameters")
    if len(factors) < len(trained):
        parts.append("x 1: the rest" if factors else "x 1: all")
    remark = _tied_remark(trained, lambda names: f"x {_factor(names, patterns):g}")
    return [f"Rates    {'; '.join(parts)}{remark}"]


def frozen_base(model: nn.Module) -> str | None:
    """A checksum of the files from which the frozen parameters in `model` come.

    Empty where they come from none, but follow from the seed; None without `freeze_parameters`.
    """
    found = (module.__dict__.get(MARK) for module in model.modules())
    return next((mark for mark in found if mark is not None), None)


def _base_of(model: PreTrainedModel) -> str:
    if not model.config.name_or_path:
        return ""
    try:
        return base_mark(model)
    except LoraError as error:
        raise PatternError(str(error)) from error


# ------------------------------------------------------------------------------------- matching


def _named_parameters(model: nn.Module) -> list[Named]:
    found: dict[int, Named] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def _fits(names: Sequence[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def _last_fitting(names: Sequence[str], globs: Sequence[str]) -> int | None:
    """The place of the last pattern that fits one of the names, which is the one that counts."""
    places = [place for place, glob in enumerate(globs) if _fits(names, glob)]
    return places[-1] if places else None


def _factor(names: Sequence[str], patterns: Mapping[str, float]) -> float:
    last = _last_fitting(names, [*patterns])
    return 1.0 if last is None else float([*patterns.values()][last])


def _tied_remark(named: Sequence[Named], say: Callable[[Sequence[str]], str]) -> str:
    """Names of one weight of which the patterns, each name by itself, would say different things.

    Args:
        say: what becomes of a parameter with these names, in a word.
    """
    apart = [names for _, names in named if len({say([name]) for name in names}) > 1]
    return "".join(f"; {' and '.join(names)} are one weight: {say(names)}" for names in apart)


# ------------------------------------------------------------------------- what names there are


def _check_all_fit(
    model: nn.Module, argument: str, patterns: Iterable[tuple[str, str]], named: Sequence[Named]
) -> None:
    """Makes sure that each pattern (as given, and without its mark) fits a parameter.

    Raises:
        PatternError: one fits none; it tells names that come close, or all there are.
    """
    for given, glob in patterns:
        if any(_fits(names, glob) for _, names in named):
            continue
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        close = _close_kinds(glob, named)
        what = f"Closest are {_listed(close)}" if close else f"It has {_listed(_kinds(named))}"
        raise PatternError(
            f"--{argument} {given}: {kind} has no such parameter. {what}. A pattern fits whole"
            " names, and * any part of one."
        )


def _close_kinds(glob: str, named: Sequence[Named]) -> Iterable[str]:
    """Names that hold the text of a pattern, else those with the most words that are much alike."""
    text = glob.strip("*.")
    if inside := [name for _, names in named for name in names if text and text in name]:
        return dict.fromkeys(map(_kind, inside))
    kinds = {kind: {*kind.split(".")} for kind in _kinds(named)}
    known = {word for words in kinds.values() for word in words}
    alike = (difflib.get_close_matches(word, known, 1) for word in re.findall(r"\w+", glob))
    wanted = {word for words in alike for word in words}
    most = max(len(words & wanted) for words in kinds.values())
    return [kind for kind, words in kinds.items() if most and len(words & wanted) == most]


def _kinds(named: Sequence[Named]) -> Iterable[str]:
    """The names, each kind once."""
    return dict.fromkeys(_kind(name) for _, names in named for name in names)


def _kind(name: str) -> str:
    """A name with `*` for the numbers in it: a pattern that fits all of its kind."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


def _listed(names: Iterable[str]) -> str:
    shown = [*names]
    more = f" and {len(shown) - NUM_SHOWN} more kinds" if len(shown) > NUM_SHOWN else ""
    return ", ".join(shown[:NUM_SHOWN]) + more
