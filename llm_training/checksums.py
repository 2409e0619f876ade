"""Checksums of files: what a manifest notes of a file, and finds again when it is read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import xxhash

# XXH3 in 128 bits finds any fault of a disk or a network as surely as SHA-256, ten times as fast;
# it does not keep out a person who means to deceive. Older manifests have SHA-256.
CHECKSUMS: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
CHECKSUM = "xxh3_128"
BLOCK_BYTES = 2**22


def new_checksum(kind: str = CHECKSUM) -> Any:
    """An empty checksum, as `hashlib` makes them."""
    return CHECKSUMS[kind]()


def file_checksum(path: Path, kind: str = CHECKSUM) -> str:
    """The checksum of a file, in hex.

    Raises:
        OSError: it cannot be read.
    """
    checksum = new_checksum(kind)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum.update(block)
    return str(checksum.hexdigest())


def file_note(num_bytes: int, hex_digest: str) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": num_bytes, CHECKSUM: hex_digest}
