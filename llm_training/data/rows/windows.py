"""Which rows each process reads, for a step and for an evaluation: no loader, no state to save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arguments import holds_conversations
from llm_training.data.errors import DataError
from llm_training.data.prepared import PreparedData
from llm_training.data.rows.mixture import MixtureRows
from llm_training.data.rows.store_rows import NO_ROW, Batch, PackedRows, Rows, StreamRows
from llm_training.data.tokens.token_store import Tokens

if TYPE_CHECKING:
    from arguments import DataArguments


@dataclass(frozen=True)
class RowSettings:
    """How the tokens of a store are made into rows.

    Attributes:
        block_size: tokens in a row.
        packing: `stream` or `best_fit`, see `StreamRows` and `PackedRows`.
        document_mask: whether tokens see their own document alone.
    """

    block_size: int
    packing: str = "stream"
    document_mask: bool = False

    def rows(self, store: Tokens, *, keep_last: bool = False) -> Rows:
        """The rows of a store.

        Args:
            keep_last: whether a last row counts that the stream does not fill.

        Raises:
            DataError: nothing tells the documents of the store apart, and it matters.
        """
        needs_ends = self.document_mask or self.packing == "best_fit"
        if needs_ends and store.ends is None:
            raise DataError(
                "Nothing tells where the documents of the token file end, but document_mask and"
                " packing=best_fit must know. Name the tokenizer that made the file"
                " (tokenizer_name), whose end-of-text token stands between documents; or use"
                " packing=stream without document_mask."
            )
        if self.packing == "best_fit":
            return PackedRows(store, self.block_size, document_mask=self.document_mask)
        return StreamRows(
            store, self.block_size, keep_last=keep_last, document_mask=self.document_mask
        )


def train_rows(data: PreparedData, arguments: DataArguments, block_size: int) -> Rows | None:
    """The training rows, of a mixture if there are several sources; None where there are none.

    Raises:
        DataError: documents cannot be told apart where they must be, or weights make no mixture.
    """
    stores = data.stores("train")
    settings = _settings_of(data, arguments, block_size)
    if not stores:
        return None
    rows = {name: settings[name].rows(store) for name, store in stores.items()}
    if not data.parts:
        return rows[""]
    return MixtureRows(rows, {name: data.parts[name].weight for name in rows})


def validation_rows(data: PreparedData, arguments: DataArguments, block_size: int) -> Rows | None:
    """All validation tokens as rows, the last and shorter one included; None where there are none.

    The rows of several sources follow each other.

    Raises:
        DataError: not even one row.
    """
    stores = data.stores("validation")
    if not stores:
        return None
    settings = _settings_of(data, arguments, block_size)
    rows = {name: settings[name].rows(store, keep_last=True) for name, store in stores.items()}
    if all(not store.has_learned and store.num_tokens < block_size for store in stores.values()):
        raise DataError(
            f"The validation data has {data.num_tokens('validation')} tokens, less than one row of"
            f" {block_size}. Give more (--validation_file, --validation_split_percentage), a"
            " smaller --block_size, or --eval_steps null to train without."
        )
    if not any(of_source.num_rows for of_source in rows.values()):
        raise DataError(
            "The validation data has no conversation with a learned token within a row of"
            f" {block_size}. Give more, or a larger --block_size."
        )
    return rows[""] if not data.parts else MixtureRows(rows, dict.fromkeys(rows, 1.0))


def validation_set_rows(
    data: PreparedData, arguments: DataArguments, block_size: int
) -> dict[str, Rows]:
    """The rows of each further validation set by its name, as those of the validation data.

    Documents see each other in them where they do in training, whatever a set holds.

    Raises:
        DataError: a set has not even one row; it is named.
    """
    arguments = dataclasses.replace(arguments, document_mask=_is_masked(data, arguments))
    sets = {}
    for name, part in data.validation_sets.items():
        try:
            rows = validation_rows(part, arguments, block_size)
        except DataError as error:
            raise DataError(f"validation_sets, {name}: {error}") from error
        assert rows is not None, "it was prepared to be judged on"
        sets[name] = rows
    return sets


def _is_masked(data: PreparedData, arguments: DataArguments) -> bool:
    """Whether documents of the run's own data are kept apart; a stream is known by its columns."""
    if arguments.document_mask is None and not [*data.stores("train"), *data.stores("validation")]:
        return holds_conversations(arguments)
    return any(own.document_mask for own in _settings_of(data, arguments, 2).values())


