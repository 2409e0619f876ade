"""The finished model as a plain Hugging Face folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_training.durable import replace_folder

# What wrappers put into the names of weights: DDP and `CausalLMWithLoss` in front of them, and
# torch.compile anywhere.
WRAPPER_NAMES = re.compile(r"^(module\.)?model\.|_orig_mod\.")


def export_model(
    accelerator: Accelerator,
    model: nn.Module,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> None:
    """Writes weights, configuration, generation configuration and tokenizer into `folder`.

    `AutoModelForCausalLM.from_pretrained(folder)` opens the result. It is written beside and
    renamed, so `folder` is at no time half a model. Every rank must call this.

    Args:
        model: the prepared `CausalLMWithLoss`, from which the weights are gathered.
        network: the Hugging Face model inside it, which knows how they are stored.
    """
    # Unwrapping would import DeepSpeed, seconds for nothing; the names are mended here.
    state_dict = accelerator.get_state_dict(model, unwrap=False)
    if accelerator.is_main_process:
        weights = {WRAPPER_NAMES.sub("", name): tensor for name, tensor in state_dict.items()}
        written = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(written, ignore_errors=True)
        network.save_pretrained(written, state_dict=weights)
        generation = GenerationConfig.from_model_config(network.config)
        generation.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        replace_folder(written, folder)
    accelerator.wait_for_everyone()
