"""Proves of conversations what a user counts on, from their text to the model that answers.

Packed in a row they give the loss and the gradients of each alone. A small run learns to end its
answers, its folder holds the template and the tokens that end them, and what it was told in
training is what it is asked with afterwards.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from arguments import Arguments
from llm_training import generate
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.all_sources import write_chat_template
from llm_training.data.documents.chat import Conversations
from llm_training.data.documents.sources import Document
from llm_training.data.ledger import Ledger
from llm_training.data.prepared import PreparedData
from llm_training.data.rows.store_rows import PackedRows
from llm_training.data.tokens.encoding import TextEncoder
from llm_training.data.tokens.token_store import TokenArray
from llm_training.data.tokens.tokenizers import train_tokenizer
from tests.small_runs import train_small

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "".join(map(chr, range(32, 127))) + "\n"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 96},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
    },
}


class Part:
    """What the encoder is given."""

    def __init__(self, document: Document):
        self.document = document


def chat_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("char", [CHATML, WORDS], 0, special_tokens=SPECIAL)


# ------------------------------------------------------------------------------------ the loss


def talks(count: int) -> list[list[dict[str, str]]]:
    """Conversations of one to three questions, of 30 to 90 tokens."""
    draw = random.Random(0)
    return [
        [
            {"role": role, "content": "".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "."}
            for _ in range(draw.randint(1, 2))
            for role in ("user", "assistant")
        ]
        for _ in range(count)
    ]


def stores_of(count: int) -> list[TokenArray]:
    """Each conversation as a store of its own."""
    tokenizer = chat_tokenizer()
    formatted = Conversations(tokenizer, messages_column="m", chat_template=CHATML)
    stores = []
    for i, talk in enumerate(talks(count)):
        text, spans = formatted.render({"m": talk}, f"row {i}")
        part = Part(Document(text, len(text), None, f"row {i}", learned=spans))
        [(_, ids, learned)] = TextEncoder(tokenizer).encode([part])
        stores.append(TokenArray(ids, np.array([len(ids)], np.uint64), learned))
    return stores


def joined(stores: list[TokenArray]) -> TokenArray:
    return TokenArray(
        np.concatenate([store.tokens for store in stores]),
        np.cumsum([store.num_tokens for store in stores]).astype(np.uint64),
        np.concatenate([store.learned for store in stores if store.learned is not None]),
    )


def judge(
    network: CausalLMWithLoss, rows: PackedRows, *, in_evaluation: bool
) -> tuple[float, int, list[Tensor]]:
    """The loss summed over all rows, how many tokens it is of, and the gradients of the sum."""
    batch = rows.batch(np.arange(rows.num_rows))
    batch["labels"][:, 0] = -100  # nothing stands before it: it is not predicted anyway
    count = int((batch["labels"] != -100).sum())
    network.zero_grad()
    with torch.set_grad_enabled(not in_evaluation):
        loss = network(**batch, per_row=in_evaluation)[0].sum()
    if in_evaluation:
        return float(loss), count, []
    loss.backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return float(loss.detach()), count, gradients


@pytest.mark.parametrize("in_evaluation", [False, True])
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_conversations_are_learned_as_if_each_stood_alone(
    model_type: str, is_chunked: bool, in_evaluation: bool
) -> None:
    stores = stores_of(12)
    packed = PackedRows(joined(stores), 96, document_mask=True)
    assert packed.num_rows < 9  # several share a row
    assert len({store.num_tokens for store in stores}) > 6
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=len(chat_tokenizer()), **MODELS[model_type]
    )
    network = CausalLMWithLoss(AutoModelForCausalLM.from_config(config), chunked_loss=is_chunked)
    network.eval()  # dropout would draw otherwise for other shapes
    together = judge(network, packed, in_evaluation=in_evaluation)
    alone = [
        judge(
            network,
            PackedRows(store, store.num_tokens, document_mask=False),
            in_evaluation=in_evaluation,
        )
        for store in stores
    ]
    count = sum(number for _, number, _ in alone)
    assert together[1] == count > 100
    assert together[0] / count == pytest.approx(sum(loss for loss, _, _ in alone) / count, abs=1e-5)
    for i, gradient in enumerate(together[2]):
        expected = torch.stack([gradients[i] for _, _, gradients in alone]).sum(0)
        torch.testing.assert_close(gradient / count, expected / count, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- the template


def with_template(**changes: Any) -> tuple[str | None, list[str]]:
    """What the tokenizer has once the data is prepared, and what was said."""
    lines: list[str] = []
    data = PreparedData(
        train=None,
        validation=None,
        tokenizer=chat_tokenizer(),
        vocab_size=1,
        fingerprint="",
        ledger=Ledger(),
    )
    write_chat_template(data, Arguments(**changes), lines.append)
    assert data.tokenizer is not None
    return data.tokenizer.chat_template, lines


def test_the_tokenizer_gets_the_template_that_conversations_are_written_with() -> None:
    assert with_template(messages_column="m", chat_template=CHATML) == (CHATML, [])
    assert with_template() == (None, [])  # text


def test_of_a_mixture_the_template_of_its_conversations_counts() -> None:
    other = CHATML.replace("assistant\n", "assistant\n\n")
    text, chat = {"weight": 1}, {"weight": 1, "messages_column": "m", "chat_template": CHATML}
    assert with_template(train_mixture={"a": text, "b": chat}) == (CHATML, [])
    template, lines = with_template(
        train_mixture={"a": text, "b": chat, "c": chat | {"chat_template": other}}
    )
    assert template == CHATML
    assert [line.startswith("WARNING: the sources b and c have different") for line in lines] == [1]


def test_a_template_without_a_token_that_ends_a_turn_is_told() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    _, [line] = with_template(messages_column="m", chat_template=plain)
    assert "no special token ends a turn" in line
    shipped = (ROOT / "train_configs/chat_templates/plain.jinja").read_text("utf-8")
    assert with_template(messages_column="m", chat_template=shipped) == (shipped, [])


# --------------------------------------------------------------- a miniature of a real case


def problems(count: int) -> list[dict[str, str]]:
    """Sums of two digits; an answer ends in a line `#### n`."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        rows.append({"question": f"{a} and {b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"})
    return rows


ASKED = "<|im_start|>user\n3 and 4?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned to answer, by a template that its tokenizer has not."""
    place = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        rows = [json.dumps(row) + "\n" for row in problems(400)]
        Path("problems.jsonl").write_text("".join(rows), encoding="utf-8")
        Path("chat.jinja").write_text(CHATML, encoding="utf-8")
        chat_tokenizer().save_pretrained("tokenizer")
        return train_small(
            place,
            config_overrides={"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128},
            dropout=0.0,
            train_file="problems.jsonl",
            prompt_column="question",
            completion_column="answer",
            chat_template="chat.jinja",
            tokenizer_name="./tokenizer",
            block_size=128,
            global_batch_size=8,
            max_steps=200,
            num_threads=1,  # the same bits on every machine of a kind
            learning_rate=5e-3,
            warmup_steps=10,
            eval_steps=60,
            save_steps=60,
            save_best=True,
            sample_prompt=["5 and 2?", ASKED],  # as a question, and as the template writes it
            logging_steps=20,
        )


def ids_of_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]


@pytest.mark.parametrize("which", ["final", "best"])
def test_the_model_is_saved_with_its_template_and_what_ends_a_turn(tuned: Path, which: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned / which)
    assert tokenizer.chat_template == CHATML
    settings = json.loads((tuned / which / "generation_config.json").read_text("utf-8"))
    assert settings["eos_token_id"] == ids_of_ends(tokenizer)
    assert tokenizer.eos_token == "<|endoftext|>"  # of the tokenizer, it stays


def test_every_answer_has_the_form_and_ends_by_itself(tuned: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned / "final")
    model = AutoModelForCausalLM.from_pretrained(tuned / "final")
    for row in problems(430)[400:]:
        turns = [{"role": "user", "content": row["question"]}]
        asked = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
        new = tokens[asked["input_ids"].shape[1] :].tolist()
        assert new[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert re.search(r"\n#### \d+$", tokenizer.decode(new[:-1])), tokenizer.decode(new)


def test_it_answers_in_the_terminal_and_ends(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(folder: Path) -> str:
        words = [folder, "--chat", "--prompt", "3 and 4?", "--temperature", 0]
        assert generate.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    said = answer(tuned)
    assert re.fullmatch(r"\d\+\d=\d+\n#### \d+\n", said)
    # A model that was exported without the token, or an adapter, is told to end there too.
    tokenizer = AutoTokenizer.from_pretrained(tuned / "final")
    other, turn = map(tokenizer.convert_tokens_to_ids, ("~", "<|im_end|>"))
    settings = tuned / "final" / "generation_config.json"
    before = settings.read_text("utf-8")
    settings.write_text(json.dumps(json.loads(before) | {"eos_token_id": other}), encoding="utf-8")
    asked: list[Any] = []
    monkeypatch.setattr(generate, "speak", lambda model, *_: asked.append(model.generation_config))
    try:
        answer(tuned / "final")
    finally:
        settings.write_text(before, encoding="utf-8")
    assert asked[0].eos_token_id == [other, turn]


def test_samples_of_the_run_end_there_too(tuned: Path) -> None:
    lines = (tuned / "samples.jsonl").read_text("utf-8").splitlines()
    last = {
        sample["prompt"]: sample["text"]
        for sample in map(json.loads, lines)
        if sample["step"] == 200 and sample["kind"] == "greedy"
    }
    # One was given as a question, one as the template writes it: both are asked alike.
    assert [*last] == [ASKED.replace("3 and 4?", "5 and 2?"), ASKED]
    for text in last.values():
        assert re.fullmatch(r"\d\+\d=\d+\n#### \d+", text)


def test_the_snippet_of_the_model_card_asks_by_the_template(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (tuned / "final" / "README.md").read_text("utf-8")
    [code] = re.findall(r"## Use\n\n```python\n(.*?)```", card, re.S)
    assert "apply_chat_template" in code
    monkeypatch.chdir(tuned / "final")
    exec(compile(code, "README.md", "exec"), {})
    assert "assistant\n" in capsys.readouterr().out


def test_a_continued_run_has_the_same_template(tuned: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tuned.parent)
        settings = json.loads(Path("settings.json").read_text("utf-8"))
        settings |= {"warmup_steps": 0, "eval_steps": None, "save_best": False, "save_steps": 1}
        del settings["output_dir"], settings["sample_prompt"]
        for max_steps in (1, 2):
            folder = train_small(tuned.parent, "again", **settings | {"max_steps": max_steps})
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template == CHATML
    settings = json.loads((folder / "final" / "generation_config.json").read_text("utf-8"))
    assert len(settings["eos_token_id"]) == 2
