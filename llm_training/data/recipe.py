"""All that decides the tokens: where the text comes from, how it is split, which tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

from llm_training.data.errors import DataError
from llm_training.data.hub_datasets import load_hub_dataset
from llm_training.data.ledger import Ledger
from llm_training.data.sources import Source, SourceFile, TextFiles
from llm_training.data.split import (
    TRAIN,
    VALIDATION,
    Part,
    documents_needed,
    split_whole,
    split_within,
    validation_share,
)
from llm_training.data.token_store import FORMAT_VERSION
from llm_training.data.tokenizers import TRAINED_KINDS, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arguments import DataArguments

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """All that decides the tokens.

    Attributes:
        train, validation: where the documents come from.
        share: of the training documents kept for validation; 0 where that has its own.
        tokenizer_name: as it was asked for.
        tokenizer: the loaded one; None where it is still to be made from the training data.
        vocab_size: of a tokenizer to be made.
    """

    train: Source | None
    validation: Source | None
    share: Fraction
    tokenizer_name: str
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int

    def key(self) -> str:
        """Hash of everything that decides the tokens, without reading the text."""
        loaded = self.tokenizer and tokenizer_fingerprint(self.tokenizer)
        return _hash(
            {
                "format": FORMAT_VERSION,
                "tokenizers": version("tokenizers"),
                "train": self.train and self.train.key(),
                "validation": self.validation and self.validation.key(),
                "share": str(self.share),
                "tokenizer": loaded or self.tokenizer_name,
                # Only bpe has a size to choose.
                "vocab_size": self.vocab_size if self.tokenizer_name == "bpe" else None,
            }
        )

    def num_bytes(self) -> int:
        return sum(source.num_bytes() for source in (self.train, self.validation) if source)

    def splits(self) -> list[str]:
        """The splits it gives."""
        has_validation = self.validation is not None or self.share > 0
        return [TRAIN] * (self.train is not None) + [VALIDATION] * has_validation

    def is_split_within(self) -> bool:
        """Whether there are too few documents for whole ones; reads no more than it must."""
        if not self.share or self.train is None:
            return False
        needed = documents_needed(self.share)
        return sum(1 for _ in islice(self.train.documents(Ledger()), needed)) < needed

    def train_parts(self, ledger: Ledger, *, within: bool) -> Iterator[Part]:
        """The training source, divided into its two splits."""
        documents = self.train.documents(ledger) if self.train else iter(())
        return split_within(documents, self.share) if within else split_whole(documents, self.share)

    def parts(self, ledger: Ledger, *, within: bool) -> Iterator[Part]:
        """Every document of every source; `ledger` counts those left out."""
        yield from self.train_parts(ledger, within=within)
        if self.validation:
            for document in self.validation.documents(ledger):
                yield Part(VALIDATION, document)


def make_recipe(
    arguments: DataArguments,
    train_files: list[SourceFile],
    validation_files: list[SourceFile],
    tokenizer_source: str | None,
    say: Say,
) -> Recipe:
    def text_files(files: list[SourceFile]) -> Source | None:
        if not files:
            return None
        return TextFiles(files, arguments.text_column, arguments.skip_bad_files)

    share = validation_share(arguments.validation_split_percentage)
    train, validation = text_files(train_files), text_files(validation_files)
    if arguments.dataset_name:
        say(f"Loading dataset {arguments.dataset_name}")
        train, own_validation = load_hub_dataset(
            arguments.dataset_name, arguments.dataset_config_name, arguments.text_column
        )
        # A percentage of 0 asks for no validation, unless a file is named for it.
        validation = validation or (own_validation if share else None)
    name = arguments.tokenizer_name or tokenizer_source
    return Recipe(
        train=train,
        validation=validation,
        share=Fraction(0) if validation else share,
        tokenizer_name=name or "",
        tokenizer=_load_if_given(name, has_train=train is not None),
        vocab_size=arguments.vocab_size,
    )


def _load_if_given(name: str | None, *, has_train: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that name; None for a kind that is made from the training data."""
    if name is None:
        raise DataError(
            "There is no tokenizer. Set tokenizer_name to a local folder, a hub id, or char, byte"
            " or bpe to make one from the training data; or give model_name_or_path."
        )
    if name not in TRAINED_KINDS:
        return load_tokenizer(name)
    if not has_train and name != "byte":
        raise DataError(
            f"tokenizer_name {name!r} is made from training data, and there is none. Name the"
            " tokenizer that the model was trained with."
        )
    return None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
