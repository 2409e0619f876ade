"""The exported folder is a plain Hugging Face model with the live model's numbers, or refused."""

import json
import random
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llm_training import export
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.export import ExportError, export_model
from tests.continuations import continue_text

NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=300, n_positions=8, **NO_ENDS)
MIXTRAL = MixtralConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=2,
    max_position_embeddings=8,
)
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer("byte", ["abc"], 300)


def make(
    accelerator: Accelerator, config: PretrainedConfig = GPT2
) -> tuple[CausalLMWithLoss, PreTrainedModel]:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    return accelerator.prepare(CausalLMWithLoss(network)), network


@pytest.fixture
def parts() -> tuple[Accelerator, CausalLMWithLoss, PreTrainedModel]:
    accelerator = Accelerator(cpu=True)
    return (accelerator, *make(accelerator))


@pytest.fixture
def written_otherwise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a test change the weights of the file between its writing and its check."""

    def install(change: Any) -> None:
        save = PreTrainedModel.save_pretrained

        def save_and_change(self: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
            save(self, folder, **kwargs)
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_and_change)

    return install


def refusal(parts: tuple[Accelerator, CausalLMWithLoss, PreTrainedModel], folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        export_model(*parts, None, folder)
    assert not folder.exists()
    return str(caught.value)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_opens_offline_with_the_live_models_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, precision: str
) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, network = make(accelerator)
    export_model(accelerator, model, network, tokenizer, tmp_path / "final")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(8)[None]
    assert torch.equal(opened(ids).logits, network.eval()(ids).logits)
    assert opened.lm_head.weight is opened.transformer.wte.weight
    assert opened.dtype == torch.float32
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids
        == tokenizer("abc").input_ids
    )
    GenerationConfig.from_pretrained(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_the_names_are_the_models_own_when_it_is_compiled(tmp_path: Path) -> None:
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    export_model(accelerator, *make(accelerator), None, tmp_path / "final")
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "final").state_dict()
    names = set(load_file(tmp_path / "final" / "model.safetensors"))
    assert names == set(plain) - {HEAD}


def test_the_opened_model_is_returned_and_speaks_as_the_live_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=64)
    model, network = make(accelerator, config)
    network.generation_config.update(do_sample=True, top_k=7)
    opened = export_model(accelerator, model, network, tokenizer, tmp_path / "final")
    assert opened is not None and opened is not network
    assert not opened.training
    settings = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    with accelerator.autocast():
        texts = [continue_text(m, tokenizer, "def f", **settings) for m in (network, opened)]
    assert texts[0] == texts[1] != ""


def test_names_that_differ_in_the_files_are_known(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, network = make(accelerator, MIXTRAL)
    assert export_model(accelerator, model, network, None, tmp_path / "final") is not None
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"  # live: stacked, in `mlp`
    assert expert in load_file(tmp_path / "final" / "model.safetensors")


def test_the_names_of_the_files_it_came_from_are_kept(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    _, network = make(accelerator, MIXTRAL)
    network.save_pretrained(tmp_path / "base", save_original_format=False)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = accelerator.prepare(CausalLMWithLoss(network))
    assert export_model(accelerator, model, network, None, tmp_path / "final") is not None
    base, final = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "final"))
    assert "model.layers.0.mlp.experts.down_proj" in base
    assert base.keys() == final.keys()


def test_an_exported_model_can_be_trained_and_exported_again(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    export_model(accelerator, *make(accelerator), None, tmp_path / "base")
    # Sampling settings without do_sample: transformers warns of them, and many models have them.
    settings = {"temperature": 0.5, "max_new_tokens": 5}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = accelerator.prepare(CausalLMWithLoss(network))
    export_model(accelerator, model, network, None, tmp_path / "final")
    base, final = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "final"))
    assert base.keys() == final.keys()
    kept = GenerationConfig.from_pretrained(tmp_path / "final")
    assert {name: getattr(kept, name) for name in settings} == settings


def test_mode_and_random_state_are_left_alone(tmp_path: Path, parts: tuple) -> None:
    accelerator, model, network = parts
    model.train()
    network.transformer.h[0].eval()
    network.register_forward_pre_hook(draw_numbers)  # though in evaluation mode
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    export_model(accelerator, model, network, None, tmp_path / "final")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def draw_numbers(*_: Any) -> None:
    torch.rand(1)


@pytest.mark.parametrize("by", [1e-6, float("nan")])
def test_a_changed_number_in_the_file_is_found(
    tmp_path: Path, parts: tuple, written_otherwise: Any, by: float
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["transformer.h.1.ln_2.bias"][3] += by

    written_otherwise(change)
    told = refusal(parts, tmp_path / "final")
    assert f"transformer.h.1.ln_2.bias differs from the live model by up to {by:g}" in told
    assert (tmp_path / "final.failed_check" / "config.json").exists()
    assert "final.failed_check" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.update(extra=torch.ones(1)), "in the weights extra."),
        (lambda w: w.pop("transformer.ln_f.bias"), "in the weights transformer.ln_f.bias."),
        (lambda w: w.update({HEAD: w[TABLE].clone()}), f"in the weights {HEAD}."),
        (lambda w: w.update({f"module.{TABLE}": w.pop(TABLE)}), f"module.{TABLE}, {TABLE}."),
        (lambda w: w.update({TABLE: w[TABLE][:-1].clone()}), f"{TABLE} as [299, 8] F32"),
        (lambda w: w.update({TABLE: w[TABLE].bfloat16()}), f"{TABLE} as [300, 8] BF16"),
    ],
)
@pytest.mark.parametrize("short_of_memory", [False, True])
def test_files_of_another_layout_are_found(
    tmp_path: Path,
    parts: tuple,
    written_otherwise: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    told: str,
    short_of_memory: bool,
) -> None:
    if short_of_memory:
        monkeypatch.setattr(export, "_free_bytes", lambda device: 0)
    written_otherwise(change)
    assert told in refusal(parts, tmp_path / "final")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activation_function": "relu"}, "it computes other logits: they differ by"),
        ({"tie_word_embeddings": False}, f"it has missing_keys: {HEAD}."),
        ({"n_layer": 1}, "it has unexpected_keys: transformer.h.1."),
    ],
)
def test_a_configuration_of_another_model_is_found(
    tmp_path: Path, parts: tuple, monkeypatch: pytest.MonkeyPatch, change: dict, told: str
) -> None:
    save = PretrainedConfig.save_pretrained

    def save_another(self: PretrainedConfig, folder: Path, **kwargs: Any) -> None:
        save(GPT2Config(**self.to_dict() | change), folder, **kwargs)

    monkeypatch.setattr(PretrainedConfig, "save_pretrained", save_another)
    assert told in refusal(parts, tmp_path / "final")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_wrongly_gathered_weights_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    gather = export.gather_weights

    def gather_wrongly(model: torch.nn.Module, **how: bool) -> dict[str, Tensor]:
        weights = gather(model, **how)
        name = "transformer.h.1.mlp.c_fc.weight"
        return weights | {name: weights[name].roll(16, 1)}

    monkeypatch.setattr(export, "gather_weights", gather_wrongly)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    told = refusal((accelerator, *make(accelerator)), tmp_path / "final")
    assert "it computes other logits: they differ by" in told


def test_weights_that_only_the_configuration_ties_are_found(tmp_path: Path, parts: tuple) -> None:
    _, _, network = parts
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    told = refusal(parts, tmp_path / "final")
    assert f"{HEAD}, {TABLE} are tied in the live model or by its configuration" in told


def test_weights_that_only_the_live_model_ties_are_found(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    config = GPT2Config(**GPT2.to_dict() | {"tie_word_embeddings": False})
    model, network = make(accelerator, config)
    network.lm_head.weight = network.transformer.wte.weight
    told = refusal((accelerator, model, network), tmp_path / "final")
    assert f"{HEAD}, {TABLE} are tied in the live model or by its configuration" in told


def test_weights_that_the_architecture_does_not_have_are_found(
    tmp_path: Path, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, network = parts
    network.probe = torch.nn.Linear(2, 2)
    assert "differ in the weights probe.bias, probe.weight." in refusal(parts, tmp_path / "final")
    del network.probe
    monkeypatch.setattr(export, "WRAPPER_PREFIX", re.compile("^nothing"))
    assert "model.transformer.h.0" in refusal(parts, tmp_path / "final")


def test_a_part_in_place_of_the_whole_is_found(
    tmp_path: Path, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_whole", lambda tensor: tensor[: len(tensor) // 2])
    told = refusal(parts, tmp_path / "final")
    assert f"{TABLE} was gathered with the shape [150, 8]; it should have [300, 8]" in told


@contextmanager
def no_room_on_the_disk() -> Iterator[None]:
    """The system refuses files beyond 10,000 bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_folder_of_before(tmp_path: Path, parts: tuple) -> None:
    final = tmp_path / "final"
    export_model(*parts, None, final)
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    with torch.no_grad():
        parts[2].transformer.wte.weight.add_(1.0)
    with no_room_on_the_disk(), pytest.raises(ExportError) as caught:
        export_model(*parts, None, final)
    assert f"could not be written to {final}" in str(caught.value)
    assert "GB free" in str(caught.value)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    export_model(*parts, None, final)  # the disk has room again
    assert load_file(final / "model.safetensors")[TABLE].mean() > 0.9


