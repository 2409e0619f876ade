"""A text is continued the same with its seed, alone or together, and nothing else is disturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pytest import MonkeyPatch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from llm_training import generation
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.generation import (
    Draw,
    Task,
    continue_alone,
    continue_together,
    end_tokens,
    make_task,
    text_after,
)
from llm_training.vocab_padding import pad_vocab
from tests.continuations import continue_text

Parts = tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]
PROMPTS = ["def f", "x", "a longer beginning than these"]


@pytest.fixture
def parts() -> Parts:
    tokenizer = train_tokenizer("byte", ["abc"], 300)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer), n_positions=48,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, resid_pdrop=0.5,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train(), tokenizer


def tasks_of(parts: Parts, temperatures: tuple[float, ...] = (0.0, 1.0)) -> list[Task]:
    return [
        make_task(*parts, prompt, max_new_tokens=12, temperature=temperature, seed=number)
        for number, prompt in enumerate(PROMPTS)
        for temperature in temperatures
    ]


def test_the_same_seed_gives_the_same_text(parts: Parts) -> None:
    first, again, other = (
        continue_text(*parts, "def f", temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_temperature_zero_rolls_no_dice(parts: Parts) -> None:
    assert continue_text(*parts, "def f") == continue_text(*parts, "def f", seed=2)


def test_the_models_own_settings_do_not_count(parts: Parts) -> None:
    plain = [continue_text(*parts, "def f", temperature=t) for t in (0.0, 1.0)]
    parts[0].generation_config.update(
        do_sample=True, temperature=5.0, top_k=2, repetition_penalty=9.0, num_beams=2
    )
    assert [continue_text(*parts, "def f", temperature=t) for t in (0.0, 1.0)] == plain


def test_random_state_and_modes_are_left_alone(parts: Parts) -> None:
    model = parts[0]
    model.get_submodule("transformer.h.0.mlp").eval()  # one part is in another mode than the rest
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    continue_text(*parts, "def f", temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_a_draw_follows_the_softmax(parts: Parts) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = Draw(Task([0], 1, 2.0, 5), num_tokens=4)
    drawn = torch.tensor([int(draw(logits, logits).argmax()) for _ in range(20_000)])
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(found, (logits[0] / 2).softmax(0), atol=0.015)


def test_it_ends_where_the_positions_end(parts: Parts) -> None:
    task = make_task(*parts, "x" * 100, max_new_tokens=500, temperature=0.0, seed=1)
    assert (len(task.ids), task.max_new_tokens) == (47, 1)
    task = make_task(*parts, "x" * 40, max_new_tokens=500, temperature=0.0, seed=1)
    assert len(continue_alone(parts[0], task, [])) == task.max_new_tokens == 8


def test_some_models_have_no_end_of_positions(parts: Parts, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(parts[0].config, "n_positions", -1)
    task = make_task(*parts, "x" * 100, max_new_tokens=500, temperature=0.0, seed=1)
    assert (len(task.ids), task.max_new_tokens) == (100, 500)


def test_an_empty_prompt_begins_a_text(parts: Parts) -> None:
    task = make_task(*parts, "", max_new_tokens=5, temperature=0.0, seed=1)
    assert task.ids == [parts[1].eos_token_id]
    assert len(continue_alone(parts[0], task, [])) == 5


def test_an_end_token_ends_the_text_and_is_no_part_of_it(parts: Parts) -> None:
    (task, *_) = tasks_of(parts)
    new = continue_alone(parts[0], task, [])
    assert len(new) == 12
    end = new[3]
    assert continue_alone(parts[0], task, [end]) == new[: new.index(end)]
    assert together(parts, [task], [end]) == [new[: new.index(end)]]


def test_the_ends_are_those_of_the_model_and_else_of_the_tokenizer(parts: Parts) -> None:
    assert end_tokens(*parts) == [parts[1].eos_token_id]
    parts[0].generation_config.eos_token_id = [3, 4]
    assert end_tokens(*parts) == [3, 4]
    parts[0].generation_config.eos_token_id = None
    assert end_tokens(*parts) == [parts[1].eos_token_id]


def test_the_text_behind_half_a_character_is_read_by_itself(parts: Parts) -> None:
    ids = parts[1]("aß").input_ids
    assert text_after(parts[1], ids[:1], ids[1:]) == "ß"
    assert text_after(parts[1], ids[:2], ids[2:]) == "\N{REPLACEMENT CHARACTER}"


# ---------------------------------------------------------------------------------------- together


def together(parts: Parts, tasks: list[Task], ends: list[int], **more: Any) -> list[list[int]]:
    model = CausalLMWithLoss(parts[0])
    return continue_together(Accelerator(cpu=True), model, parts[0], tasks, ends, **more)


def test_together_the_texts_are_those_of_one_process(parts: Parts) -> None:
    tasks, ends = tasks_of(parts), end_tokens(*parts)
    parts[0].train()
    alone = [continue_alone(parts[0], task, ends) for task in tasks]
    assert any(alone)
    assert together(parts, tasks, ends) == alone
    assert parts[0].training
    assert together(parts, [], ends) == []


def test_few_rows_at_once_make_the_same_texts(parts: Parts, monkeypatch: MonkeyPatch) -> None:
    tasks, ends = tasks_of(parts), end_tokens(*parts)
    plain = together(parts, tasks, ends)
    sizes: list[int] = []
    forward = CausalLMWithLoss.forward

    def watched(self: CausalLMWithLoss, input_ids: Tensor) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids)

    width = max(len(task.ids) + task.max_new_tokens for task in tasks)
    monkeypatch.setattr(CausalLMWithLoss, "forward", watched)
    monkeypatch.setattr(generation, "MAX_LOGITS", 4 * width * parts[0].config.vocab_size)
    assert together(parts, tasks, ends) == plain
    assert set(sizes) == {4, 2}


def test_padding_of_the_vocabulary_changes_no_text(parts: Parts) -> None:
    tasks, ends = tasks_of(parts), end_tokens(*parts)
    plain = [continue_alone(parts[0], task, ends) for task in tasks]
    pad_vocab(parts[0], 320)
    assert [continue_alone(parts[0], task, ends) for task in tasks] == plain
    assert together(parts, tasks, ends) == plain


def test_it_can_be_broken_off(parts: Parts) -> None:
    tasks = tasks_of(parts)
    asked: list[int] = []

    def is_over() -> bool:
        asked.append(1)
        return len(asked) > 3

    assert len(continue_alone(parts[0], tasks[0], [], is_over)) == 4
    asked.clear()
    assert [len(new) for new in together(parts, tasks, [], is_over=is_over)] == [3] * 6
