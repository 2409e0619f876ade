"""Where the documents come from: which files an entry names, and the documents in them."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llm_training.data.documents.compressed import is_compressed
from llm_training.data.documents.formats import DocumentFormat
from llm_training.data.documents.readers import TABLE_SUFFIXES, FileKind, kind_of, read_rows
from llm_training.data.documents.table_rows import NO_TEXT, BadRow, Row
from llm_training.data.documents.text_files import UnreadableFile
from llm_training.data.documents.text_pieces import Separator, TextPiece, read_texts
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger

EMPTY_DOCUMENT = "empty documents"
HALF_PAIR = "texts with half of a surrogate pair"
# Only for the progress and the check of free space.
_TEXT_PER_PACKED_BYTE = 4
# What the datasets library writes beside its .arrow files; they hold no rows.
_DATASET_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "state.json")


class Document(NamedTuple):
    """One text, or a piece of one that is too long to be held whole.

    Attributes:
        text: never empty.
        num_bytes: its length in UTF-8.
        file: the file it came from; None for a row of a hub dataset.
        where: names it in messages: path and line, dataset and row.
        is_last: whether the document ends here; pieces of one document follow each other.
        learned: conversations alone: the parts [start, stop) of `text`, in characters, that are
            learned. They write out their own special tokens, the last end-of-text included.
        num_characters: of the whole document, before any split, where this is a piece of it.
    """

    text: str
    num_bytes: int
    file: str | None
    where: str
    is_last: bool = True
    learned: tuple[tuple[int, int], ...] | None = None
    num_characters: int | None = None


class Source(Protocol):
    """Documents in a fixed order, which can be gone through again and again."""

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents, read as they are asked for; `ledger` counts those left out."""

    def key(self) -> Any:
        """Plain values that change when the documents may have changed."""

    def num_bytes(self) -> int:
        """Rough size of the text."""


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was listed.

    Attributes:
        path: where it is.
        name: its path below the entry that it was found by.
        kind: how it is read.
        is_named: an entry is this very file, rather than a folder or glob around it.
        num_bytes, mtime_ns: its size and its time of change.
        identity: the same for every path and link to this file.
    """

    path: Path
    name: str
    kind: FileKind
    is_named: bool
    num_bytes: int
    mtime_ns: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class TextFiles:
    """The documents of a list of files; memory is bounded by the longest row of a table.

    A text file above some MB is given in pieces.

    Attributes:
        document_format: makes the rows of tables into documents; text files are text as they are.
        document_separator: what parts text files into documents, see `read_texts`.
        skip_bad_files: leave out unreadable files that were not named themselves.
        skip_bad_documents: leave out rows that cannot be read or hold no document.

    Raises:
        DataError: there is a text file, and the format is one for conversations.
    """

    files: Sequence[SourceFile]
    document_format: DocumentFormat
    document_separator: Separator = "file"
    skip_bad_files: bool = False
    skip_bad_documents: bool = False

    def __post_init__(self) -> None:
        if not self.document_format.gives_conversations:
            return
        if texts := [file.path for file in self.files if file.kind == "text"]:
            raise DataError(
                f"{texts[0]} is a text file, without the columns of conversations"
                f" ({', '.join(self.document_format.columns)}). Those are read from"
                f" {TABLE_SUFFIXES} files and from datasets: leave this file out with"
                " exclude_files, or set text_column in place of the columns of conversations."
            )

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents, file by file.

        Raises:
            DataError: a file or a row cannot be read, or a file changed since it was listed.
        """
        for file in self.files:
            try:
                yield from self._documents_of(file, ledger)
            except UnreadableFile as fault:
                if file.is_named or not self.skip_bad_files:
                    raise DataError(_unreadable_message(file, fault)) from None
                ledger.leave_out(fault.reason, file.name)
            except OSError as error:
                raise DataError(
                    f"{file.path} cannot be read: {error.strerror or error}. Check that it is still"
                    " there and that you may read it."
                ) from None
            except UnicodeDecodeError:
                # It was text when it was checked.
                _check_unchanged(file)
                raise
            _check_unchanged(file)

    def _documents_of(self, file: SourceFile, ledger: Ledger) -> Iterator[Document]:
        if file.kind == "text":
            return documents_of_texts(
                read_texts(file.path, self.document_separator), file=str(file.path), ledger=ledger
            )
        return documents_of_rows(
            read_rows(file.path, file.kind, self.document_format.columns),
            self.document_format,
            file=str(file.path),
            skip_bad_documents=self.skip_bad_documents,
            ledger=ledger,
        )

    def key(self) -> Any:
        return {
            "files": [(file.name, file.kind, file.num_bytes, file.mtime_ns) for file in self.files],
            "format": self.document_format.key(),
            "skip": [self.skip_bad_files, self.skip_bad_documents],
            "separator": self.document_separator,
        }

    def num_bytes(self) -> int:
        return sum(
            file.num_bytes * (_TEXT_PER_PACKED_BYTE if is_compressed(file.path) else 1)
            for file in self.files
        )


