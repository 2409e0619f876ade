"""Proves that an existing model is loaded whole, from the state that was named, or not at all.

Nothing here is fetched: what stands for the hub is a folder in the form of its local cache.
`tests/distributed/test_existing_weights.py` has the refusals of several processes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from arguments import Arguments, ModelArguments
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.modeling import ModelError, build_model, load_config
from llm_training.pretrained import TWO_SIDED
from tests.small_runs import open_place, train_small

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "vocab_size": 257,
}
EXISTING: dict[str, Any] = {"model_type": None, "config_overrides": {}, "dropout": None}
WEIGHTS = "model.safetensors"
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_kind"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 0.5 * outputs.logits
        return outputs
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small llama in the folder base."""
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "base")
    return open_place(tmp_path, monkeypatch)


def load(name: str = "base", **settings: Any) -> tuple[Any, list[str]]:
    """The model, and what is said of it."""
    arguments = Arguments(model_name_or_path=name, **settings)
    lines: list[str] = []
    return build_model(load_config(arguments, None), arguments, say=lines.append), lines


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def change_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Adds tensors to the file of weights, or takes them out."""
    held = load_file(folder / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


# --------------------------------------------------------------------------- whole, or not at all


def test_a_whole_model_is_loaded_in_silence(place: Path) -> None:
    model, lines = load()
    assert not lines
    for name, tensor in load_file("base/model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor)


def test_a_tied_head_is_not_missing(place: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257)
    AutoModelForCausalLM.from_config(config).save_pretrained("tied")
    assert "lm_head.weight" not in load_file("tied/model.safetensors")
    model, lines = load("tied")
    assert model.lm_head.weight is model.transformer.wte.weight and not lines


def test_weights_in_several_files_are_found(place: Path) -> None:
    LlamaForCausalLM.from_pretrained("base").save_pretrained("parts", max_shard_size="20KB")
    assert len([*Path("parts").glob("*.safetensors")]) > 1
    model, _ = load("parts")
    assert torch.equal(model.lm_head.weight, load_file("base/model.safetensors")["lm_head.weight"])
    next(Path("parts").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="weights of --model_name_or_path parts cannot be read"):
        load("parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"config.json describes: 9 are missing \(model.layers.2.input_layernorm.weight, .*\)"
            ". They would begin at random",
        ),
        (
            {"intermediate_size": 40},
            r"6 have another shape \(model.layers.0.mlp.down_proj.weight: 16 x 24 there, 16 x 40",
        ),
        (
            {"num_hidden_layers": 1},
            r"hold 9 weights more of the model than its config.json describes \(model.layers.1.in",
        ),
        ({"attention_bias": True}, r"8 are missing \(model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_files_of_another_model_are_refused(
    changes: dict[str, Any], message: str, place: Path
) -> None:
    change_config(place / "base", **changes)
    with pytest.raises(ModelError, match=message):
        load()


def test_a_weight_that_the_model_would_leave_out_is_refused_inside_and_told_beside(
    place: Path,
) -> None:
    change_weights(place / "base", {"v_head.summary.weight": torch.ones(1, 16)})
    assert load()[1] == [
        "Weights  1 in the files are not of the language model, and are left out:"
        " v_head.summary.weight"
    ]
    change_weights(place / "base", {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    with pytest.raises(ModelError, match=r"1 weights more .*q_proj.bias\), and without them"):
        load()


def test_a_classifier_is_a_base_only_where_its_head_is_the_embedding(place: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**LLAMA)).save_pretrained("judge")
    message = r"1 are missing \(lm_head.weight\).*saved as LlamaForSequenceClassification, not Llam"
    with pytest.raises(ModelError, match=message):
        load("judge")
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257)
    GPT2ForSequenceClassification(config).save_pretrained("tied")
    assert load("tied")[1][0].endswith("left out: score.weight")


def test_a_file_that_was_cut_off_is_refused(place: Path) -> None:
    path = place / "base" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be read: .* Copy or fetch the files again"):
        load()


def test_what_would_need_unpickling_is_refused_and_the_way_out_works(place: Path) -> None:
    torch.save(load_file("base/model.safetensors"), "base/pytorch_model.bin")
    before = load_file("base/model.safetensors")
    Path("base", WEIGHTS).unlink()
    train_tokenizer("byte", [], 0).save_pretrained("base")
    with pytest.raises(ModelError, match=r"need unpickling \(pytorch_model.bin\)") as caught:
        load()
    words = str(caught.value).partition("python -c ")[2].partition(", and name the folder")[0]
    subprocess.run([sys.executable, "-c", *shlex.split(words)], check=True, capture_output=True)
    model, _ = load("safe")
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert Path("safe/tokenizer.json").exists()
    Path("base/pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no weights: there is no model.safetensors"):
        load()


def test_an_adapter_or_a_part_of_a_checkpoint_beside_a_model_is_refused(place: Path) -> None:
    stray = Path("base/shard-00000-model-00001-of-00001.safetensors")
    stray.write_bytes(b"")
    with pytest.raises(ModelError, match="is a distributed checkpoint"):
        load()
    stray.unlink()
    Path("base/adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base has an adapter_config.json"):
        load()


def test_an_attention_kernel_that_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(ModelError, match=r"^--attn_implementation flash_attention_2 is not to be"):
        load(attn_implementation="flash_attention_2")


def test_a_run_and_its_dry_run_refuse_alike(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(place / "base", num_hidden_layers=3)
    settings = EXISTING | {"model_name_or_path": "base"}
    for name, changes in (("run", {}), ("dry", {"dry_run": True})):
        train_small(place, name, code=1, **settings | changes)
        assert "9 are missing (model.layers.2" in capsys.readouterr().err
    change_config(place / "base", num_hidden_layers=2)
    change_weights(place / "base", {"score.weight": torch.ones(2, 16)})
    for name, changes in (("told", {"max_steps": 1}), ("dry_too", {"dry_run": True})):
        train_small(place, name, **settings | changes)
        assert "and are left out: score.weight" in capsys.readouterr().out


# ----------------------------------------------------------------------------- the right kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "t5 has an encoder that reads the text and a decoder"),
        ("bart", "bart has an encoder"),
        ("bert", "the attention of bert looks to both sides"),
        ("xlm-roberta", "the attention of xlm-roberta looks to both sides"),
    ],
)
def test_a_base_of_another_kind_is_refused(kind: str, message: str, place: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained("other")
    with pytest.raises(ModelError, match=f"other is no causal language model: {message}"):
        load_config(ModelArguments(model_name_or_path="other"), None)


def test_a_kind_that_looks_to_both_sides_is_new_only_as_a_decoder() -> None:
    with pytest.raises(ModelError, match="--model_type bert is no causal language model"):
        load_config(ModelArguments(model_type="bert"), None)
    decoder = ModelArguments(model_type="bert", config_overrides={"is_decoder": True})
    assert load_config(decoder, None).is_decoder


SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embedding_size", "d_model", "emb_dim"), 16),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "d_inner", "decoder_ffn_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "decoder_attention_heads"), 2),
    **{"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "default_language": "en_XX",
}


def looks_ahead(kind: str) -> bool:
    """Whether a change of the last token changes what a tiny model says of those before it."""
    plain = AutoConfig.for_model(kind)
    names = {*plain.to_dict(), *plain.attribute_map}
    sizes = {name: value for name, value in SMALL.items() if name in names}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    ids = torch.arange(3, 11)[None]
    changed = torch.cat([ids[:, :-1], torch.tensor([[29]])], 1)
    with torch.no_grad():
        before, after = (model(input_ids=row).logits[0, :-1] for row in (ids, changed))
    return not torch.equal(before, after)


def test_the_kinds_that_look_to_both_sides_are_those_that_do() -> None:
    """Asked are all kinds of transformers that may be decoders or not, and two older ones."""
    asked = {"xlm", "xlnet"}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        may_be = getattr(CONFIG_MAPPING[kind], "is_decoder", None) is False
        asked |= {kind} if may_be and not CONFIG_MAPPING[kind]().is_encoder_decoder else set()
    asked.remove("reformer")  # it refuses to run so
    assert {kind for kind in asked if looks_ahead(kind)} == {*TWO_SIDED} - {"reformer"}


def test_quantized_weights_are_refused(place: Path) -> None:
    change_config(place / "base", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"holds quantized weights \(gptq\).*--frozen_dtype nf4"):
        load()


# --------------------------------------------------------------------------------- the right state


@pytest.fixture
def hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository me/tiny in the local cache of the hub; its two commits, the newest last."""
    import huggingface_hub.constants
    import transformers.utils.hub as hub

    cache, commits = place / "cache", ["a" * 40, "b" * 40]
    for module in (huggingface_hub.constants, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--me--tiny"
    for number, commit in enumerate(commits):
        torch.manual_seed(number)
        folder = repository / "snapshots" / commit
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
        tokenizer = train_tokenizer("byte", [], 0, special_tokens=[f"<of {number}>"])
        tokenizer.save_pretrained(folder)
        change_config(folder, vocab_size=257 + 1)
        held = load_file(folder / WEIGHTS)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = torch.cat([held[name], held[name][:1]])
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    (repository / "refs").mkdir()
    for name, commit in (("main", commits[1]), ("v1", commits[0])):
        (repository / "refs" / name).write_text(commit)
    return commits


def test_the_state_that_is_named_is_taken_and_noted(hub: list[str], place: Path) -> None:
    settings = EXISTING | {"tokenizer_name": None, "model_name_or_path": "me/tiny", "max_steps": 1}
    for name, revision, number in (("new", None, 1), ("old", "v1", 0), ("exact", hub[0], 0)):
        run = train_small(place, name, model_revision=revision, **settings)
        noted = json.loads((run / "provenance.json").read_text())
        assert noted["model_commit"] == hub[number]
        assert f"<of {number}>" in (run / "final" / "tokenizer.json").read_text()
        model, _ = load("me/tiny", model_revision=revision)
        file = place / "cache/models--me--tiny/snapshots" / hub[number] / WEIGHTS
        assert torch.equal(model.lm_head.weight, load_file(file)["lm_head.weight"])
    local = train_small(place, "local", **EXISTING, model_name_or_path="base", max_steps=1)
    assert "model_commit" not in json.loads((local / "provenance.json").read_text())


def test_a_state_that_there_is_not_is_told(hub: list[str], place: Path) -> None:
    arguments = ModelArguments(model_name_or_path="me/tiny", model_revision="v9")
    with pytest.raises(ModelError, match=r"me/tiny at --model_revision v9 has no .* tag or commit"):
        load_config(arguments, None)


def test_files_that_are_not_here_yet_are_not_looked_at_by_a_dry_run(
    hub: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (place / "cache").rglob(WEIGHTS):
        file.unlink()
    settings = EXISTING | {"tokenizer_name": None, "model_name_or_path": "me/tiny"}
    train_small(place, "dry", dry_run=True, **settings)
    assert "Weights  of me/tiny are not here yet" in capsys.readouterr().out
    with pytest.raises(
        ModelError, match=r"^--model_name_or_path me/tiny has no .*, neither on the"
    ):
        load("me/tiny")


# --------------------------------------------------------------------------------- code by consent


@pytest.fixture
def own_kind(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model that brings its own code along, in the folder own."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(place / "modules"))
    kept = list(sys.path)
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained("own")
    Path("own/own_code.py").write_text(CODE, encoding="utf-8")
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    change_config(
        place / "own",
        model_type="own_kind",
        architectures=["OwnForCausalLM"],
        auto_map={kind: f"own_code.{name}" for kind, name in names.items()},
    )
    yield place / "own"
    sys.path[:] = kept


def test_code_of_others_is_refused_without_consent_and_without_a_question(
    own_kind: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ModelError, match=r"own needs Python code .*allow it with --trust_remote_"):
        load("own")


def test_code_that_looks_ahead_is_refused_before_the_first_step(
    own_kind: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but trying it can tell: it calls itself a causal language model."""
    forward = "super().forward(*args, **kwargs)"
    size = "kwargs['input_ids'].shape"
    mask = f"torch.zeros({size}[0], 1, {size}[1], {size}[1])"
    code = CODE.replace(forward, f"super().forward(**kwargs | {{'attention_mask': {mask}}})")
    (own_kind / "own_code.py").write_text("import torch\n" + code, encoding="utf-8")
    settings = EXISTING | {"model_name_or_path": "own", "trust_remote_code": True}
    run = train_small(place, code=1, document_mask=False, **settings)
    assert "no causal language model: its code lets a position see" in capsys.readouterr().err
    assert not (run / "train_log.jsonl").exists()


def test_with_consent_it_trains_and_what_is_written_opens_again(
    own_kind: Path, place: Path
) -> None:
    settings = EXISTING | {"model_name_or_path": "own", "trust_remote_code": True}
    final = train_small(place, max_steps=2, eval_steps=1, **settings) / "final"
    assert (final / "own_code.py").read_text() == CODE
    opened = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA))
    plain.load_state_dict(load_file(final / WEIGHTS))
    ids = torch.arange(8)[None]
    assert torch.equal(opened.eval()(ids).logits, 0.5 * plain.eval()(ids).logits)
    dry = train_small(place, "dry", dry_run=True, **settings)
    assert not (dry / "final").exists()
