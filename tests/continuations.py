"""A text as a model continues it, in one call."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_training.generation import continue_alone, end_tokens, make_task, text_after


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 10,
    temperature: float = 0.0,
    seed: int = 1,
) -> str:
    """What the model puts behind `prompt`, on this process alone."""
    task = make_task(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    new = continue_alone(model, task, end_tokens(model, tokenizer))
    return text_after(tokenizer, task.ids, new)
