"""How many tokens a large text will have, from a small part of it: for a plan, not for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from arguments import Arguments, mixture_sources
from llm_training.data.all_sources import prepare_data, prepare_validation_sets
from llm_training.data.ledger import Ledger
from llm_training.data.prepare import Say, is_stored, list_files, prepare_source
from llm_training.data.prepared import PreparedData
from llm_training.data.recipe import Recipe, make_recipe, make_validation_recipe
from llm_training.data.tokens.store_meta import dtype_for
from llm_training.data.tokens.token_files import is_token_file
from llm_training.data.tokens.token_store import TokenStore
from llm_training.validation_sets import validation_set_arguments

# As much text is made into tokens in some ten seconds, with a tokenizer made from it before.
MOST_BYTES = 20_000_000
SAMPLE_BYTES = 2_000_000


class DataOutlook(NamedTuple):
    """The data of a run, before it is there.

    Attributes:
        data: the stores as they are; of those in `estimated`, only the numbers of tokens are true,
            about, and nothing can be read from them.
        estimated: the sources and validation sets whose tokens are estimated ("" for the only
            source).
        num_bytes: that their stores will take.
    """

    data: PreparedData
    estimated: list[str]
    num_bytes: int


def prepare_or_estimate(
    arguments: Arguments, *, tokenizer_source: str | None = None, say: Say = print
) -> DataOutlook:
    """Takes stores that are there, makes those of small texts, and estimates large ones.

    The stores are those of the run, which need not make them again. What validation and training
    data share is not looked for.

    Raises:
        DataError: a fault in the data or its settings.
    """
    plain = dataclasses.replace(arguments, leakage_report=False)
    alone = dataclasses.replace(plain, validation_sets={})
    main = _without_validation_sets(alone, tokenizer_source, say)
    return _with_validation_sets(main, plain, say)


def _without_validation_sets(
    plain: Arguments, tokenizer_source: str | None, say: Say
) -> DataOutlook:
    recipes = {} if plain.streaming else _missing(plain, tokenizer_source)
    if sum(recipe.num_bytes() for recipe in recipes.values()) <= MOST_BYTES:
        return DataOutlook(prepare_data(plain, tokenizer_source=tokenizer_source, say=say), [], 0)
    parts = {}
    for name, own in mixture_sources(plain).items():
        if name in recipes:
            say(
                f"Tokens of {name or 'the data'}: estimated from {SAMPLE_BYTES // 10**6} MB of text"
            )
            parts[name] = _estimate(recipes[name])
        else:
            parts[name] = prepare_source(own, tokenizer_source=tokenizer_source, say=say)
    num_bytes = sum(_num_bytes(parts[name]) for name in recipes)
    return DataOutlook(_together(plain, parts), list(recipes), num_bytes)


def _with_validation_sets(outlook: DataOutlook, arguments: Arguments, say: Say) -> DataOutlook:
    data, estimated, num_bytes = outlook
    sets: dict[str, PreparedData] = {}
    for name, own in validation_set_arguments(arguments).items():
        recipe = _missing_set(own, data)
        # With a tokenizer that is only about that of the run, there is nothing to keep.
        if recipe and (outlook.estimated or recipe.num_bytes() > MOST_BYTES):
            sets[name] = _estimate(recipe)
            estimated = [*estimated, name]
            num_bytes += _num_bytes(sets[name])
        else:
            one = {name: arguments.validation_sets[name]}
            alone = dataclasses.replace(arguments, validation_sets=one)
            sets |= prepare_validation_sets(alone, data, say)
    return DataOutlook(dataclasses.replace(data, validation_sets=sets), estimated, num_bytes)


def _missing_set(own: Arguments, data: PreparedData) -> Recipe | None:
    """What the store of a validation set would be made of, where it is not there yet."""
    _, files = list_files(own, Ledger(), _say_nothing)
    if data.tokenizer is None or any(is_token_file(file.path) for file in files):
        return None
    recipe = make_validation_recipe(own, files, data.tokenizer, _say_nothing)
    return None if is_stored(recipe, own) else recipe


def _num_bytes(data: PreparedData) -> int:
    """What its stores will take on disk."""
    return sum(
        store.num_tokens * store.dtype.itemsize
        for split in ("train", "validation")
        for store in data.stores(split).values()
    )


def _missing(arguments: Arguments, tokenizer_source: str | None) -> dict[str, Recipe]:
    """What the stores that are not there yet would be made of, by the name of their source."""
    recipes = {}
    for name, own in mixture_sources(arguments).items():
        files = list_files(own, Ledger(), _say_nothing)
        if not any(is_token_file(file.path) for file in (*files[0], *files[1])):
            recipe = make_recipe(own, *files, tokenizer_source, _say_nothing)
            if not is_stored(recipe, own):
                recipes[name] = recipe
    return recipes


def _estimate(recipe: Recipe) -> PreparedData:
    """The numbers of tokens, as if all text were like its beginning."""
    texts, num_bytes = _sample(recipe)
    tokenizer = recipe.tokenizer or recipe.train_tokenizer(texts)
    lists = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    tokens_per_byte = sum(len(ids) + 1 for ids in lists) / max(1, num_bytes)
    # More text makes the vocabulary as large as was asked for.
    is_grown = recipe.tokenizer is None and recipe.tokenizer_name == "bpe"
    vocab_size = max(recipe.vocab_size, len(tokenizer)) if is_grown else len(tokenizer)

    def store(split: str, size: float) -> TokenStore | None:
        return _promised(split, round(size * tokens_per_byte), vocab_size) if size else None

    train = recipe.train.num_bytes() if recipe.train else 0
    own_validation = recipe.validation.num_bytes() if recipe.validation else 0
    return PreparedData(
        train=store("train", train * (1 - float(recipe.share))),
        validation=store("validation", own_validation or train * float(recipe.share)),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        fingerprint="estimated",
        ledger=Ledger(),
    )


def _sample(recipe: Recipe) -> tuple[list[str], int]:
    """The beginning of what is trained on, and its bytes."""
    source = recipe.train or recipe.validation
    texts: list[str] = []
    num_bytes = 0
    for document in source.documents(Ledger()) if source else ():
        text = document.text[: SAMPLE_BYTES - num_bytes]  # of a long text, the beginning
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= SAMPLE_BYTES:
            break
    return texts, num_bytes


def _promised(split: str, num_tokens: int, vocab_size: int) -> TokenStore:
    return TokenStore(
        path=Path(f"{split}.bin"),
        dtype=dtype_for(vocab_size),
        start=0,
        num_tokens=num_tokens,
        num_documents=None,
        vocab_size=vocab_size,
        max_id=vocab_size - 1,
        fingerprint="estimated",
    )


def _together(arguments: Arguments, parts: Mapping[str, PreparedData]) -> PreparedData:
    if not arguments.train_mixture:
        return parts[""]
    weights = {name: float(arguments.train_mixture[name]["weight"]) for name in parts}
    return PreparedData(
        train=None,
        validation=None,
        tokenizer=next(iter(parts.values())).tokenizer,
        vocab_size=max(part.vocab_size for part in parts.values()),
        fingerprint="estimated",
        ledger=Ledger(),
        parts={n: dataclasses.replace(part, weight=weights[n]) for n, part in parts.items()},
    )


def _say_nothing(line: str) -> None:
    """Takes what is said again when the data is prepared."""
