"""What the preparation of data hands to the training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_training.data.leakage import Leakage
from llm_training.data.ledger import Ledger
from llm_training.data.tokens.token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """Data that is ready to be trained on: one source, or a mixture of several.

    Attributes:
        train: None where there is no training data (evaluation alone), and in a mixture.
        validation: None where validation_split_percentage is 0 and there is no validation_file,
            and in a mixture.
        tokenizer: None only for token files without a tokenizer.
        vocab_size: every id is below this.
        fingerprint: changes if, and only if, the tokens or the tokenizer do.
        ledger: what became of every document.
        leakage: what training and validation data share, where that was looked for.
        parts: of a mixture, its sources by name.
        weight: of a source in a mixture.
        validation_sets: further data to validate on, by name; it is in none of the above.
    """

    train: TokenStore | None
    validation: TokenStore | None
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    fingerprint: str
    ledger: Ledger
    leakage: Leakage | None = None
    parts: Mapping[str, PreparedData] = field(default_factory=dict)
    weight: float = 1.0
    validation_sets: Mapping[str, PreparedData] = field(default_factory=dict)

    def stores(self, split: str) -> dict[str, TokenStore]:
        """The token stores of a split, by the name of their source; of a single source ""."""
        return {name: store for name, of, store in self._stores() if of == split}

    def _stores(self) -> Iterator[tuple[str, str, TokenStore]]:
        for name, part in (self.parts or {"": self}).items():
            for split, store in (("train", part.train), ("validation", part.validation)):
                if store is not None:
                    yield name, split, store

    def num_tokens(self, split: str) -> int:
        """Tokens of all stores of a split."""
        return sum(store.num_tokens for store in self.stores(split).values())

    def lines(self) -> list[str]:
        """The ledgers for a person."""
        lines = self.ledger.lines() + _named_lines(self.parts)
        lines += [self.leakage.line()] if self.leakage else []
        return lines + _named_lines(self.validation_sets)


def _named_lines(parts: Mapping[str, PreparedData]) -> list[str]:
    return [f"{name}: {line}" for name, part in parts.items() for line in part.lines()]


def content_fingerprint(train: str | None, validation: str | None, tokenizer: str | None) -> str:
    """One fingerprint of those of both token files and of the tokenizer."""
    return hashlib.sha256(f"{train} {validation} {tokenizer}".encode()).hexdigest()
