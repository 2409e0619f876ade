"""Trains a run of one minute by clocks that differ from rank to rank, a second a step on rank 0.

    accelerate launch --config_file accelerate_configs/ddp.yaml deadline_worker.py SETTINGS OUTPUT

OUTPUT-0.json and OUTPUT-1.json get the learning rate of each step on that rank.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import train_llm
from llm_training import run as run_room
from llm_training.argument_parsing import read_arguments
from llm_training.ranks import leave

NOW = [0.0]
RANK = int(os.environ["RANK"])
SECONDS_PER_STEP = 1.0 + 10.0 * RANK


def main() -> int:
    """Trains with a clock of this rank's own."""
    rates: list[float] = []
    compute, set_rate = train_llm.compute_gradients, train_llm.set_learning_rate

    def compute_and_wait(*args: Any) -> Any:
        NOW[0] += SECONDS_PER_STEP
        return compute(*args)

    def note_rate(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        set_rate(optimizer, rate)

    train_llm.compute_gradients = compute_and_wait  # type: ignore[assignment]
    train_llm.set_learning_rate = note_rate
    deadline_of = run_room.Deadline.of_run
    run_room.Deadline.of_run = functools.partial(  # type: ignore[method-assign]
        deadline_of, clock=lambda: NOW[0]
    )
    code = train_llm.main(read_arguments([sys.argv[1]]))
    Path(f"{sys.argv[2]}-{RANK}.json").write_text(json.dumps(rates))
    return code


if __name__ == "__main__":
    leave(main())
