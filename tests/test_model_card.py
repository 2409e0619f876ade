"""Proves that a model card is true, can be read by the hub's tools, and tells no secrets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import GPT2Config, GPT2LMHeadModel

from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.hub_metadata import base_model, without_folders
from llm_training.model_card import told_arguments, write_card_of_run, write_model_card
from tests.recorded_run_files import LEDGER, PROVENANCE, loss_at, write_run

TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
SAMPLES = [
    {"step": 9, "tokens": 1, "prompt": "def ", "kind": "greedy", "text": "f():\n```\npass"},
    {"step": 9, "tokens": 1, "prompt": "def ", "kind": "sampled", "text": "g():"},
]
RESULT = {"step": 100, "tokens": 100_000, "seconds": 200.0, "samples": SAMPLES}
METRICS = {
    "eval/loss": 2.5,
    "eval/loss_stderr": 0.0123,
    "eval/perplexity": 12.18,
    "eval/bits_per_byte": 1.25,
    "eval/math/loss": 1.5,
    "eval/math/perplexity": float("inf"),
}
ARGUMENTS: dict[str, Any] = {
    "run_name": "tiny",
    "model_type": "gpt2",
    "learning_rate": 1e-3,
    "seed": 7,
    "block_size": 32,
    "warmup_steps": 0,
    "output_dir": "/data/somebody/runs/tiny",
    "tracking_uri": "https://user:pass@tracker.example",
    "train_file": ["/data/somebody/books/a.jsonl", "notes/b.md", "/data/somebody/**/*.txt"],
    "train_mixture": {"code": {"train_file": "/data/somebody/src", "weight": 3}},
    "dataset_name": "https://user:pass@hub.example/set",
    "config_overrides": {"api_key": "sk-1234"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, as final/ holds one."""
    folder = tmp_path_factory.mktemp("models") / "final"
    torch.manual_seed(0)
    tokenizer = train_tokenizer("byte", [], 0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def card(folder: Path, **changes: Any) -> str:
    """The card; what is given goes before the usual arguments."""
    folder.mkdir(exist_ok=True)
    given = {
        "arguments": ARGUMENTS,
        "provenance": PROVENANCE,
        "ledger": LEDGER,
        "result": RESULT,
        "metrics": METRICS,
    }
    return write_model_card(folder, **(given | changes)).read_text(encoding="utf-8")


def matter_of(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_hub_can_read_the_front_matter(model_folder: Path) -> None:
    text = card(model_folder)
    matter = matter_of(text)
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert {"language", "license", "base_model"} & matter.keys() == set()
    data = ModelCard.load(model_folder / "README.md").data
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results or []}
    assert found == {
        ("validation", "loss"): 2.5,
        ("validation", "perplexity"): 12.18,
        ("validation", "bits_per_byte"): 1.25,
        ("math", "loss"): 1.5,
    }
    assert data.model_name == "tiny"


def test_it_says_what_the_model_is_and_how_it_was_made(model_folder: Path) -> None:
    text = card(model_folder)
    for phrase in (
        "# tiny",
        "A `gpt2` language model with 3,483,904 parameters, trained from scratch on 100,000 tok",
        "| architecture | GPT2LMHeadModel |",
        "| hidden size | 16 |",
        "| longest row | 32 |",
        "| steps | 100 |",
        "| time | 3:20 |",
        "| device | 2 x cpu |",
        "| revision of the code | 78c5cf578572a8736a1bf494c92a10190f8f9aeb+changes |",
        "learning_rate: 0.001",
        "| train | 1,723 | 30,877,455 | 9,188,599 |",
        "- 28 empty files",
        "10.69% of the validation tokens",
        "| validation | 2.5000 ± 0.0123 | 12.18 | 1.2500 |",
        "| math | 1.5000 |  |  |",
        "one standard error",
        "rows of 32 tokens",
    ):
        assert phrase in text, phrase
    assert "warmup_steps" not in text  # it is the default


def test_no_secret_and_no_folder_of_the_machine_is_told(model_folder: Path) -> None:
    text = card(model_folder)
    secrets = ("pass@", "sk-1234", "/home", "somebody", "secret_name", "tracker.example")
    assert [secret for secret in secrets if secret in text] == []
    told = told_arguments(ARGUMENTS)
    assert told["train_file"] == ["a.jsonl", "notes/b.md", "**/*.txt"]
    assert told["train_mixture"] == {"code": {"train_file": "src", "weight": 3}}
    assert told["config_overrides"] == {"api_key": "[redacted]"}
    assert told["seed"] == 7 and "output_dir" not in told and "tracking_uri" not in told


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/a/b/c.txt", "c.txt"),
        ("~/b/c.txt", "c.txt"),
        ("file:///a/b", "b"),
        (r"C:\users\me\c.txt", "c.txt"),
        ("/a/b*/c/*.txt", "b*/c/*.txt"),
        ("b/c.txt", "b/c.txt"),
        ("and/or: text", "and/or: text"),
        (3, 3),
    ],
)
def test_of_absolute_paths_the_last_name_stays(path: Any, kept: Any) -> None:
    assert without_folders([{"x": path}]) == [{"x": kept}]


