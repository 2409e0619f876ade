"""Proves that a finished model is published as it is, that nothing else is, and that a hub which
fails, hangs or refuses costs no run.

The hub is a stand-in on this machine (`tests/hub_server.py`); no test may reach any other.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
    _http,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from transformers import AutoModelForCausalLM

from llm_training import hub, hub_client
from llm_training.hub_checks import is_repository_id, repository_name
from llm_training.hub_client import HubError, open_repository, reason_of
from llm_training.hub_metadata import dataset_ids, known_id, publishable
from llm_training.milestones import publish_model
from llm_training.outputs import OutputFolder
from tests.hub_server import READER, SIGNATURE, STRANGER, WRITER, Fault, HubServer, Repository
from tests.small_runs import open_place, train_small

WITH_HUB = {"push_to_hub": True, "hub_model_id": "me/mine", "eval_steps": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done and was not published; copy it."""
    with pytest.MonkeyPatch.context() as patch:
        place = open_place(tmp_path_factory.mktemp("trained"), patch)
        return train_small(place, eval_steps=2, save_best=True, run_name="tiny one")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in, the only place that can be reached, and a login that may write there."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(hub_client, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))  # between its tries
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
    for thread in threading.enumerate():  # that was left to itself: it closes the client it used
        if thread.name == "model to hub":
            thread.join(10)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> Path:
    return open_place(tmp_path, monkeypatch)


