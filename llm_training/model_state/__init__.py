"""Weights and optimizer state of a checkpoint, under every backend and from one to another."""

from llm_training.model_state.form import CheckpointError, StateForm
from llm_training.model_state.load import is_converted, load_model_state
from llm_training.model_state.random_state import (
    check_random_state,
    is_same_split,
    restore_random_state,
)
from llm_training.model_state.save import save_model_state

__all__ = [
    "CheckpointError",
    "StateForm",
    "check_random_state",
    "is_converted",
    "is_same_split",
    "load_model_state",
    "restore_random_state",
    "save_model_state",
]
