"""Lets a trained model continue a prompt, or chat, in the terminal, word by word as it is made.

Started as `python -m llm_training.generate runs/NAME`, with the folder of a run (its final/, else
its best/), or of any model that transformers opens; an adapter is put on the model it names.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_CHARACTERS = 400  # of what another library says of a misfit
MARKS = ("config.json", ADAPTER)
END_HINT = "An empty line or Ctrl-D ends; Ctrl-C ends an answer."


class GenerateError(ValueError):
    """There is no model that could speak; the message says why and what to do."""


def main(words: Sequence[str] | None = None) -> int:
    """Reads the command line and speaks; the exit code."""
    given = build_parser().parse_args(words)
    try:
        folder = find_model(Path(given.folder), given.which)
        model, tokenizer = open_model(folder, trust_remote_code=given.trust_remote_code)
        if given.chat and not tokenizer.chat_template:
            raise GenerateError(
                f"--chat: the tokenizer in {folder} has no chat template, so the model was hardly"
                " trained on conversations. Leave --chat out, and give a text to continue."
            )
        if given.chat:
            end_at_turns(model, tokenizer)
        print(describe(folder, model), file=sys.stderr)
        speak(model, tokenizer, given)
    except GenerateError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_training.generate",
        description="Lets a trained model continue a prompt, or chat.",
    )
    parser.add_argument("folder", help="folder of a run, a model or an adapter")
    parser.add_argument(
        "--which", choices=("final", "best"), help="of a run; default: final, else best"
    )
    parser.add_argument(
        "--prompt",
        help="text to continue, or first words of a chat; default: asked for, line by line",
    )
    parser.add_argument(
        "--chat", action="store_true", help="speak in turns, by the tokenizer's chat template"
    )
    parser.add_argument("--system", help="with --chat, what the system's turn says")
    parser.add_argument(
        "--max_new_tokens", type=_positive, default=256, help="length of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.7,
        help="0: always the likeliest token (default: 0.7)",
    )
    parser.add_argument("--top_k", type=_positive, help="draw from the k likeliest tokens alone")
    parser.add_argument(
        "--top_p", type=_share, help="draw from the likeliest tokens that sum to this probability"
    )
    parser.add_argument(
        "--repetition_penalty", type=_not_negative, default=1.0, help="above 1: repeats itself less"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")
    parser.add_argument(
        "--num_samples", type=_positive, default=1, help="different continuations of a prompt"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that lies beside the model; read it first",
    )
    return parser


def find_model(folder: Path, which: str | None = None) -> Path:
    """The folder that holds the model: this one, or the final/ or best/ of a run.

    Raises:
        GenerateError: there is none.
    """
    if not folder.is_dir():
        raise GenerateError(f"{folder} is no folder. Name a run's output_dir or a model's folder.")
    if which is None and _is_model(folder):
        return folder
    for name in (which,) if which else ("final", "best"):
        if _is_model(folder / name):
            return folder / name
    sought = f"{which}/" if which else "final/ or best/"
    advice = "Name a folder with a config.json or an adapter_config.json."
    if (folder / "checkpoints").is_dir():
        advice = (
            "The run has not ended: final/ is written at its end, best/ with --save_best, and"
            f" `touch {folder / 'SAMPLE'}` lets it speak while it trains."
        )
    raise GenerateError(f"{folder} holds no model and no {sought}. {advice}")


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def open_model(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the best device there is, in bf16 on GPUs and fp32 elsewhere, and its tokenizer.

    Args:
        folder: of the model, or of an adapter.
        trust_remote_code: whether code that lies beside them may run.

    Raises:
        GenerateError: the folder lacks something, holds another model than it says, or needs
            pickles of others, or code that may not run.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _base_of(folder) if (folder / ADAPTER).is_file() else folder
    words = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused with their names
            output_loading_info=True,
            **words,
        )
        model, found = opened
        _refuse_missing(base, found)
        if base != folder:
            model = _with_adapter(model, base, folder)
        has_own = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_own else base, **words)
    except GenerateError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise GenerateError(_cannot_open(folder, error)) from error
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(device).eval(), tokenizer


def end_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets an answer end at what ends one by the chat template; adapters do not tell the model."""
    from llm_training.data.documents.chat_templates import end_of_turn
    from llm_training.generation import add_end_token

    add_end_token(model, tokenizer, end_of_turn(tokenizer))


def _base_of(folder: Path) -> Path:
    name = json.loads((folder / ADAPTER).read_text("utf-8")).get("base_model_name_or_path")
    base = Path(str(name))
    if not base.is_dir():
        raise GenerateError(
            f"{folder} holds an adapter for {name}, which is no folder here. Put the model there,"
            f" or write its folder into {folder / ADAPTER} (base_model_name_or_path)."
        )
    return base


