"""Where the documents come from: which files an entry names, and the documents in them."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger
from llm_training.data.readers import FileKind, UnreadableFile, kind_of, read_texts

EMPTY_DOCUMENT = "empty documents"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: never empty.
        num_bytes: its length in UTF-8.
        file: the file it came from; None for a row of a hub dataset.
    """

    text: str
    num_bytes: int
    file: str | None


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
    """The documents of a list of files; memory is bounded by the largest text file.

    Attributes:
        skip_bad_files: leave out unreadable files that were not named themselves.
    """

    files: Sequence[SourceFile]
    text_column: str
    skip_bad_files: bool

    def documents(self, ledger: Ledger) -> Iterator[Document]:
        """The documents, file by file.

        Raises:
            DataError: a file cannot be read, or changed since it was listed.
        """
        for file in self.files:
            try:
                for where, text in read_texts(file.path, file.kind, self.text_column):
                    if text:
                        yield Document(text, utf8_length(text, where), str(file.path))
                    else:
                        ledger.leave_out(EMPTY_DOCUMENT, where)
            except UnreadableFile as fault:
                if file.is_named or not self.skip_bad_files:
                    raise DataError(_unreadable_message(file, fault)) from None
                ledger.leave_out(fault.reason, file.name)
            except OSError as error:
                raise DataError(
                    f"{file.path} cannot be read: {error.strerror}. Check that it is still there"
                    " and that you may read it."
                ) from None
            _check_unchanged(file)

    def key(self) -> Any:
        files = [(file.name, file.kind, file.num_bytes, file.mtime_ns) for file in self.files]
        return {"files": files, "text_column": self.text_column, "skip": self.skip_bad_files}

    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def utf8_length(text: str, where: str) -> int:
    """Bytes of `text` in UTF-8; raises DataError for half a surrogate pair, which has none."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start:,} is half of a surrogate pair"
            f" ({text[error.start]!r}), which is no text. Mend or remove this document."
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
    for path, below in candidates:
        kind = kind_of(path)
        if "/." in f"/{below}" or "/__pycache__/" in f"/{below}":
            ledger.ignore_file("files in __pycache__, or hidden", below)
        elif any(fnmatch(path, p) or fnmatch(os.path.basename(path), p) for p in exclude):
            ledger.ignore_file("files that exclude_files matches", below)
        elif kind == "bin":
            ledger.ignore_file("token files (.bin), which must be named themselves", below)
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
