"""Proves, through whole runs, that every kind of data trains, resumes and is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train_llm
from llm_training.argument_parsing import read_arguments
from llm_training.data.tokens.tokenizers import train_tokenizer

Train = Callable[..., Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def train(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the script in this process; returns the folder of the run, which must end well."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "model_type": "llama",
        "config_overrides": LLAMA,
        "train_file": str(text_folder),
        "tokenizer_name": "byte",
        "block_size": 48,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "eval_steps": 3,
        "eval_max_batches": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "mixed_precision": "fp32",
        "report_to": "none",
    }

    def run(name: str = "run", code: int = 0, **changes: Any) -> Path:
        base, file = tmp_path / "base.json", tmp_path / f"{name}.json"
        base.write_text(json.dumps(settings))
        file.write_text(json.dumps(changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert train_llm.main(read_arguments([str(base), str(file)], 1)) == code
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> str:
    texts = ["How many apples? 12 apples. Why? Because."]
    tokenizer = train_tokenizer("bpe", texts, 300, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat_tokenizer")
    return str(tmp_path / "chat_tokenizer")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int) -> list[dict[str, str]]:
    return [{"q": f"How many apples are {i} and 5?", "a": f"{i + 5} apples."} for i in range(count)]


def curve(folder: Path) -> list[dict[str, float]]:
    """What must be equal: every logged number that is not a time."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and "perf/" not in name}
        for line in lines
    ]


def state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "checkpoints/last/train_state.json").read_text()))


