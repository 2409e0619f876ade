"""A run lets its model speak at its steps and at its end, each text once, and is the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import train_llm
from llm_training import generation, speaking
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.rows.store_rows import PackedRows, StreamRows
from llm_training.data.tokens.token_store import TokenArray
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.ranks import RankError
from llm_training.samples import Sample, as_table, read_samples, table_of
from llm_training.speaking import beginning_of, validation_prompts
from tests.small_runs import curve, open_place, train_small, weights

Train = Callable[..., Path]
CHANGES: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2}
PROMPTS: dict[str, Any] = {
    "sample_prompt": ["Die 3", "Größe"],
    "sample_steps": 2,
    "sample_max_new_tokens": 6,
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return partial(train_small, open_place(tmp_path, monkeypatch), **CHANGES)


def samples_of(folder: Path) -> list[Sample]:
    return read_samples(folder / "samples.jsonl")


def tokens_of(folder: Path) -> dict[int, int]:
    return {0: 0} | {int(line["step"]): int(line["train/tokens"]) for line in curve(folder)}


def test_every_due_step_and_the_end_have_each_text_once(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(**PROMPTS | {"sample_steps": 3})
    samples, tokens = samples_of(folder), tokens_of(folder)
    assert [(s.step, s.prompt, s.kind) for s in samples] == [
        (step, prompt, kind)
        for step in (0, 3, 6)
        for prompt in ("Die 3", "Größe")
        for kind in ("greedy", "sampled")
    ]
    assert [s.tokens for s in samples] == [tokens[s.step] for s in samples]
    table = json.loads(table_of(folder / "samples.jsonl").read_text("utf-8"))
    assert table == as_table(folder / "samples.jsonl") and len(table["data"]) == 12
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert [Sample(**sample) for sample in result["samples"]] == samples[-4:]
    said = capsys.readouterr().out
    assert said.count('sample step 3 | greedy  | "Die 3" "') == 1
    assert said.count('\nSample   "Die 3"\n  greedy\n    ') == 1
    train_llm_says_it_again(train, capsys)


def train_llm_says_it_again(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is not trained again, and shows what it showed."""
    train(**PROMPTS | {"sample_steps": 3})
    said = capsys.readouterr().out
    assert "already holds this run, finished" in said
    assert '\nSample   "Größe"\n  greedy\n    ' in said


def test_a_run_with_samples_is_the_run_without(train: Train) -> None:
    plain, speaking_one = train("plain"), train("speaking", **PROMPTS)
    assert curve(speaking_one) == curve(plain)
    assert weights(speaking_one) == weights(plain)
    assert not (plain / "samples.jsonl").exists()
    assert json.loads((plain / "result.json").read_text("utf-8"))["samples"] == []


def test_without_a_temperature_there_is_the_greedy_text_alone(train: Train) -> None:
    changes = {"sample_temperature": 0.0, "sample_steps": None, "sample_max_new_tokens": 1}
    samples = samples_of(train(**PROMPTS | changes))
    assert [(s.step, s.kind, len(s.text)) for s in samples] == [(6, "greedy", 1)] * 2


def test_validation_documents_are_prompts_too(train: Train) -> None:
    changes = {"validation_split_percentage": 20, "eval_steps": 6, "document_separator": "line"}
    folder = train(sample_validation_prompts=2, sample_max_new_tokens=4, **changes)
    prompts = [s.prompt for s in samples_of(folder)]
    assert len(set(prompts)) == 2 and prompts[0] == prompts[1]
    assert all(prompt.startswith("Die ") for prompt in prompts), prompts


# ---------------------------------------------------------------------------- stops and mishaps