@pytest.fixture
def run(trained: Path, place: Path) -> Path:
    """A run that is done and was not published."""
    return shutil.copytree(trained, place / "run", symlinks=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def published(server: HubServer, name: str = "me/mine") -> dict[str, bytes]:
    """What lies there, but for the file that the hub itself puts into each repository."""
    files = dict(server.repositories[name].files)
    files.pop(".gitattributes")
    return files


def noted(run: Path) -> Any:
    return json.loads((run / "result.json").read_text()).get("hub")


def tell_nothing() -> None:
    return None


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_ends_with_its_model_on_the_hub(
    place: Path, server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train_small(place, **WITH_HUB)
    assert published(server) == contents(run / "final")
    repository = server.repositories["me/mine"]
    assert repository.private and repository.commits == ["final/ of run settings, step 4"]
    assert noted(run) == {
        "repository": "me/mine",
        "url": f"{server.url}/me/mine",
        "private": True,
        "commit": repository.sha,
        "model": "final",
    }
    told = capfd.readouterr()
    first, last = f"Hub      final/ is uploaded at the end to {server.url}/me/mine", "Hub      http"
    assert told.out.index(f"{first} (private), new") < told.out.index("Model    gpt2")
    assert f"{last}{server.url[4:]}/me/mine (private), commit {repository.sha[:7]}" in told.out

    opened = AutoModelForCausalLM.from_pretrained(server.write_to("me/mine", place / "copy"))
    tokens = torch.arange(32)[None]
    original = AutoModelForCausalLM.from_pretrained(run / "final")
    assert torch.equal(opened(tokens).logits, original(tokens).logits)

    assert not [name for name, text in published(server).items() if str(place).encode() in text]
    # The token is in one header alone, of requests to the hub and not to the store.
    for seen in server.seen:
        others = str(seen) + repr({**seen.headers, "authorization": ""})
        assert WRITER not in others and WRITER.encode() not in seen.body
        assert seen.path.startswith("/store/") or seen.headers["authorization"].endswith(WRITER)
    assert WRITER not in told.out + told.err
    for content in [*contents(run).values(), *published(server).values()]:
        assert WRITER.encode() not in content


def test_an_upload_that_fails_costs_no_run_and_can_be_done_later(
    place: Path, server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault("POST .*/commit/main", 503, message=f"at https://x/y?{SIGNATURE}")]
    run = train_small(place, **WITH_HUB)
    told = capfd.readouterr()
    command = f"python -m llm_training.hub push {run.name}"
    assert f"WARNING: {run.name}/final is not on the hub (it answers 503: at https" in told.out
    assert f"Send it later: {command}\n" in told.out
    assert SIGNATURE not in told.out + told.err and "Traceback" not in told.err
    assert "Done     4 steps" in told.out and noted(run) is None
    assert len(server.paths("commit")) == 1 + len(hub_client.PAUSES)

    train_small(place, **WITH_HUB)  # started again: it is finished
    assert f"It is not on the hub yet; this sends it: {command}\n" in capfd.readouterr().out

    server.faults = []
    assert hub.main(["push", run.name]) == 0
    assert published(server) == contents(run / "final")
    line = f"Hub      {server.url}/me/mine (private), commit {noted(run)['commit'][:7]}\n"
    assert capfd.readouterr().out.endswith(line)

    train_small(place, **WITH_HUB)
    told = capfd.readouterr()
    assert "It is not on the hub yet" not in told.out and line in told.out


def test_a_finished_run_is_published_by_the_wish_alone(
    run: Path, place: Path, server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(run / "final")["model.safetensors"]
    wish = {"push_to_hub": True, "hub_model_id": "mine"}
    train_small(place, eval_steps=2, save_best=True, run_name="tiny one", **wish)
    assert "Resume   from" in capfd.readouterr().out
    assert published(server) == contents(run / "final")
    assert published(server)["model.safetensors"] == before


def test_an_adapter_does_not_name_a_folder_of_this_machine(
    trained: Path, place: Path, server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(trained / "final", place / "runs" / "base" / "final")
    loaded = {"model_type": None, "config_overrides": {}, "model_name_or_path": str(base)}
    run = train_small(place, **WITH_HUB, **loaded, tokenizer_name=None, lora_rank=2, dropout=None)
    final, there = contents(run / "final"), published(server)
    assert json.loads(final["adapter_config.json"])["base_model_name_or_path"] == str(base)
    config = json.loads(there["adapter_config.json"])
    assert config == json.loads(final["adapter_config.json"]) | {"base_model_name_or_path": "base"}
    same = there.keys() - {"adapter_config.json"}
    assert {name: there[name] for name in same} == {name: final[name] for name in same}
    assert not [name for name, content in there.items() if str(place).encode() in content]
    assert "adapter_model.safetensors" in there and "model.safetensors" not in there
    warning = "is published for 'base', which no hub is known to have"
    assert warning in capfd.readouterr().out


def test_a_dry_run_tries_the_login_and_makes_nothing(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    train_small(place, dry_run=True, push_to_hub=True, run_name="my run")
    line = f"Hub      final/ would be uploaded to {server.url}/me/my-run (private), new"
    assert line in capfd.readouterr().out
    assert server.repositories == {} and server.paths("^POST") == []
    monkeypatch.setenv("HF_TOKEN", READER)
    train_small(place, code=1, dry_run=True, push_to_hub=True)
    assert "may read on the hub but not write" in capfd.readouterr().err


# -------------------------------------------------------------------------------- before training


@pytest.mark.parametrize(
    ("token", "wished", "words"),
    [
        (None, "me/mine", ["who publishes me/mine", "set HF_TOKEN", "hf auth login"]),
        ("hf_" + "x" * 30, "me/mine", ["does not know the token", "set HF_TOKEN"]),
        (READER, "me/mine", ["The token of me may read", "not write"]),
        (STRANGER, "me/mine", ["she may not make hub_model_id=me/mine below me", "NAME alone"]),
        (STRANGER, "me/public", ["me/public exists, and she may not write to it", "hub_model_id"]),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_built(
    place: Path,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    token: str | None,
    wished: str,
    words: list[str],
) -> None:
    server.repositories["me/public"] = Repository("me", private=False)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    run = train_small(place, code=1, push_to_hub=True, hub_model_id=wished)
    told = capfd.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("train_llm.py: ") and all(word in line for word in words), line
    assert "Model    " not in told.out and not (run / "arguments.json").exists()
    assert token is None or token not in told.out + told.err
    assert list(server.repositories) == ["me/public"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault("whoami", "hang"),
            ["cannot be asked for me/mine", "ReadTimeout", "push RUN_FOLDER"],
        ),
        (Fault("create", 402, message="payment required"), ["402: payment required"]),
        (Fault("auth-check", 500), ["it answers 500: told to fail"]),
        (Fault("whoami", 503, times=2), []),
        (Fault("whoami", 429, times=1), []),
        (Fault("whoami", "drop", times=1), []),
    ],
)
def test_a_hub_that_fails_at_the_start_is_asked_again_and_then_told(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, fault: Fault, words: list[str]
) -> None:
    monkeypatch.setattr(hub_client, "START_SECONDS", 0.3)
    server.faults = [replace(fault)]
    began = time.monotonic()
    if words:
        with pytest.raises(HubError) as caught:
            open_repository("me/mine", private=True)
        assert all(word in str(caught.value) for word in words), caught.value
    else:
        assert open_repository("mine", private=True).id == "me/mine"
    assert time.monotonic() - began < 5


def test_a_repository_that_somebody_makes_meanwhile_is_taken(server: HubServer) -> None:
    server.repositories["me/mine"] = Repository("me")
    server.faults = [Fault("auth-check", 404, message="RepoNotFound")]
    assert open_repository("mine", private=True).id == "me/mine"
    assert len(server.paths("repos/create")) == 1


def test_a_hub_that_is_not_there_is_told(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")
    with pytest.raises(HubError, match=rf"The hub at http://127.0.0.1:{port} cannot.*ConnectError"):
        open_repository("mine", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset the `HF_HUB_OFFLINE`"):
        open_repository("mine", private=True)


def test_an_existing_repository_stays_as_it_is(
    place: Path, server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.repositories["me/mine"] = Repository("me", private=False)
    train_small(place, dry_run=True, push_to_hub=True, hub_model_id="mine")
    told = capfd.readouterr().out
    assert "/me/mine (public), exists\nWARNING: me/mine is public" in told
    assert not server.repositories["me/mine"].private


# ------------------------------------------------------------------------------------- the upload


def push(run: Path, *words: str) -> int:
    return hub.main(["push", str(run), "--repo", "mine", *words])


def test_what_is_there_is_not_sent_again(run: Path, server: HubServer) -> None:
    assert push(run) == 0
    first, server.seen = noted(run), []
    assert push(run) == 0
    assert server.paths("PUT|commit") == [] and noted(run) == first
    (run / "final" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert push(run) == 0
    assert server.paths("PUT") == [] and len(server.repositories["me/mine"].commits) == 2
    assert published(server) == contents(run / "final")


@pytest.mark.parametrize("part_bytes", [None, 10_000])
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault("PUT /store", "drop", times=2),
        Fault("PUT /store", 500, times=3),
        Fault("preupload", 502, times=1),
        Fault("validate-yaml", 500, times=1),
        Fault("commit/main", 504, times=2),
        Fault("PUT /store", "hang", times=1),
    ],
    ids=str,
)
def test_what_fails_now_and_then_arrives_whole(
    run: Path,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    part_bytes: int | None,
    fault: Fault | None,
) -> None:
    monkeypatch.setattr(hub, "UPLOAD_SECONDS", 0.5)
    server.part_bytes, server.faults = part_bytes, [replace(fault)] if fault else []
    assert push(run) == 0
    assert published(server) == contents(run / "final")
    assert len(server.repositories["me/mine"].commits) == 1
    assert not fault or server.faults[0].times == 0
    assert len(set(server.paths("part="))) == (0 if part_bytes is None else 4)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("commit/main", 403, message="storage quota"), "it answers 403: storage quota"),
        (Fault("objects/batch", 500), "it answers 500: told to fail"),
        (Fault("PUT /store", "hang"), "Error while uploading 'model.safetensors' to the Hub. Read"),
        (Fault("PUT /store", "drop"), "Error while uploading 'model.safetensors' to the Hub. "),
        (Fault("tree/main", 401), "it answers 401"),
    ],
    ids=str,
)
def test_what_fails_for_good_is_told_in_time(
    run: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, fault: Fault, told: str
) -> None:
    monkeypatch.setattr(hub, "UPLOAD_SECONDS", 0.1)
    repository = open_repository("mine", private=True)
    server.faults = [replace(fault)]
    said: list[str] = []
    logged = logging.StreamHandler(io.StringIO())  # where the client tells each of its tries
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logged])
    began = time.monotonic()
    assert hub.publish(OutputFolder(run), repository, said.append, tell_nothing) is None
    assert time.monotonic() - began < 10
    assert told in said[-1] and "Send it later: python -m llm_training.hub push" in said[-1]
    assert SIGNATURE not in said[-1] + logged.stream.getvalue() and len(said) == 2


@pytest.mark.parametrize(
    ("seconds", "stop", "told"),
    [(0.4, None, "not done within 0 s"), (60.0, "SIGTERM", "stopped by SIGTERM")],
)
def test_an_upload_is_not_waited_for_without_limit(
    run: Path,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    stop: str | None,
    told: str,
) -> None:
    monkeypatch.setattr(hub, "ATTENDED_SECONDS", seconds)
    repository = open_repository("mine", private=True)
    server.faults = [Fault("PUT /store", "hang")]
    said: list[str] = []
    began = time.monotonic()
    assert hub.publish(OutputFolder(run), repository, said.append, lambda: stop) is None
    assert time.monotonic() - began < 3
    assert told in said[-1]


def test_a_run_that_is_to_end_notes_that_it_was_not_published(run: Path, server: HubServer) -> None:
    said: list[str] = []
    told: Any = SimpleNamespace(
        output=OutputFolder(run),
        tracking=SimpleNamespace(say=said.append),
        request=SimpleNamespace(reason="SIGUSR1"),
    )
    repository = open_repository("mine", private=True)
    server.faults = [Fault("PUT /store", "hang")]
    result = {"step": 4, "hub": {}}
    publish_model(told, repository, result)
    assert "stopped by SIGUSR1" in said[-1]
    assert result == {"step": 4, "hub": None} == OutputFolder(run).read_result()


def test_another_form_of_the_model_leaves_nothing_of_the_one_before(
    run: Path, server: HubServer
) -> None:
    before = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"}
    before |= {"adapter_config.json", "adapter_model.safetensors"}
    kept = {"LICENSE": b"mit", "images/loss.png": b"png", "notes.json": b"{}", "a.bin": b"b"}
    files = server.repositories.setdefault("me/mine", Repository("me")).files
    files.update(dict.fromkeys(before, b"old") | kept)
    assert push(run) == 0
    assert published(server) == contents(run / "final") | kept


def test_the_best_model_can_be_sent_and_a_run_under_way_cannot(
    run: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    output = OutputFolder(run)
    result = output.read_result() or {}
    output.write_result(result | {"best": result["best"] | {"step": 1_234}})
    assert push(run, "--which", "best") == 0
    assert published(server) == contents(run / "best")
    assert server.repositories["me/mine"].commits == ["best/ of run tiny one, step 1,234"]
    shutil.rmtree(run / "final")
    assert push(run) == 1
    assert "final holds no model: final/ is written at the end" in capsys.readouterr().err


def test_only_what_may_be_public_becomes_public(
    run: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub.main(["push", str(run), "--public"]) == 0  # by the name of the run
    assert not server.repositories["me/tiny-one"].private
    assert "/me/tiny-one (public), commit" in capsys.readouterr().out
    server.seen = []
    assert hub.main(["push", str(run)]) == 1
    assert "me/tiny-one exists and is public" in capsys.readouterr().err
    assert server.paths("POST|PUT") == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere holds neither"),
        (["run", "--repo", "a/b/c"], "--repo a/b/c cannot name a repository"),
    ],
)
def test_a_wrong_command_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert hub.main(["push", *words]) == 1
    assert capsys.readouterr().err.startswith(f"push: {problem}")


# ---------------------------------------------------------------------------------- what is shown


def test_the_hubs_own_tools_take_the_card(run: Path, server: HubServer) -> None:
    assert push(run) == 0
    data = ModelCard(published(server)["README.md"].decode()).data
    assert data.library_name == "transformers" and data.model_name == "tiny one"
    assert {result.metric_type for result in data.eval_results or []} >= {"loss", "perplexity"}
    (run / "final" / "README.md").write_text("---\ndatasets: one\n---\n")
    assert push(run) == 1  # as the stand-in checks it


def test_the_client_is_left_as_it_was(server: HubServer) -> None:
    before = _http._GLOBAL_CLIENT_FACTORY
    with hub_client.bounded_client(3.0) as api:
        assert _http.get_session().timeout.read == 3.0 == _http.get_session().timeout.connect
        assert api.endpoint == server.url and api.token == WRITER
    assert _http._GLOBAL_CLIENT_FACTORY is before
    assert _http.get_session().timeout.read is None


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("were_off", [True, False])
def test_bars_are_for_a_terminal(
    run: Path,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    were_off: bool,
) -> None:
    (disable_progress_bars if were_off else enable_progress_bars)()
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert push(run) == 0
    assert ("model.safetensors: 100%|" in capsys.readouterr().err) == is_terminal
    assert are_progress_bars_disabled() == were_off


def test_a_reason_holds_no_secret() -> None:
    error = RuntimeError(f"PUT https://me:pw@x/y?{SIGNATURE} with {WRITER}\nfailed")
    told = reason_of(error)
    assert told.startswith("RuntimeError: PUT https://") and told.endswith("failed")
    assert not any(secret in told for secret in ("5f3a9", WRITER, "pw@"))


@pytest.mark.parametrize(
    "text",
    [
        *("mine", "me/mine", "a", "Foo-BAR_foo.bar123", "a/b/c", "", "me/", "/mine", "-a", "a-"),
        *(".a", "a.", "a--b", "a..b", "a.git", "größe", "a b", "a" * 96, "a" * 97, "_a"),
        *("me/" + "b" * 97, "https://hf.co/me/mine", "me/mine\n"),
    ],
)
def test_names_are_taken_as_the_hub_takes_them(text: str) -> None:
    try:
        validate_repo_id(text)
    except HFValidationError:
        assert not is_repository_id(text)
    else:
        assert is_repository_id(text)


@pytest.mark.parametrize(
    ("run_name", "name"),
    [
        ("gpt2 on Größe (2)", "gpt2-on-Gr-e-2"),
        ("a--b..c", "a-b.c"),
        ("漢字", "model"),
        ("x" * 95 + ".-y", "x" * 95),
        ("run.git", "run"),
        ("_x-", "_x"),
    ],
)
def test_a_run_name_becomes_one_that_the_hub_takes(run_name: str, name: str) -> None:
    assert repository_name(run_name) == name and is_repository_id(name)


def test_a_base_is_known_by_what_its_folder_says(tmp_path: Path) -> None:
    def folder(path: str, file: str = "", text: str = "") -> str:
        (tmp_path / path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        if file:
            (tmp_path / path / file).write_text(text)
        return str(tmp_path / path)

    remote = '[remote "origin"]\n\turl = https://me:hf_x@huggingface.co/org/cloned\n'
    assert known_id("org/model") == "org/model"
    assert known_id(folder("hub/models--org--name-2/snapshots/0a1b")) == "org/name-2"
    assert known_id(folder("hub/models--gpt2/snapshots/0a1b")) == "gpt2"
    assert known_id(folder("cloned", ".git/config", remote)) == "org/cloned"
    assert known_id(folder("own", "config.json", '{"_name_or_path": "org/x"}')) == "org/x"
    here = json.dumps({"_name_or_path": folder("other")})
    assert known_id(folder("local", "config.json", here)) is None
    assert known_id(folder("torn", "config.json", "{")) is None


def test_every_data_set_of_the_hub_is_named(tmp_path: Path) -> None:
    mixture = {"a": {"dataset_name": "org/a"}, "b": {"train_file": "b.txt"}}
    folder = {"c": {"dataset_name": str(tmp_path)}, "d": {"dataset_name": "org/a"}}
    assert dataset_ids({"train_mixture": mixture | folder}) == ["org/a"]
    assert dataset_ids({"dataset_name": "org/b", "train_mixture": {}}) == ["org/b"]


def test_files_that_are_no_part_of_a_model_stay_here(tmp_path: Path) -> None:
    for name in ("model.safetensors", "code/modeling.py", "README.md.tmp", ".cache/x", ".env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert set(publishable(tmp_path)) == {"model.safetensors", "code/modeling.py"}
