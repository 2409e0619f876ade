"""Shows the data of a run as its model will see it, without training.

Started as `python -m llm_training.show_data run.json`, with the arguments of train_llm.py; the data
is prepared as a run would prepare it. `--rows 5` shows five rows in place of three.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from arguments import Arguments, BatchSizes, resolve_batch_sizes
from llm_training.argument_parsing import parse_arguments

if __name__ == "__main__":
    # Help and every mistake in the settings are answered before the slow imports below.
    NUM_ROWS, WORDS = 3, sys.argv[1:]
    if "--rows" in WORDS[:-1]:
        place = WORDS.index("--rows")
        NUM_ROWS = int(WORDS[place + 1]) if WORDS[place + 1].isdigit() else NUM_ROWS
        del WORDS[place : place + 2]
    ARGUMENTS = parse_arguments(WORDS)

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_training.data import DataError, PreparedData, prepare_data
from llm_training.data.rows.store_rows import IGNORE_INDEX, Rows
from llm_training.data.rows.windows import train_rows, validation_rows, validation_set_rows
from llm_training.modeling import ModelError, fit_config, load_config
from llm_training.reporting import row_lines

DIM, PLAIN = "\033[2m", "\033[0m"


def main(arguments: Arguments, num_rows: int) -> int:
    """Prepares the data and shows its first rows in the order of training; the exit code."""
    try:
        data = prepare_data(arguments, tokenizer_source=arguments.model_name_or_path)
        config = load_config(arguments, data.tokenizer)
        block_size = fit_config(
            config,
            arguments,
            data.vocab_size,
            arguments.block_size,
            tokenizer=data.tokenizer,
            say=print,
        )
        rows = train_rows(data, arguments, block_size)
        main_rows = validation_rows(data, arguments, block_size)
        sets = validation_set_rows(data, arguments, block_size)
    except (DataError, ModelError) as error:
        print(f"show_data: {error}", file=sys.stderr)
        return 1
    print("\n".join(data.lines()))
    print("\n".join(row_lines(rows, ({} if main_rows is None else {"": main_rows}) | sets)))
    if rows is not None:
        print(epoch_line(rows, resolve_batch_sizes(arguments, 1)))
    use_color = sys.stdout.isatty()
    if (shown := rows or main_rows) is not None:
        numbers = shown.at(np.arange(min(num_rows, shown.num_rows)), arguments.seed or 0)
        print("\n".join(shown_rows(shown, numbers, data, use_color=use_color)))
    for name, of_set in sets.items():
        print(f"\nValidation set {name}:")
        print("\n".join(shown_rows(of_set, range(1), data, use_color=use_color)))
    return 0


def epoch_line(rows: Rows, batch: BatchSizes) -> str:
    """How long one pass over the data is."""
    steps = -(-rows.num_rows // batch.global_batch)
    tokens = rows.num_rows * rows.block_size
    return (
        f"One epoch: {rows.num_rows:,} rows of {rows.block_size} tokens = {steps:,} steps of"
        f" {batch.global_batch} rows = {tokens:,} tokens"
    )


def shown_rows(
    rows: Rows, numbers: Sequence[int] | np.ndarray, data: PreparedData, *, use_color: bool
) -> Iterator[str]:
    """The text of each row, with a line above every document; what is not predicted is marked."""
    batch = rows.batch(np.asarray(numbers, np.int64))
    for i, number in enumerate(numbers):
        runs = rows.documents(int(number))
        labels = batch["labels"][i].tolist()
        predicted = sum(label != IGNORE_INDEX for label in labels[1:])
        yield ""
        yield (
            f"=== row {number:,}: {sum(runs)} tokens in {len(runs)} documents,"
            f" {predicted} predicted"
        )
        start = 0
        for length in runs:
            stop = start + length
            ids = batch["input_ids"][i, start:stop].tolist()
            # The first token of a row is not predicted, whatever its label.
            is_dim = [at == 0 or labels[at] == IGNORE_INDEX for at in range(start, stop)]
            yield f"--- {length} tokens"
            yield marked_text(ids, is_dim, data.tokenizer, use_color=use_color)
            start = stop
        if padding := rows.block_size - start:
            yield f"--- {padding} places of padding"


def marked_text(
    ids: list[int],
    is_dim: list[bool],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    use_color: bool,
) -> str:
    """The text of tokens; runs that are not predicted are dim, or stand in ⟦ ⟧ without colours."""
    opening, closing = (DIM, PLAIN) if use_color else ("⟦", "⟧")
    text, start = "", 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or is_dim[at] != is_dim[start]:
            part = _decode(ids[start:at], tokenizer)
            text += f"{opening}{part}{closing}" if is_dim[start] else part
            start = at
    return text


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    return str(tokenizer.decode(ids, skip_special_tokens=False))


if __name__ == "__main__":
    raise SystemExit(main(ARGUMENTS, NUM_ROWS))
