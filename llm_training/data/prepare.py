"""Text into token stores: built once, and taken again as long as nothing changed."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llm_training.data.documents.sources import SourceFile, find_files, fixed_part
from llm_training.data.documents.split import (
    TRAIN,
    VALIDATION,
    Split,
    documents_needed,
    validation_share,
)
from llm_training.data.errors import DataError
from llm_training.data.folders import check_free_space, exclusive, new_folder
from llm_training.data.ledger import Ledger
from llm_training.data.prepared import PreparedData, content_fingerprint
from llm_training.data.progress import Progress
from llm_training.data.recipe import (
    Recipe,
    make_recipe,
    make_validation_recipe,
    tokenizer_loader,
)
from llm_training.data.tokens.bin_files import prepare_bin_files
from llm_training.data.tokens.encoding import TextEncoder
from llm_training.data.tokens.nanogpt_meta import write_nanogpt_meta
from llm_training.data.tokens.store_meta import SplitMeta, StoreMeta, dtype_for, read_meta
from llm_training.data.tokens.store_writer import TokenStoreWriter
from llm_training.data.tokens.token_files import is_token_file, name_token_files
from llm_training.data.tokens.token_store import FILE_NAMES, TokenStore
from llm_training.data.tokens.tokenizers import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arguments import DataArguments

Say = Callable[[str], None]

TOKENIZER_FOLDER = "tokenizer"
# Only for the check of free space: text has seldom fewer bytes a token with a real vocabulary.
_BYTES_PER_TOKEN = 3
# A process takes a third of a second to start. More cannot be fed: one reads for all.
_BYTES_A_PROCESS = 2**23
_MOST_PROCESSES = 16


def prepare_source(
    arguments: DataArguments, *, tokenizer_source: str | None = None, say: Say = print
) -> PreparedData:
    """Reads, tokenizes and stores the data of one source, unless that was done before.

    Several processes may call it at once: one builds, the others wait and take the result.

    Args:
        arguments: the settings; `train_mixture` is not looked at.
        tokenizer_source: model whose tokenizer is used where tokenizer_name is null.
        say: takes lines that tell what is being done.

    Raises:
        DataError: a fault in the data or its settings.
    """
    listing = Ledger()
    train_files, validation_files = list_files(arguments, listing, say)
    if any(is_token_file(file.path) for file in (*train_files, *validation_files)):
        _check_token_settings(arguments)
        return prepare_bin_files(
            train_files,
            validation_files,
            share=validation_share(arguments.validation_split_percentage),
            tokenizer_name=arguments.tokenizer_name,
            tokenizer_source=tokenizer_source,
            cache_dir=Path(arguments.cache_dir).expanduser(),
            say=say,
            load=tokenizer_loader(arguments, tokenizer_source),
        )
    recipe = make_recipe(arguments, train_files, validation_files, tokenizer_source, say)
    folder = _take_or_build(recipe, arguments, say)
    return _open_prepared(folder, recipe, listing)


def prepare_validation_set(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    say: Say = print,
) -> PreparedData:
    """Reads, tokenizes and stores a further validation set, unless that was done before.

    Args:
        arguments: its own settings.
        tokenizer: that of the run; None where it has none, and all data is token files.
        say: takes lines that tell what is being done.

    Raises:
        DataError: a fault in its data or settings.
    """
    listing = Ledger()
    _, files = list_files(arguments, listing, say)
    if any(is_token_file(file.path) for file in files):
        _check_token_settings(arguments)
        return prepare_bin_files(
            (),
            files,
            share=Fraction(0),
            tokenizer_name=None,
            tokenizer_source=None,
            tokenizer=tokenizer,
            cache_dir=Path(arguments.cache_dir).expanduser(),
            say=say,
        )
    if tokenizer is None:
        raise DataError(
            "It is text, and the run, whose data is token files, has no tokenizer for it. Name the"
            " tokenizer that made those with tokenizer_name, or give this set as a token file too."
        )
    recipe = make_validation_recipe(arguments, files, tokenizer, say)
    folder = _take_or_build(recipe, arguments, say)
    return _open_prepared(folder, recipe, listing)


def list_files(
    arguments: DataArguments, listing: Ledger, say: Say
) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files that train_file and validation_file name; `listing` counts those not taken."""
    _check_settings(arguments)
    train_files, validation_files = (
        find_files(
            name_token_files(getattr(arguments, name), argument=name, say=say),
            arguments.exclude_files,
            listing,
            argument=name,
        )
        for name in ("train_file", "validation_file")
    )
    _tell_overlap(train_files, validation_files, say)
    return train_files, validation_files