def die(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """The run ends at the call of `train_llm.name` at that step, as if by a kill."""
    called = getattr(train_llm, name)

    def call(run: train_llm.Run, *args: Any, **named: Any) -> Any:
        if run.state.step == step:
            raise RankError("the machine is gone")
        return called(run, *args, **named)

    monkeypatch.setattr(train_llm, name, call)


# Before a step, between samples and checkpoint, and after the last checkpoint.
@pytest.mark.parametrize(("name", "step"), [("compute_gradients", 3), ("save", 4), ("finish", 6)])
def test_a_killed_run_has_each_text_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    whole = train("whole", **PROMPTS)
    with monkeypatch.context() as patch:
        die(patch, name, step)
        parts = train("parts", code=1, **PROMPTS)
    with open(parts / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 2, "tokens"')  # a line that a kill has torn
    train("parts", **PROMPTS)
    assert samples_of(parts) == samples_of(whole)
    assert (parts / "samples.json").read_bytes() == (whole / "samples.json").read_bytes()
    assert curve(parts) == curve(whole)
    assert weights(parts) == weights(whole)


def test_a_run_that_begins_anew_keeps_no_text_of_before(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die(patch, "compute_gradients", 1)
        train(code=1, **PROMPTS)
    folder = train(**PROMPTS)
    assert [s.step for s in samples_of(folder)] == [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4


def test_texts_behind_the_point_to_which_a_run_goes_back_are_removed(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, counted = CausalLMWithLoss.forward, [0]

    def spoilt(self: CausalLMWithLoss, *args: Any, **named: Any) -> Any:
        loss, correct = forward(self, *args, **named)
        if self.training:
            counted[0] += 1
            if counted[0] in (6, 7):  # step 5 twice: the plan's estimate of memory is the first
                loss = loss * float("nan")
        return loss, correct

    monkeypatch.setattr(CausalLMWithLoss, "forward", spoilt)
    changes = PROMPTS | {"sample_steps": 1, "save_steps": 3, "sample_temperature": 0.0}
    folder = train(max_skipped_steps=1, max_rewinds=1, **changes)
    said = capsys.readouterr().out
    assert "step 5 left out" in said and "This run goes back to step 3." in said
    assert said.count('sample step 4 | greedy  | "Die 3"') == 2
    assert [s.step for s in samples_of(folder)] == [n for n in range(7) for _ in range(2)]


def test_a_fault_is_told_and_ends_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no cache\nfor this kind")

    monkeypatch.setattr(speaking, "continue_alone", fail)
    folder = train(**PROMPTS)
    said = capsys.readouterr().out
    assert "WARNING: no sample at step 2 (RuntimeError: no cache for this kind)" in said
    assert samples_of(folder) == []


def test_a_fault_before_the_first_word_is_told_where_all_ranks_speak(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no words")

    monkeypatch.setattr(speaking, "holds_whole_model", lambda accelerator: False)
    monkeypatch.setattr(speaking, "tasks_of", fail)
    folder = train(**PROMPTS)
    assert "WARNING: no sample at step 2 (RuntimeError: no words)" in capsys.readouterr().out
    assert samples_of(folder) == []


def test_what_cannot_be_read_is_told_and_ends_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(speaking, "read_samples", fail)
        train(**PROMPTS | {"sample_steps": 6})
    assert "samples.jsonl cannot be read: [Errno 5] Input/output" in capsys.readouterr().out


def test_what_cannot_be_written_is_told_and_ends_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speaking, "append_samples", fail)
    folder = train(**PROMPTS)
    said = capsys.readouterr().out
    assert "WARNING: samples of step 2 are not kept: [Errno 28] No space left" in said
    assert len(json.loads((folder / "result.json").read_text("utf-8"))["samples"]) == 4


def test_a_signal_breaks_off_and_the_next_start_speaks(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", **PROMPTS)
    continue_alone = generation.continue_alone

    def interrupted(model: Any, task: Any, ends: Any, is_over: Callable[[], bool]) -> list[int]:
        (request,) = requests
        if whole_run[0].state.step == 4:
            request._signal = 2
        return continue_alone(model, task, ends, is_over)

    requests: list[Any] = []
    whole_run: list[Any] = []
    build_run = train_llm.build_run

    def build(*args: Any) -> Any:
        whole_run[:] = [build_run(*args)]
        requests[:] = [whole_run[0].request]
        return whole_run[0]

    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "build_run", build)
        patch.setattr(speaking, "continue_alone", interrupted)
        parts = train("parts", code=130, **PROMPTS)
    assert [s.step for s in samples_of(parts)] == [0] * 4 + [2] * 4
    assert (parts / "checkpoints/last").resolve().name == "step-00000004"
    train("parts", **PROMPTS)
    assert samples_of(parts) == samples_of(whole)


def test_no_text_is_compiled() -> None:
    """Each length would be, and would push the code of the training out of the cache."""
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda numbers: numbers * 2, backend=backend)
    run: Any = SimpleNamespace(arguments=SimpleNamespace(torch_compile=True))
    with speaking.uncompiled(run):
        double(torch.zeros(2))
    assert compiled == []
    double(torch.zeros(2))
    assert len(compiled) == 1


# -------------------------------------------------------------------------------- several processes


def test_a_model_that_no_process_holds_whole_speaks_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train("alone", **PROMPTS)
    monkeypatch.setattr(speaking, "holds_whole_model", lambda accelerator: False)
    together = train("together", **PROMPTS)
    assert samples_of(together) == samples_of(alone)
    assert curve(together) == curve(alone)
    assert weights(together) == weights(alone)


def test_other_ranks_do_not_wait_for_ever(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, continue_alone = {"late": 0.0}, generation.continue_alone

    def slow(*args: Any) -> list[int]:
        clock["late"] += 6.0
        return continue_alone(*args)

    runs: list[Any] = []
    build_run = train_llm.build_run

    def build(*args: Any) -> Any:
        runs.append(build_run(*args))
        return runs[0]

    monkeypatch.setattr(train_llm, "build_run", build)
    train(ddp_timeout=20, **PROMPTS)
    (run,) = runs
    run.accelerator = SimpleNamespace(num_processes=2)
    now = time.monotonic
    monkeypatch.setattr(speaking.time, "monotonic", lambda: now() + clock["late"])
    monkeypatch.setattr(speaking, "continue_alone", slow)
    assert len(speaking.speak_alone(run, run.network)) == 1
    said = capsys.readouterr().out
    assert "WARNING: 3 of 4 samples of step 6 are left out: the other ranks wait" in said


# ------------------------------------------------------------------------------------------ prompts

ENDS = np.array([3, 90, 96, 200], np.uint64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("byte", ["abc"], 300)


def test_a_document_that_begins_in_the_rows_is_begun() -> None:
    tokens = np.arange(200, dtype=np.uint16)
    rows = StreamRows(TokenArray(tokens, ENDS), 80, keep_last=True)
    assert beginning_of(rows, 0, 1) == list(range(3, 3 + 32))  # of [0, 3) and [3, 80)
    assert beginning_of(rows, 1, 3) == list(range(96, 96 + 32))  # of [80, 90), [90, 96), [96, 160)
    assert beginning_of(rows, 2, 3) == list(range(160, 160 + 20))  # it began before: half of it
    assert beginning_of(StreamRows(TokenArray(tokens), 80), 1, 2) == list(range(80, 80 + 32))


def test_a_long_document_in_a_later_row_is_rather_begun() -> None:
    tokens = np.arange(400, dtype=np.uint16)
    rows = StreamRows(TokenArray(tokens, np.array([70, 170, 180, 400], np.uint64)), 80)
    assert beginning_of(rows, 0, 5) == list(range(180, 180 + 30))  # 60 tokens, rather than 10
    assert beginning_of(rows, 0, 2) == list(range(70, 75))


def test_of_a_conversation_all_before_the_answer_is_taken() -> None:
    tokens, learned = np.arange(200, dtype=np.uint16), np.zeros(200, np.uint8)
    learned[150:160] = 1
    store = TokenArray(tokens, np.array([200], np.uint64), learned)
    rows = PackedRows(store, 200, document_mask=True)
    assert beginning_of(rows, 0, 1) == list(range(150))


def test_prompts_are_spread_evenly_and_hold_whole_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = [f"{i}" + "ö" * 40 + "." for i in range(10)]
    ids = [tokenizer(text).input_ids for text in texts]
    assert len({len(one) for one in ids}) == 1
    tokens = np.array([token for one in ids for token in one], np.uint16)
    ends = np.cumsum([len(one) for one in ids]).astype(np.uint64)
    rows = StreamRows(TokenArray(tokens, ends), len(ids[0]))
    # 32 bytes are a digit, 15 characters and half of one.
    expected = [f"{i}" + "ö" * 15 for i in (2, 7)]
    assert validation_prompts(rows, tokenizer, 2) == expected
    assert len(validation_prompts(rows, tokenizer, 50)) == 10
    assert validation_prompts(rows, tokenizer, 0) == []
