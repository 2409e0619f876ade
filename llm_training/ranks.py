"""What the processes of a run do together: who reads which rows, sums, turns, and the end.

A *data-parallel* rank reads rows of its own. Ranks that split the model (tensor parallel) or the
positions of a row (context parallel) between them read the same rows.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, distributed
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _get_default_store

from llm_training.cpu_backends import ring_attention
from llm_training.losses import shift_labels

T = TypeVar("T")

POLL_SECONDS = 0.2
FIRST_WORD_SECONDS = 1.0  # for the process that failed to say why, before others speak
SHARED_FOLDER_SECONDS = 30.0  # network file systems show new files late
ROLL_CALL_SECONDS = 10.0  # ranks began to wait at about the same time, and notice so
# How gloo and NCCL say that an exchange between processes broke off, or took too long.
BROKEN_EXCHANGE = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|recvValue|sendBytes"
)
TIMED_OUT = re.compile(r"[Tt]imed? ?out")

_turns = itertools.count()
_host_groups: dict[distributed.ProcessGroup, distributed.ProcessGroup] = {}


class RankError(RuntimeError):
    """This process cannot go on because of another one; the message says which, if it is known."""


def tensor_parallel_size(accelerator: Accelerator) -> int:
    """Ranks that hold one model between them, each a part of every matrix."""
    config = accelerator.parallelism_config
    return config.tp_size if config else 1


def context_parallel_size(accelerator: Accelerator) -> int:
    """Ranks that hold one row between them, each a part of its positions."""
    config = accelerator.parallelism_config
    return config.cp_size if config else 1


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """The number of this process among those that read different rows, and how many they are."""
    together = tensor_parallel_size(accelerator) * context_parallel_size(accelerator)
    return accelerator.process_index // together, accelerator.num_processes // together


def gradient_factor(accelerator: Accelerator, accumulation: int) -> int:
    """What a summed loss is multiplied by, so that the backend's means become sums again.

    Every backend averages gradients over the ranks that compute different parts of the loss.
    Accelerate divides each backward pass by the accumulation, but leaves that to DeepSpeed, which
    `updates.backward` tells to let it be.
    """
    averaged = accelerator.num_processes // tensor_parallel_size(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return averaged
    return averaged * accumulation


@contextmanager
def split_positions(accelerator: Accelerator, batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """What the model is given of a micro-batch; forward and backward pass belong inside.

    Ranks that share the positions of a row get their part of it, with labels shifted beforehand:
    the token after a part stands on another rank.

    Args:
        batch: `input_ids` and unshifted `labels`, both (B, T) int64.
    """
    if context_parallel_size(accelerator) == 1:
        yield batch
        return
    positions = torch.arange(batch["input_ids"].shape[1], device=accelerator.device)
    share = {
        "input_ids": batch["input_ids"],
        "next_tokens": shift_labels(batch["labels"]).contiguous(),
        "position_ids": positions.expand_as(batch["input_ids"]).contiguous(),
    }
    parts = list(share.values())
    with ExitStack() as stack:
        split = accelerator.maybe_context_parallel(
            buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)
        )
        stack.enter_context(split)
        if accelerator.device.type == "cpu":
            group = accelerator.torch_device_mesh["cp"].get_group()
            stack.enter_context(ring_attention(group))
        yield share


def sum_over_data(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over data-parallel ranks: for what every rank knows of its whole rows."""
    sharing = context_parallel_size(accelerator)
    return [total / sharing for total in sum_over_ranks(accelerator, *values)]


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all data, in double precision; every rank must call this.

    The numbers are the hosts': where the run computes on GPUs, these are not asked, since they
    would answer only after all that they have to do.
    """
    if accelerator.num_processes == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(totals, group=_host_group(accelerator.device.type))
    # Ranks of one tensor-parallel group hold the same values: each counts once.
    return [float(total) / tensor_parallel_size(accelerator) for total in totals]


def _host_group(device_type: str) -> distributed.ProcessGroup | None:
    """The group in which the hosts of a run exchange numbers; None: the default one.

    It is made by the first call, which every rank must take part in.

    Raises:
        RankError: gloo finds no way between the machines.
    """
    world = distributed.group.WORLD
    if device_type == "cpu" or world is None:
        return None
    if world not in _host_groups:
        try:
            _host_groups[world] = distributed.new_group(backend="gloo")
        except RuntimeError as error:
            raise RankError(
                f"The hosts of this run find no way to each other over gloo: {error} Where no other"
                " process has ended (its own error would tell why), set GLOO_SOCKET_IFNAME to the"
                " network interface that joins the machines (ip addr lists them)."
            ) from error
    return _host_groups[world]


def broadcast_batch(accelerator: Accelerator, batch: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The batch of rank 0, on the hosts of all; every rank must call this, the others with None."""
    if accelerator.num_processes == 1:
        assert batch is not None
        return batch
    box: list[Any] = [batch]
    group = _host_group(accelerator.device.type)
    distributed.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return dict(box[0])


