"""Compares two checkpoints of one backend, bit for bit: every value of every file.

One process reads; none of this needs a process group. Most files are pickles, which can run code:
compare only folders that you wrote yourself.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llm_training.checkpointing import MANIFEST

SHARDS_INDEX = ".metadata"  # marks a folder of torch.distributed.checkpoint
SHOWN_CHARACTERS = 60


class Comparison(NamedTuple):
    """What came of it: tensors and arrays compared, and a line for each difference of any kind."""

    num_tensors: int
    differences: list[str]


class Part(NamedTuple):
    """A file of a checkpoint, or a folder of shards: the names in it, and how to read each."""

    names: Collection[str]
    read: Callable[[str], Any]


def compare_checkpoints(one: Path, other: Path) -> Comparison:
    """Holds each tensor and each other value of two checkpoints against each other.

    Values are read one by one where their file allows it. The manifest is left out: it also tells
    of the circumstances in which it was written.

    Returns:
        The count of tensors that are in both, and the differences; each line names file and value,
        and for tensors the largest absolute difference.
    """
    num_tensors, differences = 0, []
    for name in sorted(_part_names(one) | _part_names(other)):
        missing = [folder for folder in (one, other) if not (folder / name).exists()]
        if missing:
            differences.append(f"{name}: missing in {missing[0]}")
            continue
        compared, found = _compare_parts(_open_part(one / name), _open_part(other / name))
        num_tensors += compared
        differences += [f"{name}: {difference}" for difference in found]
    return Comparison(num_tensors, differences)


def _part_names(folder: Path) -> set[str]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    sharded = {file.parent for file in files if file.name == SHARDS_INDEX}
    parts = {file.parent if file.parent in sharded else file for file in files}
    return {str(part) for part in parts} - {MANIFEST}


def _compare_parts(one: Part, other: Part) -> Comparison:
    num_tensors, differences = 0, []
    for name in sorted({*one.names} | {*other.names}):
        if name not in one.names or name not in other.names:
            differences.append(f"{name}: only in one of the two")
            continue
        values = one.read(name), other.read(name)
        num_tensors += isinstance(values[0], Tensor)
        if difference := _difference(*values):
            differences.append(f"{name}: {difference}")
    return Comparison(num_tensors, differences)


def _difference(one: Any, other: Any) -> str | None:
    """How two values differ; None where they do not."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        is_same = type(one) is type(other) and one == other
        return None if is_same else f"{_shown(one)} and {_shown(other)}"
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (one, other)]
        return " and ".join(kinds)
    is_other = (_bits(one) != _bits(other)).any(1)
    if not is_other.any():
        return None
    largest = (one.double() - other.double()).abs().reshape(-1)[is_other].max()
    share = f"{int(is_other.sum()):,} of {one.numel():,} numbers"
    return f"{share} differ, the largest absolute difference is {float(largest):.3g}"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each number, (N, bytes) uint8: -0.0 is not 0.0, and a NaN equals itself."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


# -------------------------------------------------------------------------------------- reading


def _open_part(path: Path) -> Part:
    if path.is_dir():
        return _open_shards(path)
    if path.suffix == ".safetensors":
        file = safe_open(path, "pt")
        return Part({*file.keys()}, file.get_tensor)
    if path.suffix in (".bin", ".pt", ".pkl"):
        # DeepSpeed's files and the random states hold more than tensors and plain values.
        content = torch.load(
            path, map_location="cpu", weights_only=path.suffix == ".bin", mmap=True
        )
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        content = path.read_bytes()
    values = dict(_leaves("", content))
    return Part(values.keys(), values.__getitem__)


def _open_shards(folder: Path) -> Part:
    """What torch.distributed.checkpoint wrote, each tensor put together from its shards."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata

    def read(name: str) -> Any:
        entry, found = entries[name], dict[str, Any]({name: None})
        if isinstance(entry, TensorStorageMetadata):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            dcp.load(found, storage_reader=reader, no_dist=True)
        return found[name]

    return Part(entries.keys(), read)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The single values in nested ones, each under its path: `state.0.exp_avg`."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = dict(enumerate(value)).items()
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | type):
        inner = vars(value).items()  # an object such as DeepSpeed's loss scaler
    else:
        yield name or "content", value
        return
    for key, element in inner:
        yield from _leaves(f"{name}.{key}" if name else str(key), element)
