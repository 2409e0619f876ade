"""What became of every document: used for training, for validation, or left out, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

NAMES_KEPT = 5


@dataclass
class SplitCounts:
    """What one split holds.

    Attributes:
        files: Files that at least one of its documents came from; 0 for a hub dataset.
        documents: Documents, or parts of documents where documents were cut in two.
        bytes: UTF-8 bytes of their text.
        tokens: Tokens, the end-of-text token after each document included.
    """

    files: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass
class LeftOut:
    """How many were left out for one reason, their bytes, and the names of the first few."""

    count: int = 0
    bytes: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, num_bytes: int = 0) -> None:
        self.count += 1
        self.bytes += num_bytes
        if len(self.names) < NAMES_KEPT:
            self.names.append(name)


@dataclass
class Ledger:
    """The account of one preparation; its sums are exact.

    Attributes:
        splits: What was used, by split: `train`, `validation`.
        left_out: Documents that were met and not used, by reason. A whole file that cannot be
            read counts as one.
        ignored_files: Files and folders that the listing did not take, by reason.
        documents_cut: Documents that were cut in two, and so count once in each split.
        documents_cut_unsure: Documents so long that they were cut for the tokenizer at places
            where another token might have reached over the cut.
    """

    splits: dict[str, SplitCounts] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    ignored_files: dict[str, LeftOut] = field(default_factory=dict)
    documents_cut: int = 0
    documents_cut_unsure: int = 0

    @property
    def documents_seen(self) -> int:
        """Documents met: all in a split and all left out, a document cut in two once."""
        used = sum(split.documents for split in self.splits.values())
        left_out = sum(entry.count for entry in self.left_out.values())
        return used - self.documents_cut + left_out

    @property
    def bytes_seen(self) -> int:
        """UTF-8 bytes of all documents met, used or left out."""
        used = sum(split.bytes for split in self.splits.values())
        return used + sum(entry.bytes for entry in self.left_out.values())

    def use(
        self,
        split: str,
        *,
        num_bytes: int,
        num_tokens: int,
        is_new_file: bool,
        is_last: bool = True,
    ) -> None:
        """Counts one document, one part of one or (not `is_last`) a piece into a split."""
        counts = self.splits.setdefault(split, SplitCounts())
        counts.files += is_new_file
        counts.documents += is_last
        counts.bytes += num_bytes
        counts.tokens += num_tokens

    def leave_out(self, reason: str, name: str, num_bytes: int = 0) -> None:
        """Counts one document (or one unreadable file) as not used."""
        self.left_out.setdefault(reason, LeftOut()).add(name, num_bytes)

    def ignore_file(self, reason: str, name: str) -> None:
        """Counts one file or folder as not taken by the listing."""
        self.ignored_files.setdefault(reason, LeftOut()).add(name)

    def merge_ignored(self, other: Ledger) -> None:
        """Adds the files that another ledger's listing did not take."""
        for reason, entry in other.ignored_files.items():
            mine = self.ignored_files.setdefault(reason, LeftOut())
            mine.count += entry.count
            mine.names = (mine.names + entry.names)[:NAMES_KEPT]

    def lines(self) -> list[str]:
        """The account as text, one line for each split and each reason."""
        lines = [_split_line(name, split) for name, split in self.splits.items()]
        if self.documents_cut:
            lines.append(
                f"{self.documents_cut:,} documents were cut in two, a part for each split,"
                " because there are too few for whole ones"
            )
        if self.documents_cut_unsure:
            lines.append(
                f"{self.documents_cut_unsure:,} long documents were cut for the tokenizer, at line"
                " ends where there are any: a token may differ at each cut"
            )
        lines += _left_out_lines("left out", self.left_out)
        lines += _left_out_lines("not read", self.ignored_files)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The ledger in plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        """The inverse of `to_dict`."""
        return cls(
            splits={name: SplitCounts(**split) for name, split in values["splits"].items()},
            left_out={reason: LeftOut(**entry) for reason, entry in values["left_out"].items()},
            ignored_files={
                reason: LeftOut(**entry) for reason, entry in values["ignored_files"].items()
            },
            documents_cut=values["documents_cut"],
            documents_cut_unsure=values["documents_cut_unsure"],
        )


def _split_line(name: str, split: SplitCounts) -> str:
    # A token file that another program wrote has no documents or bytes that we know of.
    counts = [
        f"{split.documents:,} documents" if split.documents else "",
        f"{split.files:,} files" if split.files else "",
        f"{split.bytes / 1e6:,.2f} MB of text" if split.bytes else "",
        f"{split.tokens:,} tokens",
    ]
    return f"{name}: " + ", ".join(count for count in counts if count)


def _left_out_lines(verb: str, entries: dict[str, LeftOut]) -> list[str]:
    lines = []
    for reason, entry in sorted(entries.items()):
        names = ", ".join(entry.names) + (", ..." if entry.count > len(entry.names) else "")
        size = f", {entry.bytes:,} bytes" if entry.bytes else ""
        lines.append(f"{verb}: {entry.count:,} {reason}{size} ({names})")
    return lines