def documents_of_texts(
    pieces: Iterable[TextPiece], *, file: str, ledger: Ledger
) -> Iterator[Document]:
    """The documents of a text file; `ledger` counts the empty ones, which are left out."""
    for where, text, is_last, num_characters in pieces:
        if text:
            yield Document(
                text, utf8_length(text, where), file, where, is_last, num_characters=num_characters
            )
        else:
            ledger.leave_out(EMPTY_DOCUMENT, where)


def documents_of_rows(
    rows: Iterable[Row],
    document_format: DocumentFormat,
    *,
    file: str | None,
    skip_bad_documents: bool,
    ledger: Ledger,
) -> Iterator[Document]:
    """The documents of the rows of a table; `ledger` counts those left out.

    Raises:
        DataError: a row is bad, or holds no document, and bad ones are not skipped.
    """
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            text, learned = document_format.render(row, where)
            num_bytes = utf8_length(text, where)
        except DataError as error:
            if not skip_bad_documents:
                raise
            ledger.leave_out(error.reason if isinstance(error, BadRow) else NO_TEXT, where)
            continue
        if text:
            yield Document(text, num_bytes, file, where, learned=learned)
        else:
            ledger.leave_out(EMPTY_DOCUMENT, where)


def utf8_length(text: str, where: str) -> int:
    """Bytes of `text` in UTF-8; raises BadRow for half a surrogate pair, which has none."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRow(
            HALF_PAIR,
            f"{where}: character {error.start:,} is half of a surrogate pair"
            f" ({text[error.start]!r}), which is no text. Mend or remove this document, or leave"
            " such ones out with skip_bad_documents.",
        ) from None


def _check_unchanged(file: SourceFile) -> None:
    # The cache is filed under the size and time of the listing; other content must not go there.
    now = file.path.stat()
    if (now.st_size, now.st_mtime_ns) != (file.num_bytes, file.mtime_ns):
        raise DataError(
            f"{file.path} changed while it was being read. Start again when nothing writes to it."
        )


def _unreadable_message(file: SourceFile, fault: UnreadableFile) -> str:
    if file.is_named:
        return f"{file.path} {fault.detail}. Give another file, or convert this one to UTF-8 text."
    return (
        f"{file.path} {fault.detail}. Set skip_bad_files to leave out every such file (they are"
        " counted and named), or leave this one out with exclude_files."
    )


def find_files(
    entries: Iterable[str], exclude: Sequence[str], ledger: Ledger, *, argument: str
) -> list[SourceFile]:
    """The files that entries name: each once, in the order of the entries, then by path.

    Args:
        entries: files, folders (taken whole) and globs (`**` crosses folders; a folder that a glob
            matches is taken whole); `~` is the home folder.
        exclude: patterns of absolute paths or of names that folders and globs leave out.
        ledger: counts what folders and globs hold and is not taken.
        argument: name of the setting, for messages.

    Raises:
        DataError: an entry names nothing, or nothing is left of it.
    """
    found: dict[tuple[int, int], SourceFile] = {}
    for entry in entries:
        path = Path(os.path.abspath(Path(entry).expanduser()))
        if path.is_file():
            files = [_describe(path, path.name, kind_of(path) or "text", is_named=True)]
        else:
            ignored_here = Ledger()
            candidates = _candidates(entry, str(path), argument)
            files = list(_readable_files(candidates, exclude, ignored_here))
            if not files:
                raise DataError(_nothing_left_message(entry, ignored_here, argument))
            ledger.merge_ignored(ignored_here)
        for file in files:
            found.setdefault(file.identity, file)
    return list(found.values())


def _candidates(entry: str, path: str, argument: str) -> list[tuple[str, str]]:
    """(file, its path below the entry) for all that a folder or glob holds, sorted.

    Strings, not Path objects: those take seconds for the tens of thousands of files of a folder.
    """
    base, matches = path, []
    if os.path.isdir(path):
        matches = [path]
    elif glob.has_magic(path):
        base = fixed_part(path)
        matches = glob.glob(path, recursive=True, include_hidden=True)
    if not matches:
        what = "matches nothing" if glob.has_magic(path) else "does not exist"
        raise DataError(
            f"{argument}: {entry!r} {what} (looked from {Path.cwd()})."
            " Check the spelling; relative paths start at the folder you launch from."
        )
    files = {file for match in matches for file in _files_below(match)}
    return [(file, file[len(base) :].lstrip("/")) for file in sorted(files)]


def fixed_part(pattern: str) -> str:
    """The folder that a glob starts from: its parts before the first wildcard."""
    parts = Path(pattern).parts
    return str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))


def _files_below(top: str) -> Iterator[str]:
    if not os.path.isdir(top):
        yield top
        return
    visited = set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        # A link to a folder above would go round for ever.
        status = os.stat(folder)
        if (identity := (status.st_dev, status.st_ino)) in visited:
            subfolders.clear()
            continue
        visited.add(identity)
        yield from (os.path.join(folder, name) for name in names)


def _readable_files(
    candidates: list[tuple[str, str]], exclude: Sequence[str], ledger: Ledger
) -> Iterator[SourceFile]:
    has_arrow = any(kind_of(path) == "arrow" for path, _ in candidates)
    for path, below in candidates:
        kind = kind_of(path)
        if "/." in f"/{below}" or "/__pycache__/" in f"/{below}":
            ledger.ignore_file("files in __pycache__, or hidden", below)
        elif any(fnmatch(path, p) or fnmatch(os.path.basename(path), p) for p in exclude):
            ledger.ignore_file("files that exclude_files matches", below)
        elif kind == "bin":
            ledger.ignore_file("token files (.bin, .npy), which must be named themselves", below)
        elif has_arrow and os.path.basename(path) in _DATASET_DESCRIPTIONS:
            ledger.ignore_file("descriptions of the datasets library, without rows", below)
        elif kind is None:
            ledger.ignore_file("files without a known text suffix", below)
        elif not os.path.isfile(path):
            ledger.ignore_file("broken links or special files", below)
        else:
            yield _describe(Path(path), below, kind, is_named=False)


def _describe(path: Path, name: str, kind: FileKind, *, is_named: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(
        path=path,
        name=name,
        kind=kind,
        is_named=is_named,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        identity=(status.st_dev, status.st_ino),
    )


def _nothing_left_message(entry: str, ledger: Ledger, argument: str) -> str:
    reasons = "; ".join(ledger.lines()) or "it is an empty folder"
    return (
        f"{argument}: no file to read in {entry!r}: {reasons}. Name a file itself to read it as"
        " text whatever its suffix, or change the entry or exclude_files."
    )
