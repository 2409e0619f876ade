"""Sharded checkpoints: every process writes and reads its own part of FSDP2 or tensor parallelism.

The folders and their keys are those of Accelerate's sharded FSDP2 checkpoints, so that the two
backends share one format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map

from llm_training.model_state.form import without_frozen
from llm_training.model_state.live import LiveModel, local_part
from llm_training.model_state.readers import check_moments, moments_of

STATE = "optimizer.state."  # before the name of a parameter and the kind of its state


def save_sharded_weights(live: LiveModel, folder: Path) -> None:
    """Writes this rank's part of the weights; every rank must call this, and fails if one does."""
    _save({"model": _trained_weights(live)}, folder)


def save_sharded_optimizer(live: LiveModel, folder: Path) -> None:
    """Writes this rank's part of the optimizer state; as `save_sharded_weights`."""
    assert live.optimizer is not None
    _save({"optimizer": get_optimizer_state_dict(live.model, live.optimizer)}, folder)


def load_sharded_weights(live: LiveModel, folder: Path) -> None:
    """Reads this rank's part of the weights; every rank must call this, and fails if one does."""
    _load(_trained_weights(live), "model", folder)


def load_sharded_optimizer(live: LiveModel, folder: Path) -> None:
    """Reads this rank's part of the optimizer state; every rank must call this.

    Raises:
        ValueError: it holds state of parameters that the model does not have, or of another
            optimizer.
    """
    kinds = _written_kinds(folder)
    if foreign := sorted(set(kinds) - set(live.optimizer_parameters)):
        raise ValueError(f"it has state of {foreign[0]}, which the model does not train")
    moments = {name: moments_of(written) for name, written in kinds.items()}
    check_moments(moments, live.moments())
    targets: dict[str, Any] = {
        name: ({"step": torch.zeros(())} if "step" in written else {})
        | {kind: torch.zeros_like(live.parameters[name].detach()) for kind in moments[name]}
        for name, written in kinds.items()
    }
    _load({"state": targets}, "optimizer", folder)
    live.set_optimizer_state(targets)


def _trained_weights(live: LiveModel) -> dict[str, Any]:
    options = StateDictOptions(ignore_frozen_params=True)
    return without_frozen(get_model_state_dict(live.model, options=options), live.model)


def _written_kinds(folder: Path) -> dict[str, set[str]]:
    """What is written of each parameter; one that was never updated has no state."""
    kinds: dict[str, set[str]] = {}
    for key in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata:
        if key.startswith(STATE):
            name, _, kind = key[len(STATE) :].rpartition(".")
            kinds.setdefault(name, set()).add(kind)
    return kinds


def _save(tree: dict[str, Any], folder: Path) -> None:
    dcp.save(_in_one_piece(tree), storage_writer=dcp.FileSystemWriter(folder))


def _load(targets: dict[str, Any], key: str, folder: Path) -> None:
    """Reads into the tensors of `targets`, in place."""
    pieces = _in_one_piece(targets)
    dcp.load({key: pieces}, storage_reader=dcp.FileSystemReader(folder))
    tree_map(_copy_back, targets, pieces)


def _in_one_piece(tree: Any) -> Any:
    """The same tensors, each rank's part contiguous in the whole.

    Fused matrices are cut in strides, of which torch.distributed.checkpoint knows nothing: it
    would write them in the wrong order.
    """

    def unstride(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        placements = tuple(
            Shard(place.dim) if isinstance(place, _StridedShard) else place
            for place in value.placements
        )
        return (
            value if placements == value.placements else value.redistribute(placements=placements)
        )

    return tree_map(unstride, tree)


def _copy_back(target: Any, piece: Any) -> None:
    if target is not piece and isinstance(target, DTensor):
        with torch.no_grad():
            whole = piece.redistribute(placements=target.placements)
            local_part(target).copy_(local_part(whole))
