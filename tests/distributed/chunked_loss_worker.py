"""The equivalence worker with chunks of a few positions; it also counts the losses from chunks.

    accelerate launch --config_file ... chunked_loss_worker.py CASES OUTPUT

A record has one entry more, `chunked`: how often a loss was computed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_training import chunked_loss
from llm_training.ranks import leave
from tests.distributed import equivalence_worker

POSITIONS_PER_CHUNK = 11
num_chunked = 0


def count_chunked_losses() -> None:
    """From now on, `num_chunked` grows with each loss that is computed in chunks."""
    for name in ("linear_token_loss_sum", "linear_row_losses"):  # in training, in evaluation
        setattr(chunked_loss, name, counted(getattr(chunked_loss, name)))
    chunked_loss.positions_per_chunk = lambda *_: POSITIONS_PER_CHUNK


def counted(compute: Callable[..., Any]) -> Callable[..., Any]:
    def and_counts(*args: Any, **kwargs: Any) -> Any:
        global num_chunked
        num_chunked += 1
        return compute(*args, **kwargs)

    return and_counts


def record_chunks() -> None:
    """Adds how often a loss was computed in chunks to the record of each case."""
    run_case = equivalence_worker.run_case

    def run_and_note(case: dict[str, Any], recorder: Any) -> dict[str, Any]:
        before = num_chunked
        return run_case(case, recorder) | {"chunked": num_chunked - before}

    equivalence_worker.run_case = run_and_note


if __name__ == "__main__":
    count_chunked_losses()
    record_chunks()
    equivalence_worker.main()
    leave(0)