def weights(folder: Path) -> dict[str, list[Any]]:
    tensors = load_file(folder / "final/model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_the_hash_of_samples_does_not_depend_on_the_split(train: Train) -> None:
    whole = state(train("whole", per_device_train_batch_size=8))
    parts = state(train("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4))
    assert whole["sample_hash"] == parts["sample_hash"]
    other = state(train("other", per_device_train_batch_size=8, seed=1))
    assert other["sample_hash"] != whole["sample_hash"]


def test_the_ledger_of_a_run_adds_up(train: Train) -> None:
    folder = train(max_steps=None, num_train_epochs=1.0, eval_max_batches=None, block_size=512)
    ledger = json.loads((folder / "ledger.json").read_text())
    splits = ledger["documents"][""]["splits"]
    for split in ("train", "validation"):
        rows = ledger["rows"][split][""]
        assert rows["tokens"] == splits[split]["tokens"]
        reasons = ("row_starts", "document_starts", "not_learned", "truncated", "dropped")
        lost = sum(rows[reason] for reason in (*reasons, "leftover"))
        assert rows["predicted"] + lost == rows["tokens"]
    assert ledger["leakage"]["documents"] == splits["validation"]["documents"]
    # In an epoch, the loop predicts exactly what the ledger said.
    assert state(folder)["tokens"] == ledger["rows"]["train"][""]["predicted"]


def test_conversations_train_on_what_the_assistant_says(
    train: Train, chat_tokenizer: str, tmp_path: Path
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", questions(60))
    turns = [("user", "q"), ("assistant", "a")]
    messages = [
        {"messages": [{"role": role, "content": row[key]} for role, key in turns]}
        for row in questions(60)
    ]
    lists = write_rows(tmp_path / "lists.jsonl", messages)
    common = {"tokenizer_name": chat_tokenizer, "block_size": 96}
    one = train("one", train_file=pairs, prompt_column="q", completion_column="a", **common)
    two = train("two", train_file=lists, messages_column="messages", **common)
    assert curve(one) == curve(two)
    account = json.loads((two / "ledger.json").read_text())["rows"]["train"][""]
    assert account["not_learned"] > account["predicted"] > 0
    assert (two / "final/chat_template.jsonl").exists() or (
        two / "final/chat_template.jinja"
    ).read_text() == CHATML


def test_packed_conversations_have_the_loss_of_each_alone(
    train: Train, chat_tokenizer: str, tmp_path: Path
) -> None:
    """Best-fit rows under the document mask against rows that hold one conversation each."""
    file = write_rows(tmp_path / "pairs.jsonl", questions(40))
    columns = {"prompt_column": "q", "completion_column": "a"}
    common = {"train_file": file, "tokenizer_name": chat_tokenizer, **columns, "max_steps": 1}
    packed = train("packed", block_size=192, eval_max_batches=None, **common)
    alone = train("alone", block_size=60, eval_max_batches=None, **common)
    packed_rows, alone_rows = (
        json.loads((folder / "ledger.json").read_text())["rows"]["validation"][""]
        for folder in (packed, alone)
    )
    assert packed_rows["rows"] < alone_rows["rows"] == 2
    assert packed_rows["predicted"] == alone_rows["predicted"]
    first = [curve(folder)[0]["eval/loss"] for folder in (packed, alone)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_mixture_continues_bit_for_bit(train: Train, text_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["q"] + row["a"]} for row in questions(80)]
    mixture = {
        "code": {"train_file": str(text_folder), "weight": 3},
        "sums": {"train_file": write_rows(tmp_path / "sums.jsonl", rows), "drop_duplicates": True},
    }
    common = {"train_file": None, "train_mixture": mixture, "tokenizer_name": "bpe"}
    common |= {"vocab_size": 300, "document_mask": True}
    whole = train("whole", **common)
    train("parts", max_steps=3, **common)
    parts = train("parts", **common)
    assert state(parts)["sample_hash"] == state(whole)["sample_hash"]
    assert weights(parts) == weights(whole)
    assert curve(parts)[-1] == curve(whole)[-1]
    ledger = json.loads((whole / "ledger.json").read_text())
    assert set(ledger["rows"]["train"]) == {"code", "sums"}


def test_a_stream_continues_bit_for_bit_and_twice(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    for shard in range(3):
        rows = [{"text": row["q"] * 3} for row in questions(40)[shard::3]]
        write_rows(folder / f"train-{shard}.jsonl", rows)
    write_rows(folder / "validation.jsonl", [{"text": row["a"] * 9} for row in questions(30)])
    common = {"train_file": None, "dataset_name": str(folder), "streaming": True}
    common |= {"shuffle_buffer_size": 10}
    whole = train("whole", **common)
    train("parts", max_steps=1, **common)
    train("parts", max_steps=4, **common)
    parts = train("parts", **common)
    assert state(parts)["sample_hash"] == state(whole)["sample_hash"]
    assert state(parts)["stream"] == state(whole)["stream"]
    assert weights(parts) == weights(whole)
    # Each start writes its own last evaluation, so the lines themselves are compared by step.
    at = {line["step"]: line["train/loss"] for line in curve(whole) if "train/loss" in line}
    assert at == {line["step"]: line["train/loss"] for line in curve(parts) if "train/loss" in line}


def test_a_model_that_mixes_documents_is_refused_before_anything_is_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bloom = {"hidden_size": 32, "n_layer": 1, "n_head": 2}
    folder = train(
        code=1, model_type="bloom", config_overrides=bloom, document_mask=True, block_size=64
    )
    assert "a change in one document changed the loss of others" in capsys.readouterr().err
    assert not (folder / "train_log.jsonl").exists()


def test_other_data_is_refused_unless_allowed(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words\n" * 500)
    train(train_file=str(file), max_steps=2)
    file.write_text("other words\n" * 500)
    train(code=1, train_file=str(file))
    message = capsys.readouterr().err
    assert "data:" in message and "or --allow_resume_change data" in message
    folder = train(train_file=str(file), allow_resume_change=["data"])
    assert "Allowed  data:" in capsys.readouterr().out
    assert state(folder)["step"] == 6


def test_another_batch_size_goes_on_to_the_same_number_of_steps(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=2)
    folder = train(
        per_device_train_batch_size=8, allow_resume_change=["global_batch_size"], save_steps=1
    )
    assert (state(folder)["step"], state(folder)["samples"]) == (6, 2 * 4 + 4 * 8)


def test_a_folder_of_token_files_trains_and_speaks(
    train: Train, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("text", tokenizer_name="char", sample_prompt="def ", sample_max_new_tokens=5)
    (store,) = [p for p in Path("token_cache").iterdir() if p.is_dir()]
    (store / "meta.json").unlink()  # as nanoGPT leaves a folder: ids, and their characters
    for path in store.glob("*.ends"):
        path.unlink()
    folder = train(
        "ids",
        train_file=str(store),
        tokenizer_name=None,
        sample_prompt="def ",
        sample_max_new_tokens=5,
    )
    result = json.loads((folder / "result.json").read_text())
    assert [s["prompt"] for s in result["samples"]] == ["def ", "def "]
    # The same ids in the same order give the same run.
    losses = [line["train/loss"] for line in curve(folder) if "train/loss" in line]
    assert losses == [
        line["train/loss"] for line in curve(Path("runs/text")) if "train/loss" in line
    ]
