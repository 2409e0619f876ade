"""Files of UTF-8 text: opened, and checked from end to end before anything of them is used."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import TextIO

from llm_training.data.documents.compressed import open_binary

EMPTY_FILE = "empty files"
NOT_UTF8 = "files that are not UTF-8 text"
_CHECK_BYTES = 4 * 2**20


class UnreadableFile(Exception):
    """A file that `skip_bad_files` may leave out.

    Attributes:
        reason: the heading it is counted under.
        detail: what is wrong with this one, as the end of a sentence.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def open_text(path: Path, *, encoding: str = "utf-8", newline: str = "\n") -> TextIO:
    """Opens a text file, unpacked where it is compressed; line ends are left as they are.

    With the default `newline`, lines end at "\\n" alone; Python's own also end at a lone "\\r".
    """
    return io.TextIOWrapper(open_binary(path), encoding=encoding, newline=newline)


def check_text(path: Path) -> int:
    """The number of characters, at least 1; memory is bounded.

    Raises:
        UnreadableFile: it is empty, or some byte, whose offset is told, cannot be UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = num_characters = 0
    with open_binary(path) as file:
        while chunk := file.read(_CHECK_BYTES):
            if (nul := chunk.find(b"\0")) >= 0:
                raise UnreadableFile(NOT_UTF8, f"is binary, not text: byte {offset + nul:,} is NUL")
            num_characters += _count_characters(decoder, chunk, offset)
            offset += len(chunk)
    num_characters += _count_characters(decoder, b"", offset)
    if offset == 0:
        raise UnreadableFile(EMPTY_FILE, "is empty (0 bytes)")
    return num_characters


def _count_characters(decoder: codecs.IncrementalDecoder, chunk: bytes, offset: int) -> int:
    # The decoder holds back the start of a character that the last chunk cut; error.start counts
    # from there.
    held_back = len(decoder.getstate()[0])
    try:
        return len(decoder.decode(chunk, final=not chunk))
    except UnicodeDecodeError as error:
        position = offset - held_back + error.start
        byte = error.object[error.start]
        raise UnreadableFile(
            NOT_UTF8, f"is not UTF-8 text: byte {position:,} (0x{byte:02x}), {error.reason}"
        ) from None