def agree_on_seed(seed: int | None) -> int:
    """The seed of the run: the one given, or one that rank 0 draws for all."""
    if seed is not None:
        return seed
    return int(broadcast_object_list([secrets.randbelow(2**32)])[0])


def local_main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Does `work` on one process of each machine, then on its others, which find what it made.

    The others wait without an exchange, which would break off after `ddp_timeout`: data may take
    hours to prepare.

    Raises:
        RankError: on the others, when it failed on the first.
    """
    if accelerator.num_processes == 1:
        return work()
    store = _get_default_store()
    done = f"local_main_first/{next(_turns)}/{os.environ.get('GROUP_RANK', '0')}"
    if accelerator.is_local_main_process:
        try:
            result = work()
        except BaseException:
            store.set(done, "failed")
            raise
        store.set(done, "done")
        return result
    while not store.check([done]):
        time.sleep(POLL_SECONDS)
    if store.get(done) != b"done":
        time.sleep(FIRST_WORD_SECONDS)
        raise RankError("the first process of this machine failed: its error stands above.")
    return work()


def find_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """Makes sure that every machine sees the same `folder`; every rank must call this.

    Raises:
        RankError: one does not: checkpoints would be spread over disks that nobody can join.
    """
    if accelerator.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    (name,) = broadcast_object_list([f".shared_{secrets.token_hex(8)}"])
    probe = folder / name
    if accelerator.is_main_process:
        probe.touch()
    give_up = time.monotonic() + SHARED_FOLDER_SECONDS
    while not probe.exists() and time.monotonic() < give_up:
        time.sleep(POLL_SECONDS)
    found = probe.exists()
    (missing,) = sum_over_ranks(accelerator, float(not found))
    if accelerator.is_main_process:
        probe.unlink()
    if missing:
        raise RankError(
            f"{folder} is not the same folder on every machine: {missing:.0f} of"
            f" {accelerator.num_processes} processes do not see what rank 0 writes there. Give an"
            " --output_dir on storage that all machines share."
        )


def limit_waiting(accelerator: Accelerator, seconds: int) -> None:
    """Gives every group of processes the run's limit; every rank calls it with the model prepared.

    DeepSpeed, tensor and context parallelism form groups of their own, with a limit of half an
    hour.
    """
    if distributed.is_initialized():
        _host_group(accelerator.device.type)
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def explain_broken_exchange(error: BaseException) -> str | None:
    """What to tell a person about an error of the exchange between processes; None for others."""
    rank = os.environ.get("RANK")
    if rank is None or not BROKEN_EXCHANGE.search(str(error)):
        return None
    if not distributed.is_initialized():
        return f"rank {rank}: the processes did not find each other: {error}"
    if not TIMED_OUT.search(str(error)):
        return (
            f"rank {rank}: another process ended in the middle of the run; its own error tells why."
        )
    return (
        f"rank {rank}: no answer from the others within --ddp_timeout. {_silent_ranks()} Look at"
        " that process and its machine (a hang, a full disk, a much slower device), or give a"
        " larger --ddp_timeout."
    )


def _silent_ranks() -> str:
    """Which ranks do not notice the broken exchange themselves: those that hang."""
    store, ranks = _get_default_store(), range(distributed.get_world_size())
    try:
        store.set(f"noticed/{distributed.get_rank()}", "yes")
        give_up = time.monotonic() + ROLL_CALL_SECONDS
        while time.monotonic() < give_up:
            silent = [str(rank) for rank in ranks if not store.check([f"noticed/{rank}"])]
            if not silent:
                return "All ranks are alive; one was too slow."
            time.sleep(POLL_SECONDS)
        return f"Silent: rank {', '.join(silent)}."
    except RuntimeError:  # the store went away with the process that kept it
        return "Which rank is silent cannot be told."


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has this to say as well: what all meet is told once."""
    if not distributed.is_initialized():
        # Before the processes have met, a mistake in the settings is met by all of a machine.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    digest = hashlib.sha256(message.encode()).hexdigest()
    try:
        return int(_get_default_store().add(f"said/{digest}", 1)) == 1
    except RuntimeError:  # the store went away with the process that kept it
        return True


def leave(code: int) -> NoReturn:
    """Ends this process with `code`, and the exchange with the others in an orderly way.

    The interpreter is not taken down piece by piece: that takes most of a second, and threads of
    gloo that come to their end meanwhile abort the process now and then, so that a run that is done
    would count as failed.
    """
    if not distributed.is_initialized():
        atexit._run_exitfuncs()
    elif code == 0:  # otherwise, an orderly end would wait for processes that may be gone
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