def _cannot_open(folder: Path, error: Exception) -> str:
    told = " ".join(str(error).split())
    if "trust_remote_code" in told:
        return (
            f"{folder} needs Python code that lies beside it, and such code may do anything on"
            " this machine. Read it; then give --trust_remote_code."
        )
    return f"{folder} cannot be opened: {told}"


def _refuse_missing(base: Path, found: dict[str, Any]) -> None:
    """Refuses a model of which a part would be random."""
    wrong = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if wrong:
        raise GenerateError(
            f"{base} does not hold the weights of the model that its config.json describes:"
            f" {len(wrong)} are missing or have another shape ({', '.join(wrong[:4])}). Name a"
            " folder whose files belong together."
        )


def _with_adapter(model: Any, base: Path, folder: Path) -> Any:
    try:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open
    except ImportError:
        raise GenerateError(
            f"{folder} holds an adapter, which takes the package peft: pip install peft"
        ) from None
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise GenerateError(f"{folder} holds an adapter, but no {weights.name}: copy it there.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what does not fit; it is refused below
            adapted = PeftModel.from_pretrained(model, folder)
        with safe_open(weights, framework="pt") as opened:
            names = {key.removesuffix(".weight") for key in opened.keys()}  # noqa: SIM118
    except (ValueError, RuntimeError) as error:
        raise GenerateError(_does_not_fit(folder, base, str(error))) from error
    places = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    strange = sorted(names ^ {key.removesuffix(".weight") for key in places})
    if strange:
        told = f"{len(strange)} weights of the one have no place in the other ({strange[0]})"
        raise GenerateError(_does_not_fit(folder, base, told))
    return adapted


def _does_not_fit(folder: Path, base: Path, reason: str) -> str:
    reason = " ".join(reason.split())
    if len(reason) > MOST_CHARACTERS:
        reason = f"{reason[:MOST_CHARACTERS]} ..."
    return (
        f"The adapter in {folder} does not fit the model in {base}: {reason.rstrip('.')}. It was"
        f" trained with another model: write the folder of that into {folder / ADAPTER}"
        " (base_model_name_or_path)."
    )


def describe(folder: Path, model: PreTrainedModel) -> str:
    """One line on what speaks."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{folder}: {model.config.model_type}, {count:,} parameters, on {model.device}"


def speak(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: argparse.Namespace
) -> None:
    """Continues the prompt, or every line that is typed, and streams it to stdout."""
    import torch

    torch.manual_seed(given.seed)
    turns = [{"role": "system", "content": given.system}] if given.system else []
    for prompt in _prompts(given):
        if given.chat:
            turns.append({"role": "user", "content": prompt})
            answer = continue_once(model, tokenizer, chat_ids(tokenizer, turns), given)
            turns.append({"role": "assistant", "content": answer})
            continue
        for _ in range(given.num_samples):
            sys.stdout.write(prompt)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            continue_once(model, tokenizer, ids, given)


def _prompts(given: argparse.Namespace) -> Iterator[str]:
    """The prompt that was given, the whole of a pipe, or lines as they are typed."""
    if given.prompt is not None:
        yield given.prompt
        return
    if not sys.stdin.isatty():
        text = sys.stdin.read()
        if not text.strip():
            raise GenerateError("there is nothing to continue: give --prompt, or a text by a pipe")
        yield text
        return
    print(END_HINT, file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        yield line


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the assistant begins to speak.

    Raises:
        GenerateError: the template does not take these turns.
    """
    from llm_training.generation import chat_prompt

    try:
        text = chat_prompt(tokenizer, turns)
    except Exception as error:  # a template may raise anything
        raise GenerateError(f"the chat template does not take these turns: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def continue_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    given: argparse.Namespace,
) -> str:
    """Streams one continuation of `ids` to stdout and returns it.

    A text that fills the model's positions is cut at its beginning, to leave place for an answer.
    """
    import torch
    from transformers import TextStreamer

    positions = getattr(model.config, "max_position_embeddings", None) or 0
    length = given.max_new_tokens
    if positions > 0:
        length = min(length, max(1, positions // 2))
        ids = ids[-(positions - length) :]
    if not ids:
        start = tokenizer.bos_token_id
        ids = [start if start is not None else tokenizer.eos_token_id]
    prompt = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": given.temperature > 0}
    if given.temperature > 0:
        top_k = given.top_k or 0  # 0: all tokens; transformers would take 50
        sampling |= {"temperature": given.temperature, "top_k": top_k, "top_p": given.top_p or 1.0}
    try:
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=length,
                repetition_penalty=given.repetition_penalty or 1.0,
                pad_token_id=_first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()
        return ""
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {word}")
    return number


def _not_negative(word: str) -> float:
    number = float(word)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {word}")
    return number


def _share(word: str) -> float:
    number = float(word)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0, at most 1, not {word}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
