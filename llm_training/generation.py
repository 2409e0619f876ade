"""A sample of what the model has learned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and the model's continuation of it, on this process alone.

    The random state of the run is left as it was. Text beyond the model's positions is not
    generated: the sample ends there.

    Args:
        model: one that this process holds whole, such as `export_model` returns.
        max_new_tokens: tokens to generate, unless the text ends earlier.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws; the same seed gives the same sample.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:  # -1: without an end
        ids = ids[:, -(positions - 1) :]
        max_new_tokens = min(max_new_tokens, positions - ids.shape[1])
    ids = ids.to(model.device)
    was_training = model.training
    model.eval()
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        # What the model's own settings say of sampling would count otherwise.
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling["temperature"] = temperature
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            # Under ZeRO-3, transformers would wait at each token for ranks that do not take part.
            synced_gpus=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    model.train(was_training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