def _check_settings(arguments: DataArguments) -> None:
    if arguments.train_file and arguments.dataset_name:
        raise DataError("train_file and dataset_name are both given. Give one of them.")
    if not (arguments.train_file or arguments.dataset_name or arguments.validation_file):
        raise DataError("There is no data. Give train_file or dataset_name.")
    if not 0 <= arguments.validation_split_percentage < 100:
        raise DataError(
            f"validation_split_percentage is {arguments.validation_split_percentage}."
            " Give a number from 0 to below 100."
        )


def _check_token_settings(arguments: DataArguments) -> None:
    """Refuses, for token files, what is done to text alone."""
    if arguments.dataset_name:
        raise DataError(
            f"validation_file is a token file, but dataset_name {arguments.dataset_name!r} is text."
            " Give text for both, or token files for both."
        )
    for name in ("drop_duplicates", "min_document_characters", "messages_column", "prompt_column"):
        if value := getattr(arguments, name):
            raise DataError(
                f"{name}={value} cannot be done to token files: it needs their text. Leave it out,"
                " or give the text."
            )


def _tell_overlap(train: list[SourceFile], validation: list[SourceFile], say: Say) -> None:
    trained_on = {file.identity for file in train}
    if both := [file for file in validation if file.identity in trained_on]:
        say(
            f"WARNING: {len(both):,} files are in both train_file and validation_file, such as"
            f" {both[0].path}: the validation loss will say little about new text"
        )


def _take_or_build(recipe: Recipe, arguments: DataArguments, say: Say) -> Path:
    """The folder of the finished store."""
    key = recipe.key()
    folder = _store_folder(key, arguments)
    cache = folder.parent
    if not _is_whole(folder, key):
        lock = cache / f".{folder.name}.lock"
        with exclusive(lock, lambda: say(f"Another process is building {folder}; waiting")):
            # While we waited, it may have been finished.
            if not _is_whole(folder, key):
                if folder.exists():
                    say(f"{folder} is damaged and is made again")
                _build(recipe, key, folder, say)
                return folder
    say(f"Tokens: unchanged since they were made, taken from {folder}")
    return folder


def is_stored(recipe: Recipe, arguments: DataArguments) -> bool:
    """Whether the store of these settings is there already."""
    key = recipe.key()
    return _is_whole(_store_folder(key, arguments), key)


def _store_folder(key: str, arguments: DataArguments) -> Path:
    cache = Path(arguments.cache_dir).expanduser()
    return cache / f"{_readable_name(arguments)}-{key[:12]}"


def _readable_name(arguments: DataArguments) -> str:
    given = (*arguments.train_file, arguments.dataset_name, *arguments.validation_file)
    first = fixed_part(next(name for name in given if name))
    word = re.search(r"[\w-][\w.-]*", Path(first).name, re.ASCII)
    return word.group()[:32] if word else "data"


def _is_whole(folder: Path, key: str) -> bool:
    try:
        meta = read_meta(folder)
        if meta is None or meta.source_key != key:
            return False
        for split in meta.splits.values():
            TokenStore.open(folder / split.file)
    except DataError:
        return False
    return (folder / TOKENIZER_FOLDER).is_dir()


def _build(recipe: Recipe, key: str, folder: Path, say: Say) -> None:
    _check_space(recipe, folder.parent)
    split = recipe.split()
    _tell_split(split, say)
    with new_folder(folder) as temporary:
        tokenizer = recipe.tokenizer or make_tokenizer([recipe], say)
        tokenizer.save_pretrained(str(temporary / TOKENIZER_FOLDER))
        ledger = Ledger()
        splits = _write_tokens(recipe, split, tokenizer, temporary, ledger, say)
        mark = tokenizer_fingerprint(tokenizer)
        hashes = {name: split.fingerprint for name, split in splits.items()}
        StoreMeta(
            dtype=dtype_for(len(tokenizer)).name,
            vocab_size=len(tokenizer),
            eos_token_id=cast(int, tokenizer.eos_token_id),
            tokenizer={
                "name": recipe.tokenizer_name,
                "folder": TOKENIZER_FOLDER,
                "fingerprint": mark,
            },
            splits=splits,
            fingerprint=content_fingerprint(hashes.get(TRAIN), hashes.get(VALIDATION), mark),
            source_key=key,
            ledger=ledger.to_dict(),
        ).write(temporary)
        write_nanogpt_meta(temporary, tokenizer)
    say(f"Tokens: written to {folder}")


def _check_space(recipe: Recipe, cache: Path) -> None:
    is_long = recipe.tokenizer_name in ("char", "byte")
    vocab_size = len(recipe.tokenizer) if recipe.tokenizer else recipe.vocab_size
    num_tokens = recipe.num_bytes() // (1 if is_long else _BYTES_PER_TOKEN)
    # Of conversations, each token is marked as learned or not.
    bytes_a_token = dtype_for(vocab_size).itemsize + recipe.holds_conversations
    check_free_space(cache, num_tokens * bytes_a_token)