def test_samples_stand_in_a_fence_that_holds_them(model_folder: Path) -> None:
    text = card(model_folder)
    assert "````text\ndef f():\n```\npass\n````" in text
    assert "```text\ndef g():\n```" in text
    assert "## Samples" not in card(model_folder, result={"step": 1})


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_snippet_runs_in_the_folder_as_it_is(
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: str | None,
) -> None:
    if template:
        (model_folder / "chat_template.jinja").write_text(template)
    code = re.findall(r"```python\n(.*?)```", card(model_folder), flags=re.S)[-1]
    assert ("apply_chat_template" in code) == bool(template)
    monkeypatch.chdir(model_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip("\n")


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "final"
    GPT2LMHeadModel.from_pretrained(model_folder).save_pretrained(folder)
    code = re.findall(r"```python\n(.*?)```", card(folder), flags=re.S)[-1]
    assert "Tokenizer" not in code
    scope = {"token_ids": torch.tensor([[1, 2, 3]])}
    exec(code.replace('"."', repr(str(folder))), scope)
    assert scope["logits"].shape[:2] == (1, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("org/model", "org/model"),
        ("/data/somebody/runs/base/final", "base"),
        ("runs/base/best/", "base"),
        ("models/llama", "llama"),
        ("https://user:pass@hub.example/org/model", "model"),
        (None, None),
    ],
)
def test_a_base_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | None, told: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for local in ("runs/base/best", "models/llama"):
        Path(local).mkdir(parents=True)
    assert base_model({"model_name_or_path": base}) == told
    text = card(tmp_path / "final", arguments=ARGUMENTS | {"model_name_or_path": base})
    assert matter_of(text).get("base_model") == told
    assert matter_of(text).get("base_model_relation") == (told and "finetune")
    assert ("fine-tuned from" in text) == (told is not None)


def test_an_adapter_says_whose_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    arguments = ARGUMENTS | {"model_name_or_path": "org/model", "lora_rank": 8}
    text = card(folder, arguments=arguments)
    matter = matter_of(text)
    assert (matter["library_name"], matter["base_model_relation"]) == ("peft", "adapter")
    assert "adapted by LoRA from `org/model`" in text and "lora_rank: 8" in text
    assert "from peft import AutoPeftModelForCausalLM" in text


def test_a_dataset_of_the_hub_is_named_and_a_folder_is_not(tmp_path: Path) -> None:
    for name, told in (("org/set", ["org/set"]), ("/data/somebody/set", None)):
        text = card(tmp_path / "final", arguments=ARGUMENTS | {"dataset_name": name})
        assert matter_of(text).get("datasets") == told


def test_where_nothing_is_known_nothing_is_claimed(tmp_path: Path) -> None:
    empty: dict[str, Any] = {name: {} for name in ("arguments", "provenance", "ledger")}
    text = card(tmp_path / "final", **empty, result={}, metrics={})
    assert re.findall(r"^#+ .*", text, flags=re.M) == ["# model", "## Use", "## Limits"]
    assert "not judged on any validation data" in text
    assert matter_of(text) == {"library_name": "transformers", "pipeline_tag": "text-generation"}


def test_a_card_replaces_the_one_that_was_there_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "README.md").write_text("the base's own")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            card(folder)
    assert (folder / "README.md").read_text() == "the base's own"
    assert "the base's own" not in card(folder)
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_it_is_written_from_the_records_of_a_run(tmp_path: Path) -> None:
    output = write_run(
        tmp_path / "run",
        arguments={"sample_prompt": ["$${x}"], "learning_rate": 1e-3},
        result={"step": 100, "stopped_early": False, "samples": SAMPLES},
    )
    for name in ("final", "best"):
        (output / name).mkdir()
    text = write_card_of_run(output, output / "final").read_text()
    assert f"| validation | {loss_at(100, 3.0) + 0.1:.4f} ± 0.0100 |" in text
    assert "on 100,000 tokens" in text and "## Samples" in text and 'tokenizer("${x}"' not in text
    text = write_card_of_run(output, output / "best", 50).read_text()
    assert f"| validation | {loss_at(50, 3.0) + 0.1:.4f} ± 0.0100 |" in text
    assert "on 50,000 tokens" in text and "## Samples" not in text
    assert "| time | 1:40 |" in text and json.dumps(str(output)) not in text
    assert str(tmp_path) not in text