def row_settings(
    arguments: DataArguments,
    block_size: int,
    *,
    is_conversation: bool,
    is_masked_by_default: bool | None = None,
) -> RowSettings:
    """How one source is made into rows; conversations are kept whole and apart by default.

    Args:
        is_masked_by_default: whether documents do not see each other where the arguments leave it
            open; None: as for this source alone.
    """
    by_default = is_conversation if is_masked_by_default is None else is_masked_by_default
    mask = arguments.document_mask
    return RowSettings(
        block_size,
        packing=arguments.packing or ("best_fit" if is_conversation else "stream"),
        document_mask=by_default if mask is None else mask,
    )


def _settings_of(
    data: PreparedData, arguments: DataArguments, block_size: int
) -> dict[str, RowSettings]:
    learned = {
        name: any(
            store is not None and store.has_learned for store in (part.train, part.validation)
        )
        for name, part in (data.parts or {"": data}).items()
    }
    return {
        name: row_settings(
            arguments,
            block_size,
            is_conversation=is_conversation,
            is_masked_by_default=any(learned.values()),
        )
        for name, is_conversation in learned.items()
    }


@dataclass
class TrainingWindows:
    """The micro-batches of one rank for the step that begins at a given position.

    The samples of a step do not depend on how it is split: rank `rank`'s micro-batch g holds the
    positions from `position + (g * num_ranks + rank) * micro_batch_size`.

    Args:
        rows: the training rows.
        seed: of the order.
        num_samples: where the run ends, in samples; later positions are empty rows.
        micro_batch_size: rows of one forward pass on one rank.
        num_micro_batches: forward passes of each rank in a step.
        rank: this process; num_ranks: all of them.
    """

    rows: Rows
    seed: int
    num_samples: int
    micro_batch_size: int
    num_micro_batches: int
    rank: int
    num_ranks: int

    @property
    def document_mask(self) -> bool:
        """Whether tokens see their own document alone."""
        return self.rows.document_mask

    def window(self, position: int) -> list[Batch]:
        """The `num_micro_batches` batches of this rank, each (micro_batch_size, block_size)."""
        return [self._micro_batch(position, g) for g in range(self.num_micro_batches)]

    def _micro_batch(self, position: int, g: int) -> Batch:
        start = position + (g * self.num_ranks + self.rank) * self.micro_batch_size
        return self.rows.batch(self._rows_at(start, self.micro_batch_size))

    def _rows_at(self, start: int, count: int) -> NDArray[np.int64]:
        positions = np.arange(start, start + count, dtype=np.int64)
        rows = self.rows.at(positions, self.seed)
        rows[positions >= self.num_samples] = NO_ROW
        return rows

    def run_until(self, num_samples: int) -> None:
        """Moves the end of the run, when samples were passed over and others take their place."""
        self.num_samples = num_samples

    def state(self, position: int) -> dict[str, Any] | None:
        """What a checkpoint must keep of the data beside the position: nothing."""
        return None

    def account_lines(self) -> list[str]:
        """What became known of the data during the run: nothing new."""
        return []

    def close(self) -> None:
        """Nothing is open."""

    def sample_ids(self, position: int) -> NDArray[np.int64]:
        """The row numbers of the whole step that begins at `position`, over all ranks."""
        count = self.num_ranks * self.num_micro_batches * self.micro_batch_size
        rows = self._rows_at(position, count)
        return rows[rows != NO_ROW]


def evaluation_batches(
    rows: Rows, batch_size: int, *, rank: int, num_ranks: int, max_rows: int | None
) -> Iterator[Batch]:
    """This rank's share of the evaluation rows; every rank gets equally many batches.

    Args:
        max_rows: rows over all ranks, taken evenly from the whole stream so that they speak for
            all of it; None: every row.

    Yields:
        Batches of `batch_size` rows; what goes beyond the rows is empty.
    """
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    for start in range(rank * batch_size, num_rows + rank * batch_size, batch_size * num_ranks):
        chosen = np.arange(start, start + batch_size, dtype=np.int64)
        yield rows.batch(np.where(chosen < num_rows, chosen * rows.num_rows // num_rows, NO_ROW))
