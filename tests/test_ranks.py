"""Who reads which rows, how means become sums, and what is said of a broken exchange."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import distributed

from llm_training import ranks


def accelerator(index: int, count: int, tp: int = 1, cp: int = 1, kind: str = "MULTI_GPU"):
    split = SimpleNamespace(tp_size=tp, cp_size=cp)
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        parallelism_config=None if tp == cp == 1 else split,
        distributed_type=DistributedType[kind],
    )


@pytest.mark.parametrize(
    ("count", "tp", "cp", "expected"),
    [
        (4, 1, 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, 2, 1, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (4, 1, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (4, 2, 2, [(0, 1)] * 4),
    ],
)
def test_ranks_that_share_a_model_or_a_row_read_the_same_rows(
    count: int, tp: int, cp: int, expected: list
) -> None:
    assert [ranks.data_parallel(accelerator(i, count, tp, cp)) for i in range(count)] == expected


@pytest.mark.parametrize(
    ("kind", "tp", "cp", "expected"),
    [
        ("MULTI_GPU", 1, 1, 4 * 3),
        ("FSDP", 1, 1, 4 * 3),
        ("DEEPSPEED", 1, 1, 4),  # told not to divide by the accumulation
        ("MULTI_GPU", 4, 1, 3),  # no gradient is averaged: each rank has its own part
        ("FSDP", 1, 4, 4 * 3),  # ranks of one row each have a part of its loss
    ],
)
def test_the_factor_undoes_what_the_backend_divides_by(
    kind: str, tp: int, cp: int, expected: int
) -> None:
    assert ranks.gradient_factor(accelerator(0, 4, tp, cp, kind), accumulation=3) == expected


def test_one_process_sums_alone_and_works_at_once() -> None:
    assert ranks.sum_over_ranks(accelerator(0, 1), 1.5, 2.0) == [1.5, 2.0]
    assert ranks.local_main_first(accelerator(0, 1), lambda: 7) == 7


ON_GPUS = """
import sys
from types import SimpleNamespace
import torch
from torch import distributed, device
from torch.testing._internal.distributed import fake_pg
from llm_training import ranks

rank, store = int(sys.argv[1]), distributed.FileStore(sys.argv[2], 2)
# In the place of NCCL, which only GPUs have: its exchanges leave everything as it is.
distributed.init_process_group("fake", store=store, rank=rank, world_size=2)
run = SimpleNamespace(num_processes=2, device=device("cuda"), parallelism_config=None)
first = ranks.sum_over_ranks(run, rank + 0.5, 10.0)
batch = {"input_ids": torch.tensor([[1, 2]])} if rank == 0 else None
shared = ranks.broadcast_batch(run, batch)["input_ids"].tolist()
print(first, ranks.sum_over_ranks(run, 2.0**-52 + rank), shared, distributed.get_backend())
"""


def test_the_numbers_of_hosts_do_not_pass_through_their_gpus(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_GPUS]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert said == [f"[2.0, 20.0] [{1 + 2 * 2.0**-52}] [[1, 2]] fake\n"] * 2


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert ranks.agree_on_seed(7) == 7
    assert ranks.agree_on_seed(None) != ranks.agree_on_seed(None)


def test_an_error_of_ours_is_no_broken_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")
    assert ranks.explain_broken_exchange(closed) is None  # a single process exchanges nothing
    monkeypatch.setenv("RANK", "1")
    assert ranks.explain_broken_exchange(RuntimeError("size mismatch")) is None
    assert "rank 1: the processes did not find" in str(ranks.explain_broken_exchange(closed))


LEAVING = """
import atexit, os, sys
from torch import distributed
from llm_training import ranks

class Aborts:
    def __del__(self, abort=os.abort):
        abort()  # as a thread of gloo does that is met by the end of the interpreter

aborts = Aborts()
atexit.register(print, "the last words")
if sys.argv[1]:
    store = "file://" + sys.argv[1]
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
ranks.leave(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("is_alone", "code", "said"),
    [
        (True, 0, "the last words\n"),
        (True, 3, "the last words\n"),
        (False, 0, "the last words\n"),
        (False, 3, ""),
    ],
)
def test_nothing_fails_after_the_end(tmp_path: Path, is_alone: bool, code: int, said: str) -> None:
    store = "" if is_alone else str(tmp_path / "store")
    words = [sys.executable, "-c", LEAVING, store, str(code)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (code, said), ended.stderr


def test_before_the_processes_meet_one_of_each_machine_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ranks.is_first_to_say("no such device")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not ranks.is_first_to_say("no such device")


def test_what_several_ranks_meet_is_told_once(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        told = [ranks.is_first_to_say(text) for text in ("full disk", "full disk", "bad row")]
    finally:
        distributed.destroy_process_group()
    assert told == [True, False, True]


def test_every_group_gets_the_limit_of_the_run(tmp_path: Path) -> None:
    """DeepSpeed, tensor and context parallelism make groups whose limit is half an hour."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        groups = [distributed.group.WORLD, distributed.new_group([0])]
        assert limit_of(groups[1]) == timedelta(minutes=30)
        on_gpus: Any = SimpleNamespace(device=torch.device("cuda"))
        ranks.limit_waiting(on_gpus, 77)
        groups.append(ranks._host_group("cuda"))
        assert [limit_of(group) for group in groups] == [timedelta(seconds=77)] * 3
    finally:
        distributed.destroy_process_group()


def limit_of(group: Any) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
