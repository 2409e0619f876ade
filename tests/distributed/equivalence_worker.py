"""Trains several small runs one after the other in the same processes, and notes what each did.

    accelerate launch --config_file accelerate_configs/ddp.yaml equivalence_worker.py CASES OUTPUT

CASES is a JSON list of cases: a `name`, the environment (`env`) that a launch under its backend
gives its processes, where that is another than the one they have, and the `words` that
`train_llm.py` would be given. OUTPUT gets a JSON object: the name of a case to what `run_case`
returns. Starting processes takes longer than such a run, hence many in one launch.

Every row of every run, in training and in validation, is cut off at a length of its own, so that
ranks and micro-batches predict unequal numbers of tokens.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, DistributedType, GradientState
from numpy.typing import NDArray
from torch import distributed

import train_llm
from llm_training import milestones
from llm_training.argument_parsing import read_arguments
from llm_training.data.rows.store_rows import IGNORE_INDEX, NO_ROW, Batch, StreamRows
from llm_training.data.rows.windows import TrainingWindows
from llm_training.launch_settings import read_launch_settings
from llm_training.outputs import OutputFolder
from llm_training.ranks import leave
from llm_training.stopping import StopRequest

CURVES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "tokens": "train/tokens",
    "eval_loss": "eval/loss",
}
PADDING = 0


def kept_labels(row: int, block_size: int) -> int:
    """How many labels row `row` keeps, from its start; the first of them predicts nothing."""
    if row % 9 == 4:
        return 0
    if row % 9 == 7:
        return 2
    return 3 + row * 11 % (block_size - 2)


class Recorder:
    """Cuts off rows, and notes which ones this rank reads in each window.

    Attributes:
        windows: for each window of a run the row numbers of this rank's micro-batches, in order.
        rank: of this process among those that read different rows.
    """

    def __init__(self) -> None:
        self.windows: list[list[list[int]]] = []
        self.rank = 0
        self._window: list[list[int]] | None = None

    def install(self) -> None:
        """Stands between the runs of this process and their data from now on."""
        recorder, read_rows, read_window = self, StreamRows.batch, TrainingWindows.window

        def batch(rows: StreamRows, numbers: NDArray[np.int64]) -> Batch:
            if recorder._window is not None:
                recorder._window.append(numbers.tolist())
            return cut_off(read_rows(rows, numbers), numbers, rows.block_size)

        def window(windows: TrainingWindows, position: int) -> list[Batch]:
            recorder.rank, recorder._window = windows.rank, []
            found = read_window(windows, position)
            recorder.windows.append(recorder._window)
            recorder._window = None
            return found

        StreamRows.batch = batch  # type: ignore[method-assign]
        TrainingWindows.window = window  # type: ignore[method-assign]
        # The finished model is no part of the curve; test_export.py looks at it.
        milestones.export_model = lambda *_: None  # type: ignore[assignment]

    def take_samples(self) -> list[list[int]]:
        """The rows of each window over all ranks, in their order in the data.

        Ranks that hold one model between them read the same rows, which then count once.
        """
        mine = (self.rank, self.windows)
        found: list[Any] = [mine]
        if distributed.is_initialized():
            found = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, mine)
        ranks: dict[int, list[list[list[int]]]] = dict(found)
        for rank, windows in found:
            if windows != ranks[rank]:
                raise RuntimeError(f"Two processes of data-parallel rank {rank} read other rows.")
        ordered = [ranks[rank] for rank in sorted(ranks)]
        return [
            [row for parts in zip(*window, strict=True) for part in parts for row in part]
            for window in zip(*ordered, strict=True)
        ]


def cut_off(batch: Batch, numbers: NDArray[np.int64], block_size: int) -> Batch:
    """The batch with each row's end masked, as a prompt would be, or padded."""
    for i, row in enumerate(numbers.tolist()):
        if row != NO_ROW:
            kept = kept_labels(row, block_size)
            batch["labels"][i, kept:] = IGNORE_INDEX
            if row % 2:
                batch["input_ids"][i, kept:] = PADDING
    return batch


def run_case(case: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """One run from its words to its record; what it left in this process is undone."""
    environment, num_graphs = dict(os.environ), num_compiled_graphs()
    os.environ.update(case["env"])
    recorder.windows = []
    try:
        num_processes = read_launch_settings().data_parallel_size
        arguments = read_arguments(case["words"], num_processes=num_processes)
        try:
            train_llm.run_training(arguments, StopRequest())
        except train_llm.EXPECTED_ERRORS as error:  # a refusal, on every rank alike
            return {"refused": f"{type(error).__name__}: {error}"}
        record = record_of(OutputFolder(str(arguments.output_dir)), recorder.take_samples())
        record["active"] = active_backend(AcceleratorState())
        record["compiled_graphs"] = num_compiled_graphs() - num_graphs
        return record
    finally:
        gc.collect()
        gc.freeze()  # what is left, libraries above all, need not be looked through again
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)


def record_of(output: OutputFolder, samples: list[list[int]]) -> dict[str, Any]:
    """The curves of a finished run, and the rows of each step; `NO_ROW` fills up the last."""
    lines = [json.loads(line) for line in output.log.read_text("utf-8").splitlines()]
    curves = {
        name: [float(line.get(metric, math.nan)) for line in lines if metric in line]
        for name, metric in CURVES.items()
    }
    # An evaluation notes them too, at steps that have no line of their own.
    curves["tokens"] = [float(line["train/tokens"]) for line in lines if "train/loss" in line]
    return {**curves, "samples": samples}


def active_backend(state: AcceleratorState) -> str:
    """What Accelerate really ran: it falls back to plain DDP without a word."""
    split = state.parallelism_config
    if split and split.tp_enabled:
        return f"TP over {split.tp_size}"
    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{state.deepspeed_plugin.zero_stage}"
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        positions = f" CP over {split.cp_size}" if split and split.cp_enabled else ""
        return f"FSDP{plugin.fsdp_version} {plugin.state_dict_type.name}{positions}"
    return f"{state.num_processes} replicated"


def num_compiled_graphs() -> int:
    """How many pieces of models torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # nobody imports it who does not compile
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def main() -> None:
    """Runs the cases of the file named first, and writes to the file named second."""
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    recorder = Recorder()
    recorder.install()
    records = {case["name"]: run_case(case, recorder) for case in cases}
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(records), "utf-8")


if __name__ == "__main__":
    main()
    leave(0)
