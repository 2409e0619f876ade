"""What DeepSpeed's ZeRO-3 does to models while they are made, and how to keep it from doing so.

Where it is active, transformers cuts existing weights into parts as it loads them: no process ever
holds the whole model. A parameter then has an empty shape and notes its real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.integrations import deepspeed

# On a parameter whose numbers are packed: the shape that they would have.
LOGICAL_SHAPE = "logical_shape"


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has cut or that is packed."""
    packed: Any = getattr(parameter, LOGICAL_SHAPE, None)
    cut: Any = getattr(parameter, "ds_shape", packed)
    return parameter.shape if cut is None else torch.Size(cut)


def gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Inside, a parameter that ZeRO-3 has cut is whole on every rank; every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    whole: AbstractContextManager[Any] = zero.GatheredParameters([parameter])
    return whole


@contextmanager
def whole_models() -> Iterator[None]:
    """Inside, models are made whole on every process that makes one.

    For new weights, since each process would draw for its own part, and the run would begin from
    other weights than the same run on one process; and for models that rank 0 makes alone.
    """
    noted = deepspeed._hf_deepspeed_config_weak_ref
    config = noted() if noted is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