def test_a_failed_check_leaves_the_folder_of_before_and_is_swept_up_later(
    tmp_path: Path, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final"
    export_model(*parts, None, final)
    before = (final / "model.safetensors").stat().st_ino
    with monkeypatch.context() as patch, pytest.raises(ExportError, match=r"OSError: worn out\."):
        patch.setattr(AutoModelForCausalLM, "from_pretrained", fail_to_open)
        export_model(*parts, None, final)
    assert (final / "model.safetensors").stat().st_ino == before
    assert {path.name for path in tmp_path.iterdir()} == {"final", "final.failed_check"}
    export_model(*parts, None, final)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def fail_to_open(*args: Any, **kwargs: Any) -> None:
    raise OSError("worn out")


def test_what_a_crash_left_is_no_hindrance(tmp_path: Path, parts: tuple) -> None:
    export_model(*parts, None, tmp_path / "final")
    shutil.copytree(tmp_path / "final", tmp_path / "final.tmp")
    (tmp_path / "final.tmp" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    export_model(*parts, None, tmp_path / "final")
    assert not list(tmp_path.rglob("model-0*"))


def test_too_little_memory_to_open_it_is_said(
    tmp_path: Path, parts: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    size = sum(p.nbytes for p in parts[2].parameters())  # the tied table counts once
    monkeypatch.setattr(export, "_free_bytes", lambda device: 1.19 * size)
    assert export_model(*parts, None, tmp_path / "final") is None
    assert "only the names, shapes and ties of its weights were checked" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    monkeypatch.setattr(export, "_free_bytes", lambda device: 1.21 * size)
    assert export_model(*parts, None, tmp_path / "final") is not None
    assert capsys.readouterr().out == ""


def test_the_live_configuration_is_not_touched(tmp_path: Path, parts: tuple) -> None:
    before = parts[2].config.to_dict()
    export_model(*parts, None, tmp_path / "final")
    assert parts[2].config.to_dict() == before
    written = json.loads((tmp_path / "final" / "config.json").read_text("utf-8"))
    assert written["architectures"] == ["GPT2LMHeadModel"]
    assert written["dtype"] == "float32"
