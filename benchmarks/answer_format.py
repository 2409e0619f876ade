"""How often a model that was tuned on conversations ends its answer as its data does.

    python benchmarks/answer_format.py runs/finetune_conversations/final problems_validation.jsonl \
        --prompt_column question --completion_column answer --pattern '\\n#### -?[\\d,.]+$'

Each question is put by the tokenizer's chat template and answered with the likeliest token each
time, or a drawn one (`--temperature`), to the token that ends an answer or to the end of the
model's positions; questions of like lengths together. Counted are answers that end by themselves,
those that also match the pattern, and those of which what the pattern finds is that of the given
answer. Errors are one standard error over the questions.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from llm_training.generate import GenerateError, chat_ids, end_at_turns, open_model  # noqa: E402
from llm_training.generation import PLAIN, end_tokens  # noqa: E402

AT_ONCE = 25


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        is_ended: whether it ended by itself, before there was no room for more.
    """

    text: str
    is_ended: bool


def main() -> int:
    """Asks, counts and prints; the exit code."""
    given = build_parser().parse_args()
    rows = [json.loads(line) for line in given.file.read_text("utf-8").splitlines()]
    try:
        answers = ask(given, [row[given.prompt_column] for row in rows[: given.questions]])
    except GenerateError as error:
        print(f"answer_format: {error}", file=sys.stderr)
        return 1
    print("\n".join(report(answers, [row[given.completion_column] for row in rows], given.pattern)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a model or an adapter")
    parser.add_argument("file", type=Path, help="questions and answers, one object a line")
    parser.add_argument("--prompt_column", default="question")
    parser.add_argument("--completion_column", default="answer")
    parser.add_argument("--pattern", default=r"\n#### -?[\d,.]+$", help="a regular expression")
    parser.add_argument("--questions", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument(
        "--chat_template", type=Path, help="in place of the tokenizer's, for a model without one"
    )
    return parser


def ask(given: argparse.Namespace, questions: list[str]) -> list[Answer]:
    """The answer to each question."""
    model, tokenizer = open_model(given.folder)
    if given.chat_template is not None:
        tokenizer.chat_template = given.chat_template.read_text("utf-8")
    end_at_turns(model, tokenizer)
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in questions]
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, Answer] = {}
    for first in range(0, len(prompts), AT_ONCE):
        numbers = by_length[first : first + AT_ONCE]
        found = answer_together(model, tokenizer, [prompts[number] for number in numbers], given)
        answers |= zip(numbers, found, strict=True)
        print(f"{len(answers)} of {len(prompts)} answered", file=sys.stderr, flush=True)
    return [answers[number] for number in range(len(prompts))]


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    given: argparse.Namespace,
) -> list[Answer]:
    """The answers to some prompts, all as long as the longest prompt leaves room for."""
    width = max(map(len, prompts))
    ends = end_tokens(model, tokenizer)
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    limit = int(min(given.max_new_tokens, room - width))
    if limit <= 0:
        return [Answer("", is_ended=False)] * len(prompts)
    sampling = {"do_sample": True, "temperature": given.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(0)
    output = model.generate(  # type: ignore[operator]
        torch.tensor([[ends[0]] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=ends[0],
        **PLAIN | (sampling if given.temperature > 0 else {}),
    )
    answers = []
    for new in output[:, width:].tolist():
        end = next((place for place, token in enumerate(new) if token in ends), None)
        text = str(tokenizer.decode(new[:end], skip_special_tokens=True))
        answers.append(Answer(text, is_ended=end is not None))
    return answers


def report(answers: list[Answer], right: list[str], pattern: str) -> list[str]:
    """The shares, and the first three answers."""
    ended = [answer.is_ended for answer in answers]
    found = [re.search(pattern, a.text) if a.is_ended else None for a in answers]
    expected = [re.search(pattern, text) for text in right[: len(answers)]]
    pairs = zip(found, expected, strict=True)
    is_right = [a is not None and b is not None and a[0] == b[0] for a, b in pairs]
    lines = [
        f"ended by itself: {share(ended)}",
        f"and as the data: {share([match is not None for match in found])}",
        f"and right:       {share(is_right)}",
    ]
    return lines + [f"--- {answer.text!r}" for answer in answers[:3]]


def share(values: list[bool]) -> str:
    """How many are true, as a share with its standard error."""
    part = sum(values) / len(values)
    error = math.sqrt(part * (1 - part) / len(values))
    return f"{sum(values)} of {len(values)} = {part:.2f} ± {error:.2f}"


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
