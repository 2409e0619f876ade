"""Parameters that ZeRO-3 has cut tell their real shape, and models can be made whole beside it."""

import pytest
import torch
from torch import nn
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llm_training.zero_init import whole_models, whole_shape


class Zero3:
    """What transformers asks of a DeepSpeed configuration."""

    def is_zero3(self) -> bool:
        return True


def test_a_cut_parameter_has_its_whole_shape() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert whole_shape(parameter) == (3, 4)
    cut = nn.Parameter(torch.empty(0))
    cut.ds_shape = torch.Size((5, 6))
    assert whole_shape(cut) == (5, 6)
    assert whole_shape(cut).numel() == 30


def test_models_are_made_whole_inside_and_only_there() -> None:
    active = Zero3()
    set_hf_deepspeed_config(active)
    try:
        with pytest.raises(KeyError), whole_models():
            assert not is_deepspeed_zero3_enabled()
            raise KeyError
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    with whole_models():
        pass
    assert not is_deepspeed_zero3_enabled()
