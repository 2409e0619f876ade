"""A source without its short and its repeated documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_training.data.documents.sources import Document, Source
from llm_training.data.ledger import Ledger

DUPLICATES = "duplicates"


@dataclass(frozen=True)
class FilteredSource:
    """The documents of a source that are long enough, each text once; the others are counted.

    Repeated are documents whose whole text is equal to that of an earlier one; as they are left
    out before any split, no validation document is a training document of the same source. This
    remembers 16 bytes of each document, which take about 100 bytes of memory. A document in pieces
    is exempt: it is neither looked up nor remembered.

    Attributes:
        min_document_characters: shorter documents are left out; 0 and 1 leave out none.
        drop_duplicates: whether repeated documents are left out.
    """

    source: Source
    min_document_characters: int = 0
    drop_duplicates: bool = False

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents that are left, in their order."""
        seen: set[bytes] = set()
        # Of the document that is being left out, which may be in pieces.
        num_bytes = 0
        for document in self.source.documents(ledger):
            reason = self._reason_against(document, seen)
            if reason is None:
                yield document
            else:
                num_bytes += document.num_bytes
                if document.is_last:
                    ledger.leave_out(reason, document.where, num_bytes)
                    num_bytes = 0

    def _reason_against(self, document: Document, seen: set[bytes]) -> str | None:
        """Why it is left out; None, and remembered, where it is not."""
        if (document.num_characters or len(document.text)) < self.min_document_characters:
            return f"documents under {self.min_document_characters:,} characters"
        if not self.drop_duplicates or document.num_characters is not None:
            return None
        digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            return DUPLICATES
        seen.add(digest)
        return None

    def key(self) -> Any:
        return {
            "source": self.source.key(),
            "min_document_characters": self.min_document_characters,
            "drop_duplicates": self.drop_duplicates,
        }

    def num_bytes(self) -> int:
        return self.source.num_bytes()
