"""All the data of a run: one source, or several that are mixed, and further validation sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arguments import Arguments, holds_conversations, mixture_sources
from llm_training.data.documents.chat_templates import end_of_turn, load_chat_template
from llm_training.data.errors import DataError
from llm_training.data.folders import exclusive, new_folder
from llm_training.data.leakage import Leakage, find_leakage
from llm_training.data.ledger import Ledger
from llm_training.data.prepare import (
    list_files,
    make_tokenizer,
    prepare_source,
    prepare_validation_set,
)
from llm_training.data.prepared import PreparedData
from llm_training.data.progress import Progress
from llm_training.data.recipe import Recipe, load_if_given, make_recipe, tokenizer_loader
from llm_training.data.tokens.token_files import is_token_file
from llm_training.data.tokens.token_store import TokenStore
from llm_training.data.tokens.tokenizers import tokenizer_fingerprint, train_tokenizer
from llm_training.durable import write_json
from llm_training.validation_sets import validation_set_arguments

Say = Callable[[str], None]

# Other kinds come as they are, or are the same whatever the data.
_MADE_FROM_TEXT = ("char", "bpe")


def prepare_data(
    arguments: Arguments, *, tokenizer_source: str | None = None, say: Say = print
) -> PreparedData:
    """Reads, tokenizes and stores the data that the arguments name, unless that was done before.

    Several processes may call it at once: one builds, the others wait and take the result.

    Args:
        arguments: the settings.
        tokenizer_source: model whose tokenizer is used where tokenizer_name is null.
        say: takes lines that tell what is being done.

    Raises:
        DataError: a fault in the data or its settings.
    """
    if arguments.streaming:
        data = _prepare_beside_stream(arguments, tokenizer_source, say)
    elif arguments.train_mixture:
        data = _prepare_mixture(arguments, tokenizer_source, say)
    elif has_only_validation_sets(arguments):
        data = _tokenizer_alone(arguments, tokenizer_source)
    else:
        data = prepare_source(arguments, tokenizer_source=tokenizer_source, say=say)
    write_chat_template(data, arguments, say)
    data = dataclasses.replace(data, validation_sets=prepare_validation_sets(arguments, data, say))
    return _with_leakage(data, arguments, say) if arguments.leakage_report else data


def write_chat_template(data: PreparedData, arguments: Arguments, say: Say) -> None:
    """Gives the tokenizer of the data the template that conversations are trained with.

    The model is saved with it, so that it is asked at inference as it was in training.
    """
    sources = {k: own for k, own in mixture_sources(arguments).items() if holds_conversations(own)}
    if not sources or data.tokenizer is None:
        return
    templates = {
        name: load_chat_template(own.chat_template) or data.tokenizer.chat_template
        for name, own in sources.items()
    }
    first = next(iter(templates))
    if others := [name for name in templates if templates[name] != templates[first]]:
        say(
            f"WARNING: the sources {first} and {', '.join(others)} have different chat templates;"
            f" the model is saved with that of {first}"
        )
    data.tokenizer.chat_template = templates[first]
    if end_of_turn(data.tokenizer) is None:
        say(
            "Chat template: no special token ends a turn of the assistant, so a model stops where"
            f" it writes {data.tokenizer.eos_token} or not at all; write {{{{ eos_token }}}} behind"
            " what the assistant says"
        )


def has_only_validation_sets(arguments: Arguments) -> bool:
    """Whether there is nothing to train on, and nothing to validate on but further sets."""
    given = (arguments.train_file, arguments.dataset_name, arguments.validation_file)
    return not any(given) and not arguments.train_mixture and bool(arguments.validation_sets)


def prepare_validation_sets(
    arguments: Arguments, data: PreparedData, say: Say
) -> dict[str, PreparedData]:
    """The further validation sets by name, in the tokens of `data`.

    Raises:
        DataError: a fault in one of them, which is named.
    """
    sets = {}
    for name, own in validation_set_arguments(arguments).items():
        say_of_set = _saying(name, say)
        try:
            sets[name] = prepare_validation_set(own, data.tokenizer, say=say_of_set)
            _check_same_tokens(sets[name], data)
        except DataError as error:
            raise DataError(f"validation_sets, {name}: {error}") from error
    return sets


def _saying(name: str, say: Say) -> Say:
    return lambda line: say(f"{name}: {line}")


def _check_same_tokens(part: PreparedData, data: PreparedData) -> None:
    """Refuses a set whose token file is of other tokens than the run."""
    marks = {tokenizer_fingerprint(own.tokenizer) for own in (part, data) if own.tokenizer}
    largest = max(store.max_id for store in part.stores("validation").values())
    if len(marks) > 1 or largest >= data.vocab_size:
        raise DataError(
            f"its token file (largest id {largest:,}) was made with another tokenizer than that of"
            f" the run ({data.vocab_size:,} tokens). Make it again with that, or give the text."
        )


def _prepare_beside_stream(
    arguments: Arguments, tokenizer_source: str | None, say: Say
) -> PreparedData:
    """The tokenizer and, from validation_file, the validation data; the rest is read later."""
    if arguments.validation_file:
        own = dataclasses.replace(
            arguments, dataset_name=None, streaming=False, validation_split_percentage=0.0
        )
        return prepare_source(own, tokenizer_source=tokenizer_source, say=say)
    return _tokenizer_alone(arguments, tokenizer_source)


def _tokenizer_alone(arguments: Arguments, tokenizer_source: str | None) -> PreparedData:
    name = arguments.tokenizer_name or tokenizer_source
    load = tokenizer_loader(arguments, tokenizer_source)
    tokenizer = load_if_given(name, has_train=False, load=load) or train_tokenizer(
        "byte", (), 0, special_tokens=arguments.special_tokens
    )
    return PreparedData(
        train=None,
        validation=None,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        fingerprint=tokenizer_fingerprint(tokenizer),
        ledger=Ledger(),
    )


def _prepare_mixture(arguments: Arguments, tokenizer_source: str | None, say: Say) -> PreparedData:
    sources = mixture_sources(arguments)
    if arguments.tokenizer_name in _MADE_FROM_TEXT:
        folder = _shared_tokenizer(arguments, sources, say)
        sources = {
            name: dataclasses.replace(own, tokenizer_name=str(folder), special_tokens=[])
            for name, own in sources.items()
        }
    parts = {}
    for name, own in sources.items():
        weight = arguments.train_mixture[name]["weight"]
        part = prepare_source(
            own,
            tokenizer_source=tokenizer_source,
            say=_saying(name, say),
        )
        parts[name] = dataclasses.replace(part, weight=weight)
    tokenizers = {
        name: tokenizer_fingerprint(part.tokenizer) if part.tokenizer else None
        for name, part in parts.items()
    }
    if len(set(tokenizers.values())) > 1:
        raise DataError(
            f"train_mixture: the sources {', '.join(tokenizers)} have different tokenizers. Name"
            " one for all with tokenizer_name; token files must have been made with it."
        )
    return PreparedData(
        train=None,
        validation=None,
        tokenizer=next(iter(parts.values())).tokenizer,
        vocab_size=max(part.vocab_size for part in parts.values()),
        fingerprint=_hash({name: part.fingerprint for name, part in parts.items()}),
        ledger=Ledger(),
        parts=parts,
    )


def _shared_tokenizer(arguments: Arguments, sources: dict[str, Arguments], say: Say) -> Path:
    """The folder of the tokenizer made from the training text of all sources."""
    recipes: list[Recipe] = []
    for name, own in sources.items():
        files = list_files(own, Ledger(), lambda line: None)
        if any(is_token_file(file.path) for file in (*files[0], *files[1])):
            raise DataError(
                f"train_mixture: source {name!r} is a token file, and tokenizer_name"
                f" {arguments.tokenizer_name!r} is made from text. Name the tokenizer that made"
                " the file."
            )
        recipes.append(make_recipe(own, *files, None, say))
    cache = Path(arguments.cache_dir).expanduser()
    key = _hash([recipe.key() for recipe in recipes])[:12]
    folder = cache / f"tokenizer-{arguments.tokenizer_name}-{key}"
    with exclusive(
        cache / f".{folder.name}.lock",
        lambda: say(f"Another process is making {folder}; waiting"),
    ):
        if not folder.is_dir():
            with new_folder(folder) as temporary:
                make_tokenizer(recipes, say).save_pretrained(str(temporary))
    return folder


def _with_leakage(data: PreparedData, arguments: Arguments, say: Say) -> PreparedData:
    """The data with a report on what its validation data, each set of it, shares with training."""
    cache, train = Path(arguments.cache_dir).expanduser(), data.stores("train")
    if not train:
        return data
    sets = {}
    for name, part in data.validation_sets.items():
        mark = _hash([data.fingerprint, part.fingerprint])
        report = _leakage(train, part.stores("validation"), mark, cache, _saying(name, say))
        sets[name] = dataclasses.replace(part, leakage=report)
    data = dataclasses.replace(data, validation_sets=sets)
    if not (validation := data.stores("validation")):
        return data
    own = _leakage(train, validation, data.fingerprint, cache, say)
    return dataclasses.replace(data, leakage=own)


def _leakage(
    train: Mapping[str, TokenStore],
    validation: Mapping[str, TokenStore],
    mark: str,
    cache: Path,
    say: Say,
) -> Leakage:
    """The report on these stores, made once; `mark` changes with their tokens."""
    memory = cache / f"leakage-{mark[:12]}.json"
    with exclusive(
        cache / f".{memory.name}.lock",
        lambda: say("Another process is looking for leakage; waiting"),
    ):
        if memory.is_file():
            return Leakage(**json.loads(memory.read_text(encoding="utf-8")))
        progress = Progress(say, "Looking for validation text in training", 0)
        report = find_leakage(
            list(train.values()),
            list(validation.values()),
            lambda num_tokens: progress.update(0, num_tokens),
        )
        write_json(memory, dataclasses.asdict(report))
        return report


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