def _tell_split(split: Split, say: Say) -> None:
    percentage = f"{float(split.share * 100):g}%"
    if split.within:
        say(
            f"Validation: the last {percentage} of the characters of each document, as there are"
            f" fewer than {documents_needed(split.share):,} documents"
        )
    elif split.share:
        say(f"Validation: {percentage} of the documents, spread evenly")


def make_tokenizer(recipes: Sequence[Recipe], say: Say) -> PreTrainedTokenizerBase:
    """Makes the tokenizer from what is trained on, and from no validation text.

    Args:
        recipes: of all sources; the first says what kind of tokenizer it is.
    """
    first = recipes[0]
    kind = first.tokenizer_name
    if kind == "byte":
        return first.train_tokenizer(())
    progress = Progress(
        say, f"Making the {kind} tokenizer", sum(recipe.num_bytes() for recipe in recipes)
    )

    def training_texts() -> Iterator[str]:
        for recipe in recipes:
            for part in recipe.train_parts(Ledger(), recipe.split()):
                if part.split == TRAIN:
                    progress.update(part.document.num_bytes)
                    yield part.document.text

    tokenizer = first.train_tokenizer(training_texts())
    progress.finish()
    wanted = f" of the {first.vocab_size:,} asked for" if kind == "bpe" else ""
    say(f"Tokenizer: {kind}, {len(tokenizer):,} tokens{wanted}")
    return tokenizer


def _write_tokens(
    recipe: Recipe,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    ledger: Ledger,
    say: Say,
) -> dict[str, SplitMeta]:
    """Writes one file for each split, and counts every document in `ledger`."""
    progress = Progress(say, "Tokenizing", recipe.num_bytes())
    last_file: dict[str, str | None] = {}
    parts = recipe.parts(ledger, split)
    with ExitStack() as stack:
        stack.enter_context(_spared_collection())
        writers = {
            name: stack.enter_context(
                TokenStoreWriter(
                    folder / FILE_NAMES[name],
                    len(tokenizer),
                    cast(int, tokenizer.eos_token_id),
                    has_learned=recipe.holds_conversations,
                )
            )
            for name in recipe.splits()
        }
        encoder = TextEncoder(tokenizer, _num_processes(recipe.num_bytes()))
        for part, ids, learned in encoder.encode(parts):
            document = part.document
            num_tokens = writers[part.split].write(ids, learned, is_last=document.is_last)
            ledger.use(
                part.split,
                num_bytes=document.num_bytes,
                num_tokens=num_tokens,
                is_new_file=document.file != last_file.get(part.split),
                is_last=document.is_last,
            )
            ledger.documents_cut += part.completes_cut
            last_file[part.split] = document.file
            progress.update(document.num_bytes, num_tokens)
    progress.finish()
    ledger.documents_cut_unsure = encoder.documents_cut_unsure
    for name, writer in writers.items():
        _check_not_empty(name, writer, ledger)
    return {name: writer.meta() for name, writer in writers.items()}


def _num_processes(num_bytes: int) -> int:
    """How many processes encode so much text: one for each core, if it is worth their start."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(num_cores, _MOST_PROCESSES, num_bytes // _BYTES_A_PROCESS))


@contextmanager
def _spared_collection() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what exists before: whole libraries of objects.

    It would go through all of them again and again, a third of the time that short documents take
    beside their encoding.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_not_empty(split: str, writer: TokenStoreWriter, ledger: Ledger) -> None:
    if writer.num_tokens == 0:
        account = "; ".join(ledger.lines()) or "there was none to begin with"
        raise DataError(
            f"No document is left for the {split} split: {account}. Give more data, or, for"
            " validation, a validation_file or a validation_split_percentage of 0."
        )


def _open_prepared(folder: Path, recipe: Recipe, listing: Ledger) -> PreparedData:
    meta = cast(StoreMeta, read_meta(folder))
    stores = {name: TokenStore.open(folder / split.file) for name, split in meta.splits.items()}
    # What the listing passed over may have changed since the tokens were made; they did not.
    ledger = Ledger.from_dict({**meta.ledger, "ignored_files": {}})
    ledger.merge_ignored(listing)
    return PreparedData(
        train=stores.get(TRAIN),
        validation=stores.get(VALIDATION),
        tokenizer=recipe.tokenizer or load_tokenizer(str(folder / TOKENIZER_FOLDER)),
        vocab_size=meta.vocab_size,
        fingerprint=meta.fingerprint,
        ledger=ledger,
    )
