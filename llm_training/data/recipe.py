"""All that decides the tokens: where the text comes from, how it is split, which tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from arguments import Arguments, holds_conversations
from llm_training.data.documents.chat import Conversations
from llm_training.data.documents.chat_templates import load_chat_template
from llm_training.data.documents.filtered import FilteredSource
from llm_training.data.documents.formats import DocumentFormat, PlainText
from llm_training.data.documents.hub_datasets import load_hub_dataset
from llm_training.data.documents.sources import Source, SourceFile, TextFiles
from llm_training.data.documents.split import (
    TRAIN,
    VALIDATION,
    Part,
    Split,
    count_documents,
    documents_needed,
    share_of_few,
    validation_share,
)
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger
from llm_training.data.tokens.store_meta import FORMAT_VERSION
from llm_training.data.tokens.tokenizers import (
    TRAINED_KINDS,
    TrainedKind,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

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
        vocab_size, min_frequency: of a tokenizer to be made.
        special_tokens: of a tokenizer to be made; a loaded one has them by now.
        holds_conversations: whether the documents are conversations.
    """

    train: Source | None
    validation: Source | None
    share: Fraction
    tokenizer_name: str
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    min_frequency: int = 0
    special_tokens: tuple[str, ...] = ()
    holds_conversations: bool = False

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
                **self.tokenizer_key(),
            }
        )

    def tokenizer_key(self) -> dict[str, Any]:
        """What decides a tokenizer that is made from the data, beside the data."""
        if self.tokenizer is not None:
            return {}
        key: dict[str, Any] = {"special_tokens": self.special_tokens}
        if self.tokenizer_name == "bpe":
            key |= {"vocab_size": self.vocab_size, "min_frequency": self.min_frequency}
        return key

    def train_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Makes the tokenizer that this recipe asks for."""
        return train_tokenizer(
            cast(TrainedKind, self.tokenizer_name),
            texts,
            self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=self.special_tokens,
        )

    def num_bytes(self) -> int:
        return sum(source.num_bytes() for source in (self.train, self.validation) if source)

    def splits(self) -> list[str]:
        """The splits it gives."""
        has_validation = self.validation is not None or self.share > 0
        return [TRAIN] * (self.train is not None) + [VALIDATION] * has_validation

    def split(self) -> Split:
        """How the training source is divided; reads no more of it than it must.

        Where there are too few documents for whole ones, each is cut in two. Conversations stay
        whole however few they are.
        """
        if not self.share or self.train is None:
            return Split(self.share)
        needed = documents_needed(self.share)
        found = count_documents(self.train.documents(Ledger()), needed)
        if self.holds_conversations:
            return Split(share_of_few(found, self.share))
        return Split(self.share, within=found < needed)

    def train_parts(self, ledger: Ledger, split: Split) -> Iterator[Part]:
        """The training source, divided into its two splits."""
        return split.parts(self.train.documents(ledger) if self.train else ())

    def parts(self, ledger: Ledger, split: Split) -> Iterator[Part]:
        """Every document of every source; `ledger` counts those left out."""
        yield from self.train_parts(ledger, split)
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
    """Everything that decides the tokens of these settings; loads the tokenizer and the dataset.

    Raises:
        DataError: the tokenizer or the dataset cannot be had, or do not fit each other.
    """
    share = validation_share(arguments.validation_split_percentage)
    name = arguments.tokenizer_name or tokenizer_source
    has_train = bool(train_files or arguments.dataset_name)
    tokenizer = load_if_given(
        name, has_train=has_train, load=tokenizer_loader(arguments, tokenizer_source)
    )
    document_format = make_format(arguments, tokenizer)
    train: Source | None
    validation: Source | None
    train, validation = (
        _text_files(files, arguments, document_format) if files else None
        for files in (train_files, validation_files)
    )
    if arguments.dataset_name:
        say(f"Loading dataset {arguments.dataset_name}")
        train, own_validation = load_hub_dataset(
            arguments.dataset_name,
            arguments.dataset_config_name,
            split=arguments.dataset_split,
            validation_split=arguments.dataset_validation_split,
            revision=arguments.dataset_revision,
            document_format=document_format,
            skip_bad_documents=arguments.skip_bad_documents,
        )
        # A percentage of 0 asks for no validation, unless a file or split is named for it.
        is_wanted = share or arguments.dataset_validation_split
        validation = validation or (own_validation if is_wanted else None)
    return Recipe(
        train=_filtered(train, arguments),
        validation=_filtered(validation, arguments),
        share=Fraction(0) if validation else share,
        tokenizer_name=name or "",
        tokenizer=tokenizer,
        vocab_size=arguments.vocab_size,
        min_frequency=arguments.bpe_min_frequency,
        special_tokens=tuple(arguments.special_tokens),
        holds_conversations=document_format.gives_conversations,
    )


def make_validation_recipe(
    arguments: DataArguments,
    files: list[SourceFile],
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
) -> Recipe:
    """Everything that decides the tokens of a further validation set; loads its dataset.

    Args:
        arguments: its own; a dataset gives the split that is named for validation.
        files: what its validation_file names; none: it is of a dataset.
        tokenizer: that of the run.

    Raises:
        DataError: the dataset cannot be had, or the tokenizer knows no conversations.
    """
    document_format = make_format(arguments, tokenizer)
    validation: Source
    if files:
        validation = _text_files(files, arguments, document_format)
    else:
        say(f"Loading dataset {arguments.dataset_name}")
        validation, _ = load_hub_dataset(
            str(arguments.dataset_name),
            arguments.dataset_config_name,
            split=arguments.dataset_validation_split or VALIDATION,
            revision=arguments.dataset_revision,
            document_format=document_format,
            skip_bad_documents=arguments.skip_bad_documents,
        )
    return Recipe(
        train=None,
        validation=_filtered(validation, arguments),
        share=Fraction(0),
        tokenizer_name=str(tokenizer.name_or_path),
        tokenizer=tokenizer,
        vocab_size=arguments.vocab_size,
        holds_conversations=document_format.gives_conversations,
    )


def _text_files(
    files: list[SourceFile], arguments: DataArguments, document_format: DocumentFormat
) -> TextFiles:
    return TextFiles(
        files,
        document_format,
        document_separator=arguments.document_separator,
        skip_bad_files=arguments.skip_bad_files,
        skip_bad_documents=arguments.skip_bad_documents,
    )


def make_format(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase | None
) -> DocumentFormat:
    """How the rows of the data become documents: as text, or as conversations."""
    if not holds_conversations(arguments):
        return PlainText(arguments.text_column)
    if tokenizer is None:
        raise DataError(
            "Conversations need a tokenizer that knows their turns: name one with tokenizer_name"
            " (a folder or hub id); char, byte and bpe have none."
        )
    return Conversations(
        tokenizer,
        messages_column=arguments.messages_column,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        chat_template=load_chat_template(arguments.chat_template),
    )


def _filtered(source: Source | None, arguments: DataArguments) -> Source | None:
    if source is None or not (arguments.min_document_characters or arguments.drop_duplicates):
        return source
    return FilteredSource(
        source,
        min_document_characters=arguments.min_document_characters,
        drop_duplicates=arguments.drop_duplicates,
    )


def tokenizer_loader(
    arguments: DataArguments, source: str | None
) -> Callable[[str], PreTrainedTokenizerBase]:
    """Opens tokenizers as the arguments have them.

    That of the model is of the model's revision; each gets the special tokens asked for, and none
    brings code along that may run unasked.

    Args:
        source: the model, whose tokenizer may be opened by its name.
    """
    revision, is_trusted = None, False
    if isinstance(arguments, Arguments):  # else the data alone is spoken of
        revision, is_trusted = arguments.model_revision, arguments.trust_remote_code

    def load(name: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(
            name,
            revision=revision if name == source else None,
            trust_remote_code=is_trusted,
            special_tokens=arguments.special_tokens,
        )

    return load


def load_if_given(
    name: str | None, *, has_train: bool, load: Callable[[str], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that name; None for a kind that is made here, from training data or not.

    Args:
        load: `tokenizer_loader` of the settings.

    Raises:
        DataError: it cannot be loaded, or is made from training data, and there is none.
    """
    if name is None:
        raise DataError(
            "There is no tokenizer. Set tokenizer_name to a local folder, a hub id, or char, byte"
            " or bpe to make one from the training data; or give model_name_or_path."
        )
    if name not in TRAINED_KINDS:
        return load(name)
    if not has_train and name != "byte":
        raise DataError(
            f"tokenizer_name {name!r} is made from training data, and there is none. Name the"
            " tokenizer that the model was trained with."
        )
    return None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
