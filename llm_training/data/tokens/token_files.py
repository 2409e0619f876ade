"""Token files that another program wrote: where they are, and what is known of them.

Flat `.bin` files hold nothing but ids; what type these have may be said beside them, in a
`meta.json` such as `{"vocab_size": 50257, "dtype": "uint16"}` or in nanoGPT's `meta.pkl`. `.npy`
files say their type themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from llm_training.data.errors import DataError, one_line
from llm_training.data.tokens.nanogpt_meta import NanogptMeta, read_nanogpt_meta
from llm_training.data.tokens.store_meta import FORMAT, META_FILE, dtype_for, read_meta

SUFFIXES = (".bin", ".npy")
TRAIN_NAMES = ("train.bin", "train.npy")
VALIDATION_NAMES = ("val.bin", "val.npy", "validation.bin", "validation.npy")
# Where programs put the token files below the folder that a data set is known by.
PROCESSED = "processed"
_MAX_META_BYTES = 64 * 2**20
_TOKENIZER_KEYS = ("tokenizer", "tokenizer_name", "tokenizer_name_or_path")
# What is stored, and what it is read as: an id has the same bytes with a sign and without.
_READ_AS = {"<u2": "<u2", "<u4": "<u4", "<i4": "<u4"}
_TYPE_NAMES = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4"} | {name: name for name in _READ_AS}


def is_token_file(path: Path) -> bool:
    """Whether the suffix is that of a token file."""
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class TokenFolder:
    """The token files of a folder; None where there is none of that split."""

    train: Path | None
    validation: Path | None


def find_token_folder(entry: Path) -> TokenFolder | None:
    """The token files in a folder, or in its subfolder `processed`; None where there are none.

    They are `train.bin` or `train.npy`, and `val` or `validation` with the same suffixes. Whatever
    else is in the folder does not count.

    Raises:
        DataError: there is more than one file for a split.
    """
    folders = (entry, entry / PROCESSED)
    train = _only_one([folder / name for folder in folders for name in TRAIN_NAMES])
    validation = _only_one([folder / name for folder in folders for name in VALIDATION_NAMES])
    return TokenFolder(train, validation) if train or validation else None


def validation_beside(train: Path) -> Path | None:
    """The validation file in the folder of a `train.bin` or `train.npy`; None where none is there.

    Raises:
        DataError: there is more than one.
    """
    if train.name not in TRAIN_NAMES:
        return None
    return _only_one([train.with_name(name) for name in VALIDATION_NAMES])


def _only_one(candidates: Iterable[Path]) -> Path | None:
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        raise DataError(
            f"There is more than one token file to choose from: {', '.join(map(str, found))}. Name"
            " the one to use with train_file or validation_file, or remove the others."
        )
    return found[0] if found else None


def name_token_files(
    entries: Sequence[str], *, argument: str, say: Callable[[str], None]
) -> list[str]:
    """The entries of `train_file` or `validation_file`, token folders replaced by their file.

    Args:
        entries: files, folders and globs. Of a folder with token files, the file of the split
            that is asked for takes its place; if it has none, the folder stays.
        argument: `train_file` or `validation_file`.
        say: takes a line for each folder replaced.

    Raises:
        DataError: a folder has more than one file for a split.
    """
    return [_name_token_file(entry, argument, say) for entry in entries]


def _name_token_file(entry: str, argument: str, say: Callable[[str], None]) -> str:
    folder = find_token_folder(Path(entry).expanduser())
    file = folder and (folder.train if argument == "train_file" else folder.validation)
    if not file:
        return entry
    say(
        f"{argument}: {entry} holds token files, of which {file} is read; to read the text files in"
        " it instead, name them"
    )
    return str(file)


@dataclass(frozen=True)
class Claims:
    """What is said beside a token file; None where nothing is said of it.

    Attributes:
        said_by: the files that say it, for messages.
        dtype: what an id is stored as, little-endian, as numpy names it (`<u2`).
        vocab_size: every id is below.
        eos_token_id: what closes a document.
        tokenizer: name or folder of the tokenizer.
        tokens: the token of each id from 0.
    """

    said_by: str
    dtype: str | None = None
    vocab_size: int | None = None
    eos_token_id: int | None = None
    tokenizer: str | None = None
    tokens: tuple[str, ...] | None = None


def read_claims(path: Path) -> Claims | None:
    """What `meta.json` and `meta.pkl` beside a token file say; None of a file of our own stores.

    Those beside the folder count too if it is called `processed`, for what is not beside the file.

    Raises:
        DataError: one of them is damaged, or they contradict each other.
    """
    folders = [path.parent] + [path.parent.parent] * (path.parent.name == PROCESSED)
    found = [_read_json_claims(folder) for folder in folders]
    if own := read_meta(path.parent):
        if own.split_of(path):
            return None
        # The meta.pkl of our store, too, speaks of its own files.
        folders = folders[1:]
    claims = next(filter(None, found), None)
    pickled = next(filter(None, map(read_nanogpt_meta, folders)), None)
    return _add_pickled(claims, pickled)


def _add_pickled(claims: Claims | None, pickled: NanogptMeta | None) -> Claims:
    if pickled is None:
        return claims or Claims(said_by="nothing")
    if claims is None:
        return Claims(str(pickled.path), vocab_size=pickled.vocab_size, tokens=pickled.tokens)
    sizes = {size for size in (claims.vocab_size, pickled.vocab_size) if size}
    if len(sizes) > 1:
        raise DataError(
            f"{claims.said_by} says a vocab_size of {claims.vocab_size}, but {pickled.path} says"
            f" {pickled.vocab_size}. Remove the one that is wrong."
        )
    return Claims(
        said_by=f"{claims.said_by} and {pickled.path.name}",
        dtype=claims.dtype,
        vocab_size=claims.vocab_size or pickled.vocab_size,
        eos_token_id=claims.eos_token_id,
        tokenizer=claims.tokenizer,
        tokens=pickled.tokens,
    )


def _read_json_claims(folder: Path) -> Claims | None:
    """What another program's `meta.json` says; None where there is none, or it is ours."""
    path = folder / META_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_META_BYTES:
            raise ValueError(f"it has more than {_MAX_META_BYTES / 2**20:.0f} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    # Besides no JSON: no UTF-8, and lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise _nonsense(path, one_line(error).rstrip(".")) from None
    if not isinstance(content, dict):
        raise _nonsense(path, f"it holds a {type(content).__name__}, no object")
    if content.get("format") == FORMAT:
        return None
    vocab_size = _whole_number(content, "vocab_size", 1, 2**32, path)
    return Claims(
        said_by=str(path),
        dtype=_stored_type(content.get("dtype"), path),
        vocab_size=vocab_size,
        eos_token_id=_whole_number(content, "eos_token_id", 0, (vocab_size or 2**32) - 1, path),
        tokenizer=_tokenizer_name(content, folder),
    )


def _whole_number(
    content: dict[str, Any], key: str, least: int, most: int, path: Path
) -> int | None:
    value = content.get(key)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise _nonsense(path, f"{key} is {value!r:.60}, no whole number from {least} to {most:,}")
    return value


def _stored_type(value: object, path: Path) -> str | None:
    if value is None:
        return None
    # As in "uint16", "np.uint16" or "<u2".
    stored = _TYPE_NAMES.get(str(value).rpartition(".")[2])
    if stored is None:
        raise DataError(
            f"{path} says dtype {value!r:.60}, but token files are read as uint16, uint32 or int32"
            " (little-endian). Correct it, or convert the file with numpy:"
            " np.fromfile('train.bin', 'int64').astype('uint32').tofile('new.bin')."
        )
    return stored


def _tokenizer_name(content: dict[str, Any], folder: Path) -> str | None:
    values = [value for key in _TOKENIZER_KEYS if isinstance(value := content.get(key), str)]
    if not any(values):
        return None
    name = next(filter(None, values))
    return str(folder / name) if (folder / name).is_dir() else name


def _nonsense(path: Path, fault: str) -> DataError:
    return DataError(
        f"{path} cannot be used: {fault}. Correct it, such as"
        ' {"vocab_size": 50257, "dtype": "uint16", "eos_token_id": 50256}, or remove it if it does'
        " not describe the token files."
    )


@dataclass(frozen=True)
class Layout:
    """How a token file is read.

    Attributes:
        dtype: little-endian uint16 or uint32.
        id_limit: ids at and above are negative numbers in the type that they were stored as.
        header_bytes: what stands before the first id.
        is_stated: whether the type is said anywhere, or concluded from the vocabulary.
    """

    dtype: np.dtype
    id_limit: int
    header_bytes: int = 0
    is_stated: bool = True


def read_layout(path: Path, claims: Claims, vocab_size: int | None) -> Layout:
    """How a token file is to be read: a `.npy` by its header, a `.bin` by what is said beside it.

    Args:
        path: the file.
        claims: what is said beside it.
        vocab_size: of the tokenizer, if there is one: a `.bin` of which nothing says the type is
            uint16, and uint32 if the vocabulary is too large for that.

    Raises:
        DataError: the file is missing, or a `.npy` that cannot be used where it lies.
    """
    if path.suffix.lower() == ".npy":
        return _read_npy_layout(path)
    if claims.dtype is not None:
        return _layout(claims.dtype)
    return Layout(dtype := dtype_for(claims.vocab_size or vocab_size or 0), _limit(dtype), 0, False)


def _layout(stored: str, header_bytes: int = 0) -> Layout:
    return Layout(np.dtype(_READ_AS[stored]), _limit(np.dtype(stored)), header_bytes)


def _limit(stored: np.dtype) -> int:
    return int(np.iinfo(stored).max) + 1


def _read_npy_layout(path: Path) -> Layout:
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            header_bytes = file.tell()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its path.") from None
    # numpy raises whatever the parts of its parser raise.
    except Exception as error:
        raise DataError(
            f"{path} is no .npy file that can be read: {one_line(error)} Write it with numpy.save."
        ) from None
    if dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {dtype}, but token ids are whole numbers. Write them with numpy.save as"
            " one row of uint16, or of uint32 if the vocabulary has more than 65,536 tokens."
        )
    if dtype.str not in _READ_AS or len(shape) != 1:
        raise DataError(
            f"{path} holds {dtype.str} of shape {shape}, but only one row of uint16, uint32 or"
            ' int32, little-endian, can be used where it lies. Convert it once: python -c "import'
            f" numpy as np; np.save('new.npy', np.load('{path}').ravel().astype('uint32'))\""
        )
    num_bytes = path.stat().st_size
    if num_bytes != header_bytes + shape[0] * dtype.itemsize:
        raise DataError(
            f"{path} has {num_bytes - header_bytes:,} bytes of ids, but its header says"
            f" {shape[0]:,} of {dtype.itemsize} bytes each: it is cut short, or was added to. Write"
            " it again with numpy.save."
        )
    return _layout(dtype.str, header_bytes)
