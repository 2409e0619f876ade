"""What the preparation of data hands to the training loop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_training.data.ledger import Ledger
from llm_training.data.token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """Data that is ready to be trained on.

    Attributes:
        train: None only where there is no training data (evaluation alone).
        validation: None where validation_split_percentage is 0 and there is no validation_file.
        tokenizer: None only for .bin data without a tokenizer.
        vocab_size: every id is below this.
        fingerprint: changes if, and only if, the tokens or the tokenizer do.
        ledger: what became of every document.
    """

    train: TokenStore | None
    validation: TokenStore | None
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    fingerprint: str
    ledger: Ledger


def content_fingerprint(train: str | None, validation: str | None, tokenizer: str | None) -> str:
    """One fingerprint of those of both token files and of the tokenizer."""
    return hashlib.sha256(f"{train} {validation} {tokenizer}".encode()).hexdigest()
