"""The equivalence worker, which also notes all that evaluations measure and their groups' sums.

    accelerate launch --config_file ... evaluation_worker.py CASES OUTPUT

A record has two entries more: `measured`, the `eval/` metrics of each evaluation, and `groups`, the
losses and tokens of its groups as rank 0 has them, with `same_on_all_ranks`.
"""

from __future__ import annotations

import json
from typing import Any

from accelerate.utils import gather_object

from llm_training import judging
from llm_training.outputs import OutputFolder
from llm_training.ranks import leave
from tests.distributed import equivalence_worker

groups: list[dict[str, Any]] = []


def note_groups() -> None:
    """From now on, what an evaluation finds of each group is noted."""
    evaluate_sets = judging.evaluate_sets

    def noted(*args: Any, **kwargs: Any) -> Any:
        judgements = evaluate_sets(*args, **kwargs)
        (judgement,) = judgements.values()
        sums = [judgement.group_losses.tolist(), judgement.group_tokens.tolist()]
        of_ranks = gather_object([[sums, judgement.metrics]])
        groups.append({"losses": sums[0], "tokens": sums[1]})
        groups[-1]["same_on_all_ranks"] = all(found == of_ranks[0] for found in of_ranks)
        return judgements

    judging.evaluate_sets = noted


def record_measured() -> None:
    """Adds what evaluations measured to the record of each run."""
    record_of = equivalence_worker.record_of

    def record(output: OutputFolder, samples: list[list[int]]) -> dict[str, Any]:
        lines = [json.loads(line) for line in output.log.read_text("utf-8").splitlines()]
        measured = [
            {name: value for name, value in line.items() if name.startswith("eval/")}
            for line in lines
            if "eval/loss" in line
        ]
        found = {"measured": measured, "groups": groups.copy()}
        groups.clear()
        return record_of(output, samples) | found

    equivalence_worker.record_of = record


if __name__ == "__main__":
    note_groups()
    record_measured()
    equivalence_worker.main()
    leave(0)
