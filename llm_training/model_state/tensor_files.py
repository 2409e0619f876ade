"""Files of tensors, hashed and brought to the disk while they are written.

The checksum is that of the bytes which were meant, not of a file read again: whatever a disk made
of them otherwise is found when the file is read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llm_training.checksums import file_note, new_checksum
from llm_training.model_state.form import SaveError, explain_failure

SAFETENSORS = ".safetensors"
# In the order of the format's own: larger ones first, so each tensor is aligned to its type.
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BLOCK_BYTES = 2**20  # hashed, and written while it still lies in the processor's cache
SYNC_BYTES = 2**26  # brought to the disk while other files are written

FileNotes = dict[str, dict[str, Any]]


def write_tensor_files(folder: Path, contents: Mapping[str, Any]) -> FileNotes:
    """Writes files of tensors, all at the same time; afterwards they are on the disk.

    Args:
        contents: by file name; `.safetensors` takes tensors by name, any other name whatever
            `torch.save` does.

    Returns:
        What a manifest says of each: size and checksum.

    Raises:
        SaveError: one could not be written, named.
    """
    with _one_checksum(), ThreadPoolExecutor(len(contents), "saving-file") as pool:
        tasks = {name: pool.submit(_write, folder / name, contents[name]) for name in contents}
    notes = {}
    for name, task in tasks.items():
        try:
            notes[name] = task.result()
        except Exception as error:  # full disks show in many ways
            raise SaveError(explain_failure(0, f"write {name}", error)) from error
    return notes


@contextmanager
def _one_checksum() -> Iterator[None]:
    """Keeps torch from computing checksums of its own, which nobody reads."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _write(path: Path, content: Any) -> dict[str, Any]:
    with HashedFile(path) as file:
        if path.suffix == SAFETENSORS:
            _write_safetensors(file, content)
        else:
            torch.save(content, file)  # type: ignore[arg-type]  # it wants no more than `write`
        file.flush()
        return file_note(file.num_bytes, file.checksum)


def _write_safetensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Writes what `safetensors.torch.save_file` would, from where the tensors lie.

    Source: https://github.com/huggingface/safetensors#format
    """
    assert sys.byteorder == "little"
    order = list(SAFETENSORS_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if data.numel():
            file.write(data.numpy().data)


class HashedFile:
    """A new file that is hashed and sent to the disk while it is written; a context manager.

    Attributes:
        num_bytes: written so far.
    """

    def __init__(self, path: Path):
        self.num_bytes = 0
        self._file = path.open("wb", buffering=0)
        self._checksum = new_checksum()
        self._unsent = 0

    @property
    def checksum(self) -> str:
        """Of what was written so far, in hex."""
        return str(self._checksum.hexdigest())

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of it; it may change once this has returned."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), BLOCK_BYTES):
            self._write_block(view[begin : begin + BLOCK_BYTES])
        return len(view)

    def flush(self) -> None:
        """Waits until all is on the disk."""
        os.fsync(self._file.fileno())

    def _write_block(self, block: memoryview) -> None:
        self._checksum.update(block)
        self._write_through(block)
        if self._unsent >= SYNC_BYTES:
            os.fdatasync(self._file.fileno())
            self._unsent = 0

    def _write_through(self, block: memoryview) -> None:
        done = 0
        while done < len(block):  # a full disk takes a part first
            done += self._file.write(block[done:])
        self.num_bytes += done
        self._unsent += done

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
