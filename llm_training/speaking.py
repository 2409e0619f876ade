"""Letting the model speak: what it makes of the run's prompts."""

from __future__ import annotations

from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from llm_training.generation import generate_sample
from llm_training.ranks import tensor_parallel_size
from llm_training.run import Run

# One process can then let the model speak without the others.
WHOLE_MODEL_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def speak(run: Run) -> None:
    """Lets the model speak as it is now, where one process holds it whole."""
    if run.tokenizer is None or run.arguments.sample_prompt is None:
        run.tracking.say("SAMPLE: there is no --sample_prompt to continue, or no tokenizer")
    elif (
        run.accelerator.distributed_type not in WHOLE_MODEL_TYPES
        or tensor_parallel_size(run.accelerator) > 1
    ):
        run.tracking.say("SAMPLE: no process holds the whole model; look at best/ or final/")
    elif run.accelerator.is_main_process:
        with run.meter.paused(), run.deadline.pause():
            run.tracking.say(f"sample step {run.state.step} | {sample(run, run.network)}")


def final_sample(run: Run, exported: PreTrainedModel | None) -> str | None:
    """What the exported model makes of the prompt, where one is given; None on other ranks.

    The live one cannot speak alone on rank 0, where its weights lie on all of them.
    """
    speaker = exported
    if speaker is None and run.accelerator.num_processes == 1:  # memory was too short to open it
        speaker = run.network
    if run.tokenizer is None or run.arguments.sample_prompt is None or speaker is None:
        return None
    return sample(run, speaker)


def sample(run: Run, speaker: PreTrainedModel) -> str:
    """What `speaker`, which this process holds whole, makes of the prompt."""
    assert run.tokenizer is not None and run.arguments.sample_prompt is not None
    with run.accelerator.autocast():
        return generate_sample(
            speaker,
            run.tokenizer,
            run.arguments.sample_prompt,
            max_new_tokens=run.arguments.sample_max_new_tokens,
            temperature=run.arguments.sample_temperature,
            seed=run.state.seed,
        )
