"""What becomes of every token of a store once it stands in rows; the sums are exact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class RowAccount:
    """Every token of a store under exactly one heading.

    Attributes:
        rows: how many rows they make.
        tokens: all tokens of the store.
        predicted: tokens that the loss is computed on in one epoch.
        row_starts: the first tokens of rows, which nothing stands before.
        document_starts: under a document mask, the first tokens of further documents in a row.
        not_learned: tokens of conversations that are only read.
        truncated: tokens of conversations beyond a row.
        dropped: tokens of rows, or of conversations within a row, in which nothing is learned.
        leftover: tokens at the end of the stream that fill no row.
        padding: places in rows that no token stands in; no part of the sum, nor are the following.
        cut_conversations: conversations that the end of a row cuts.
        learned_lost: tokens that would be learned among `truncated`.
        dropped_conversations: conversations of which `dropped` holds all that is in a row.
    """

    rows: int = 0
    tokens: int = 0
    predicted: int = 0
    row_starts: int = 0
    document_starts: int = 0
    not_learned: int = 0
    truncated: int = 0
    dropped: int = 0
    leftover: int = 0
    padding: int = 0
    cut_conversations: int = 0
    learned_lost: int = 0
    dropped_conversations: int = 0

    @property
    def lost(self) -> dict[str, int]:
        """Tokens that are not predicted, by the reason for it in words; none that is 0."""
        reasons = {
            "first in a row": self.row_starts,
            "first in a document": self.document_starts,
            "read but not learned": self.not_learned,
            "truncated": self.truncated,
            "where nothing of a row is learned": self.dropped,
            "left over": self.leftover,
        }
        return {reason: count for reason, count in reasons.items() if count}

    def balanced(self) -> RowAccount:
        """The account with `predicted` set to all that is not lost."""
        return dataclasses.replace(self, predicted=self.tokens - sum(self.lost.values()))

    def line(self) -> str:
        """The account for a person."""
        parts = [f"{self.predicted:,} predicted"]
        parts += [f"{count:,} {reason}" for reason, count in self.lost.items()]
        remarks = [f"{self.padding:,} places are padding"] if self.padding else []
        if self.cut_conversations:
            lost = f", {self.learned_lost:,} tokens to be learned are lost by it"
            remarks.append(
                f"{self.cut_conversations:,} conversations are cut at the end of a row"
                f"{lost if self.learned_lost else ''}"
            )
        if self.dropped_conversations:
            remarks.append(
                f"{self.dropped_conversations:,} conversations are left out, with nothing to be"
                " learned within a row"
            )
        return "; ".join([f"{self.tokens:,} tokens = {' + '.join(parts)}", *remarks])
