"""Proves that a run's record says what was changed, on what it was trained, and no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from arguments import Arguments
from llm_training.data import prepare_data
from llm_training.run_record import changed_arguments, description_of, used_datasets
from tests.small_runs import TEXT, open_place, train_small

FACTS = {
    "num_parameters": 3_483_904,
    "precision": "bf16",
    "num_processes": 8,
    "device_name": "NVIDIA H100",
    "backend": "fsdp",
}


def silent(line: str) -> None:
    pass


def test_what_differs_from_its_default_is_told_with_its_origin() -> None:
    arguments = Arguments(learning_rate=1e-3, seed=7, warmup_steps=100)
    origins = {"learning_rate": "run.json line 3", "seed": "command line"}
    assert changed_arguments(arguments.with_origins(origins)) == {
        "learning_rate": "0.001 (run.json line 3)",
        "seed": "7 (command line)",
        "warmup_steps": "100",
    }
    assert changed_arguments(Arguments()) == {}


def test_the_description_is_for_people() -> None:
    new = Arguments(model_type="gpt2", train_file=["books/", "notes"])
    assert description_of(new, FACTS, "700 steps") == (
        "A new **gpt2**: 3,483,904 parameters, bf16.\n\n"
        "Data: books/, notes. Length: 700 steps. Computed on 8 x NVIDIA H100, fsdp."
    )
    tuned = Arguments(model_name_or_path="a/b", dataset_name="c/d")
    text = description_of(tuned, FACTS, "1 step")
    assert text.startswith("`a/b`, trained further: ")
    assert "Data: c/d." in text
    mixed = Arguments(train_mixture={"code": {"train_file": ["x"]}, "prose": {"train_file": ["y"]}})
    assert "Data: code, prose." in description_of(mixed, FACTS, "1 step")


def test_every_source_and_split_is_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("code", "prose", "math"):
        Path(name).mkdir()
        for number in range(3):
            (Path(name) / f"{number}.txt").write_text(name + TEXT[number:])
    arguments = Arguments(
        train_mixture={
            "code": {
                "train_file": ["code/*.txt"],
                "validation_split_percentage": 40.0,
                "weight": 2,
            },
            "prose": {"train_file": ["prose"], "validation_split_percentage": 0.0, "weight": 1},
        },
        validation_sets={"math": {"validation_file": ["math"]}},
        tokenizer_name="byte",
        cache_dir="cache",
    )
    data = prepare_data(arguments, say=silent)
    found = {(used.name, used.context): used for used in used_datasets(arguments, data, "")}
    assert set(found) == {
        ("code", "training"),
        ("code", "validation"),
        ("prose", "training"),
        ("math", "validation"),
    }
    prose = found["prose", "training"]
    store = data.parts["prose"].train
    assert store is not None
    assert (prose.source, prose.source_type) == ("prose", "local")
    assert prose.fingerprint == store.fingerprint
    size = sum(len(path.read_bytes()) for path in Path("prose").iterdir())
    expected = {"num_tokens": store.num_tokens, "num_documents": 3, "num_bytes": size}
    assert prose.profile == expected
    assert len({used.fingerprint for used in found.values()}) == 4


def test_a_run_of_the_script_has_its_record_in_mlflow(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_place(tmp_path, monkeypatch)
    store = f"sqlite:///{place}/mlflow.db"
    (place / "mlflow.db").write_bytes(empty_store.read_bytes())
    settings = {"report_to": "mlflow", "tracking_uri": store, "max_steps": 2}
    output = train_small(place, **settings, save_steps=2, run_name="tiny")
    client = MlflowClient(store)
    run = client.get_run((output / "mlflow_run_id.txt").read_text().strip())
    tags, parameters = run.data.tags, run.data.params
    assert tags["changed.max_steps"] == "2 (settings.json line 1)"
    assert tags["mlflow.note.content"].startswith("A new **gpt2**: ")
    assert "Data: text.txt. Length: 2 steps = " in tags["mlflow.note.content"]
    assert (tags["backend"], tags["output_dir"]) == ("single", "run")
    assert parameters["num_parameters"] == str(json_of(output, "provenance")["num_parameters"])
    (used,) = run.inputs.dataset_inputs  # it is not judged
    assert (used.dataset.name, json.loads(used.dataset.source)) == ("text.txt", {"uri": "text.txt"})
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"arguments.json", "ledger.json", "train_log.jsonl", "result.json"} <= kept
    manifests = client.list_artifacts(run.info.run_id, "checkpoints/step-00000002")
    assert [file.path for file in manifests] == ["checkpoints/step-00000002/manifest.json"]


def json_of(output: Path, name: str) -> dict[str, int]:
    return dict(json.loads((output / f"{name}.json").read_text()))
