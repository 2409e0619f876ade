"""Letting the model speak: what it makes of the run's prompts, at a step and at the end.

Every rank calls these. Where one process holds the whole model, the first one speaks alone, and the
others wait for it in their next exchange. Else all compute every token together.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arguments import holds_conversations, mixture_sources
from llm_training.data.rows.store_rows import IGNORE_INDEX, Rows
from llm_training.generation import (
    Task,
    chat_prompt,
    continue_alone,
    continue_together,
    end_tokens,
    make_task,
    text_after,
)
from llm_training.ranks import context_parallel_size, sum_over_ranks, tensor_parallel_size
from llm_training.run import Run
from llm_training.samples import Kind, Sample, append_samples, read_samples, short_line
from llm_training.stopping import decide

# One process can then let the model speak without the others.
WHOLE_MODEL_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PROMPT_TOKENS = 32  # of a validation document
MAX_ROWS_TRIED = 32  # for one
CONSOLE_WIDTH = 100  # where it is no terminal


def speak(run: Run, *, is_ordered: bool = False) -> None:
    """Lets the model speak as it is now, and says in short what it made of each prompt.

    Args:
        is_ordered: whether somebody asked for it, and is told also what was made before, or why
            there is nothing.
    """
    if (reason := why_silent(run)) is not None:
        if is_ordered or run.state.step == 0:
            run.tracking.say(f"SAMPLE: {reason}")
        return
    samples, is_new = samples_now(run)
    if is_new or is_ordered:
        width = shutil.get_terminal_size((CONSOLE_WIDTH, 24)).columns
        for sample in samples:
            run.tracking.say(short_line(sample, width))


def final_samples(run: Run, exported: PreTrainedModel | None) -> list[dict[str, Any]]:
    """What the model makes of the prompts at the end, as result.json has it; empty on other ranks.

    Args:
        exported: as `export_model` returned it. It speaks for a live one that cannot.
    """
    if why_silent(run) is None:
        return [dataclasses.asdict(sample) for sample in samples_now(run)[0]]
    if not has_prompts(run) or exported is None:
        return []
    with run.accelerator.autocast():
        samples = speak_alone(run, exported)
    keep(run, samples)
    return [dataclasses.asdict(sample) for sample in samples]


def why_silent(run: Run) -> str | None:
    """Why the live model cannot speak; None where it can. The same on every rank."""
    if not has_prompts(run):
        return "there is no --sample_prompt to continue, or no tokenizer"
    if context_parallel_size(run.accelerator) > 1:
        return (
            "the ranks share the positions of a row (context parallelism), and a text that grows"
            " cannot be shared; the model speaks at the end"
        )
    return None


def has_prompts(run: Run) -> bool:
    """Whether there is something to continue, and a tokenizer to read and write it."""
    takes_rows = run.arguments.sample_validation_prompts > 0 and main_rows(run) is not None
    return run.tokenizer is not None and (bool(run.arguments.sample_prompt) or takes_rows)


def samples_now(run: Run) -> tuple[list[Sample], bool]:
    """The samples of this step on rank 0, and whether they are new: a step has them once.

    A signal breaks them off: then the run ends, and the next start begins with them.
    """
    samples: list[Sample] = []
    if run.stop is not None:
        return samples, False
    if run.accelerator.is_main_process:
        samples = known_samples(run)
    (is_known,) = sum_over_ranks(run.accelerator, float(bool(samples)))
    if is_known:
        return samples, False
    with run.meter.paused(), run.deadline.pause(), uncompiled(run):
        if not holds_whole_model(run.accelerator):
            samples = speak_together(run)
        elif run.accelerator.is_main_process:
            with run.accelerator.autocast():
                samples = speak_alone(run, run.network)
        keep(run, samples)
        run.stop = decide(sum_over_ranks(run.accelerator, *run.request.votes())).stop
    return samples, True


def known_samples(run: Run) -> list[Sample]:
    """Those of this step that were made already; none where they cannot be read."""
    try:
        found = read_samples(run.output.samples)
    except OSError as error:  # the other ranks wait, and the training is worth more
        run.tracking.say(f"WARNING: {run.output.samples} cannot be read: {error}")
        return []
    return [sample for sample in found if sample.step == run.state.step]


def holds_whole_model(accelerator: Accelerator) -> bool:
    """Whether this process could speak without the others."""
    is_split = tensor_parallel_size(accelerator) > 1
    return accelerator.distributed_type in WHOLE_MODEL_TYPES and not is_split


def uncompiled(run: Run) -> AbstractContextManager[Any]:
    """Each length of a text would be compiled anew."""
    if not run.arguments.torch_compile:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def keep(run: Run, samples: list[Sample]) -> None:
    """Writes the samples down, where there are some."""
    if not samples:
        return
    try:
        append_samples(run.output.samples, samples)
    except OSError as error:  # the training is worth more
        run.tracking.say(f"WARNING: samples of step {run.state.step} are not kept: {error}")


# --------------------------------------------------------------------------------------- speaking


def speak_alone(run: Run, speaker: PreTrainedModel) -> list[Sample]:
    """What `speaker`, which this process holds whole, makes of each prompt.

    Other ranks wait meanwhile, and would give up after `ddp_timeout`: in half of it, all is done.
    A fault is told and no more: the training is worth more than a sample.
    """
    assert run.tokenizer is not None
    is_awaited = run.accelerator.num_processes > 1
    is_over = over_after(run, run.arguments.ddp_timeout / 2 if is_awaited else math.inf)
    samples: list[Sample] = []
    try:
        tasks = tasks_of(run, speaker)
        ends = end_tokens(speaker, run.tokenizer)
        for prompt, task in tasks:
            new = continue_alone(speaker, task, ends, is_over)
            if is_over():
                break
            samples.append(sample_of(run, prompt, task, new))
    except Exception as error:
        tell_fault(run, error)
        return []
    if run.request.reason is not None:  # the next start makes them
        return []
    if left := len(tasks) - len(samples):
        run.tracking.say(
            f"WARNING: {left} of {len(tasks)} samples of step {run.state.step} are left out: the"
            " other ranks wait, and half of --ddp_timeout is over. Give fewer prompts, or a smaller"
            " --sample_max_new_tokens."
        )
    return samples


def speak_together(run: Run) -> list[Sample]:
    """What all ranks together make of each prompt; rank 0 gets the samples."""
    assert run.tokenizer is not None
    tasks: list[tuple[str, Task]] = []
    if run.accelerator.is_main_process:
        try:
            tasks = tasks_of(run, run.network)
        except Exception as error:  # the other ranks wait for the tasks: then there are none
            tell_fault(run, error)
    found = continue_together(
        run.accelerator,
        run.model,
        run.network,
        [task for _, task in tasks],
        end_tokens(run.network, run.tokenizer),
        over_after(run, math.inf),
    )
    if not tasks or run.request.reason is not None:  # the next start makes them
        return []
    return [
        sample_of(run, prompt, task, new) for (prompt, task), new in zip(tasks, found, strict=True)
    ]


def tell_fault(run: Run, error: Exception) -> None:
    """Says in one line why this step has no samples."""
    told = " ".join(f"{type(error).__name__}: {error}".split())
    run.tracking.say(f"WARNING: no sample at step {run.state.step} ({told})")


def over_after(run: Run, seconds: float) -> Callable[[], bool]:
    """What tells, from now on, when to break off: after so many seconds, or at a signal."""
    give_up_at = time.monotonic() + seconds
    return lambda: run.request.reason is not None or time.monotonic() >= give_up_at


def tasks_of(run: Run, model: PreTrainedModel) -> list[tuple[str, Task]]:
    """Each prompt with what is to be done: once greedily, and once at random if asked for."""
    arguments = run.arguments
    assert run.tokenizer is not None
    temperatures = sorted({0.0, arguments.sample_temperature})
    return [
        (
            prompt,
            make_task(
                model,
                run.tokenizer,
                prompt,
                max_new_tokens=arguments.sample_max_new_tokens,
                temperature=temperature,
                # With the same draws, all prompts would be continued alike.
                seed=run.state.seed + number,
            ),
        )
        for number, prompt in enumerate(prompts_of(run))
        for temperature in temperatures
    ]


def sample_of(run: Run, prompt: str, task: Task, new: list[int]) -> Sample:
    """The sample that the tokens `new` make."""
    assert run.tokenizer is not None
    kind: Kind = "sampled" if task.temperature else "greedy"
    text = text_after(run.tokenizer, task.ids, new)
    return Sample(run.state.step, run.state.tokens, prompt, kind, text)


# ---------------------------------------------------------------------------------------- prompts


def prompts_of(run: Run) -> list[str]:
    """The prompts of the run, the same at every step, each once."""
    prompts = list(run.arguments.sample_prompt)
    if run.tokenizer is not None and is_chat(run):
        prompts = [as_question(run.tokenizer, prompt) for prompt in prompts]
    number, rows = run.arguments.sample_validation_prompts, main_rows(run)
    if rows is not None and run.tokenizer is not None:
        prompts += validation_prompts(rows, run.tokenizer, number)
    return list(dict.fromkeys(prompts))


def is_chat(run: Run) -> bool:
    """Whether the run learns conversations and nothing else, by a template."""
    sources = mixture_sources(run.arguments).values()
    has_template = bool(getattr(run.tokenizer, "chat_template", None))
    return has_template and all(map(holds_conversations, sources))


def as_question(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as what a user says first, up to where the assistant begins to speak.

    One that begins as the template itself begins a conversation is taken as it is.
    """
    mark = "what a user says"
    opening, _, _ = chat_prompt(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
    if opening and prompt.startswith(opening):
        return prompt
    return chat_prompt(tokenizer, [{"role": "user", "content": prompt}])


def main_rows(run: Run) -> Rows | None:
    """The main validation set, or the first one where there are others alone."""
    return run.validation.get("", next(iter(run.validation.values()), None))


def validation_prompts(rows: Rows, tokenizer: PreTrainedTokenizerBase, number: int) -> list[str]:
    """The beginnings of so many documents, which are spread evenly over all rows.

    Of a text the first 32 tokens, or half of it where it is shorter; of a conversation all that
    stands before the first answer to be learned.
    """
    number = min(number, rows.num_rows)
    starts = [(2 * i + 1) * rows.num_rows // (2 * number) for i in range(number)]
    prompts = []
    for start, stop in pairwise([*starts, rows.num_rows]):
        ids = beginning_of(rows, start, stop)
        text = str(tokenizer.decode(ids))
        # A character may have been cut: its bytes alone are no text.
        while text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) > 1:
            ids = ids[:-1]
            text = str(tokenizer.decode(ids))
        prompts.append(text)
    return prompts


def beginning_of(rows: Rows, start: int, stop: int) -> list[int]:
    """The first tokens of a document that begins in one of the rows [start, stop).

    It is the first that is long enough, else the longest, and that of row `start` where none is
    known to begin.
    """
    best = (0, start, 0)  # tokens, row, place in it
    for row in range(start, min(stop, start + MAX_ROWS_TRIED)):
        lengths = rows.documents(row)
        # The first may have begun in the row before.
        begun = [(lengths[i], row, sum(lengths[:i])) for i in range(1, len(lengths))]
        best = max([best, *begun], key=lambda found: found[0])
        if best[0] >= 2 * PROMPT_TOKENS:
            break
    length, row, at = best if best[0] else (sum(rows.documents(start)), start, 0)
    batch = rows.batch(np.array([row], np.int64))
    ids, labels = (batch[name][0, at : at + length] for name in ("input_ids", "labels"))
    learned = (labels[1:] != IGNORE_INDEX).nonzero().flatten()
    first_learned = int(learned[0]) + 1 if len(learned) else length
    end = first_learned if first_learned > 1 else min(PROMPT_TOKENS, max(1, length // 2))
    found: list[int] = ids[:end].tolist()
    return found
