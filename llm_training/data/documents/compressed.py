"""Compressed files, read as what they hold: .gz, .bz2, .xz and .zst."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from llm_training.data.errors import DataError

COMPRESSED_SUFFIXES = frozenset((".gz", ".bz2", ".xz", ".zst"))
_CHUNK_BYTES = 2**20


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def is_compressed(path: str | Path) -> bool:
    """Whether the suffix names a compression that we read."""
    return os.path.splitext(path)[1].lower() in COMPRESSED_SUFFIXES


def name_inside(path: str | Path) -> str:
    """The name without the suffix of its compression: a.jsonl of a.jsonl.gz."""
    name = str(path)
    return os.path.splitext(name)[0] if is_compressed(name) else name


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading its bytes, unpacked where its suffix names a compression.

    An archive of several members is read to the end of the last. One that is damaged or cut short
    raises DataError where the fault is met: at the latest at its end, so read it to there.
    """
    # An empty file is empty, not a damaged archive.
    if not is_compressed(path) or path.stat().st_size == 0:
        return path.open("rb")
    unpacked = _Unpacked(path, _OPENERS[path.suffix.lower()](path))
    return cast(BinaryIO, io.BufferedReader(unpacked, _CHUNK_BYTES))


class _Unpacked(io.RawIOBase):
    """A raw stream over an unpacking one, whose faults become DataError with the path."""

    def __init__(self, path: Path, stream: _Readable):
        self._path = path
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            # The disk failed, not the archive.
            if isinstance(error, OSError) and error.errno:
                raise
            what = " ".join(str(error).split()).rstrip(".")
            raise DataError(
                f"{self._path} cannot be unpacked: it is damaged or cut short ({what})."
                " Fetch or write it again, or leave it out with exclude_files."
            ) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _Members:
    """The members of a .bz2 or .xz file, one after the other.

    The standard library's own file objects take whatever follows the first member and cannot be
    unpacked for padding, and so would lose damaged members silently.
    """

    def __init__(self, file: BinaryIO, new_decompressor: Callable[[], Any]):
        self._file = file
        self._new_decompressor = new_decompressor
        self._decompressor: Any = None

    def read(self, size: int, /) -> bytes:
        while True:
            if self._decompressor is None or self._decompressor.eof:
                start = self._next_member_start()
                if not start:
                    return b""
                self._decompressor = self._new_decompressor()
                data = self._decompressor.decompress(start, size)
            elif self._decompressor.needs_input:
                packed = self._file.read(_CHUNK_BYTES)
                if not packed:
                    raise EOFError("it ends before its end mark")
                data = self._decompressor.decompress(packed, size)
            else:
                data = self._decompressor.decompress(b"", size)
            if data:
                return data

    def _next_member_start(self) -> bytes:
        """The first bytes of the next member; empty at the end. Zero bytes between are padding."""
        packed = self._decompressor.unused_data if self._decompressor else b""
        while not (start := packed.lstrip(b"\0")):
            packed = self._file.read(_CHUNK_BYTES)
            if not packed:
                return b""
        return start

    def close(self) -> None:
        self._file.close()


def _open_zstd(path: Path) -> _Readable:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], _Readable]] = {
    ".gz": lambda path: gzip.GzipFile(path),
    ".bz2": lambda path: _Members(path.open("rb"), bz2.BZ2Decompressor),
    ".xz": lambda path: _Members(path.open("rb"), lzma.LZMADecompressor),
    ".zst": _open_zstd,
}
