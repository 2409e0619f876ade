"""Weights and optimizer state of a checkpoint, under every backend and from one to another."""

from llm_training.model_state.form import (
    CheckpointError,
    SaveError,
    StateForm,
    fail_together,
    on_main_process,
    save_on_main_process,
    save_together,
)
from llm_training.model_state.load import is_converted, load_model_state
from llm_training.model_state.random_state import (
    check_random_state,
    is_same_split,
    restore_random_state,
)
from llm_training.model_state.save import estimate_bytes, save_model_state
from llm_training.model_state.staging import StagingMemory
from llm_training.model_state.tensor_files import FileNotes, write_tensor_files

__all__ = [
    "CheckpointError",
    "FileNotes",
    "SaveError",
    "StagingMemory",
    "StateForm",
    "check_random_state",
    "estimate_bytes",
    "fail_together",
    "is_converted",
    "is_same_split",
    "load_model_state",
    "on_main_process",
    "restore_random_state",
    "save_model_state",
    "save_on_main_process",
    "save_together",
    "write_tensor_files",
]
