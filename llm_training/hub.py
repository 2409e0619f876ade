"""Publishes finished models on the Hugging Face hub: at the end of a run, or later by hand.

    python -m llm_training.hub push RUN_FOLDER

sends `final/` of a run: weights, configuration, tokenizer and card, in one commit. What the hub has
already is not sent again, so that it may be called as often as one likes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import Arguments
from llm_training.hub_checks import is_repository_id, repository_name
from llm_training.hub_client import (
    HubError,
    Repository,
    bounded_client,
    open_repository,
    patiently,
    reason_of,
)
from llm_training.hub_metadata import (
    EXPORTED,
    publishable,
    published_line,
    published_name,
    unknown_base,
)
from llm_training.outputs import OutputFolder
from llm_training.recorded_runs import RecordedRunError, read_folder
from llm_training.stopping import STOPS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

UPLOAD_SECONDS = 60.0  # without a byte from the hub; a store may have to pass a file on
# An upload that goes on but slowly ends as well: the machine costs more than a later upload.
ATTENDED_SECONDS, SLOWEST_BYTES_PER_SECOND = 900.0, 1e6
POLL_SECONDS = 0.2


# -------------------------------------------------------------------------------- before training


def open_for_run(arguments: Arguments) -> Repository | None:
    """Makes sure that the model can be published at the end, and says where; rank 0 does it.

    A dry run makes no repository.

    Returns:
        The repository; None on other ranks, and where nothing is to be published.

    Raises:
        HubError: the login, the name or the hub is in the way.
    """
    if not arguments.push_to_hub or os.environ.get("RANK", "0") != "0":
        return None
    wished = arguments.hub_model_id or repository_name(str(arguments.run_name))
    repository = open_repository(
        wished, private=arguments.hub_private_repo, create=not arguments.dry_run
    )
    what = "exists" if repository.is_there else "new"
    when = "would be uploaded" if arguments.dry_run else "is uploaded at the end"
    print(f"Hub      final/ {when} to {repository}, {what}", flush=True)
    if arguments.hub_private_repo and repository.is_there and not repository.is_private:
        print(
            f"WARNING: {repository.id} is public, and hub_private_repo leaves a repository that"
            " exists as it is: all can read what is uploaded. Give another --hub_model_id, or make"
            " it private on the hub."
        )
    return repository


# --------------------------------------------------------------------------------- after training


def publish(
    output: OutputFolder,
    repository: Repository,
    say: Callable[[str], object],
    asked_to_stop: Callable[[], str | None],
) -> dict[str, Any] | None:
    """Uploads final/ at the end of a run; a failure is only told, and how to do it later.

    It waits no longer than ATTENDED_SECONDS and what the size takes at SLOWEST_BYTES_PER_SECOND.

    Args:
        asked_to_stop: why the run shall end at once, if it shall; asked every now and then.

    Returns:
        What result.json notes of it; None where it failed.
    """
    folder = output.final
    outcome: list[dict[str, Any] | str] = []

    def work() -> None:
        try:
            outcome.append(upload(folder, repository, commit_message(output, folder.name), say))
        except Exception as error:  # of whatever library: the training is done
            outcome.append(reason_of(error))

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = ATTENDED_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    say(f"Uploading {folder} ({size / 1e6:,.1f} MB) to {repository.url} ...")
    # A daemon: one that hangs does not keep the process from ending.
    worker = threading.Thread(target=work, name="model to hub", daemon=True)
    give_up_at = time.monotonic() + seconds
    worker.start()
    while worker.is_alive() and time.monotonic() < give_up_at and not asked_to_stop():
        worker.join(POLL_SECONDS)
    if outcome and isinstance(outcome[0], dict):
        return outcome[0]
    stop = asked_to_stop()
    late = f"stopped {STOPS[stop]}" if stop else f"not done within {seconds:,.0f} s"
    say(
        f"WARNING: {folder} is not on the hub ({outcome[0] if outcome else late})."
        f" Send it later: {command_for(output.path)}"
    )
    return None


def upload(
    folder: Path, repository: Repository, message: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """Uploads a model's folder in one commit; what the hub has already is not sent again.

    Returns:
        What result.json notes of it.

    Raises:
        Exception: of the client's, of many kinds.
    """
    if (base := unknown_base(folder)) is not None:
        say(
            f"WARNING: the adapter in {folder} is published for {published_name(base)!r}, which no"
            " hub is known to have: it came from a folder here. Publish that base too, and name it"
            " in adapter_config.json there."
        )
    with bounded_client(UPLOAD_SECONDS) as api:
        commit = patiently(lambda: _commit(api, folder, repository.id, message))
    return {
        "repository": repository.id,
        "url": repository.url,
        "private": repository.is_private,
        "commit": commit,
        "model": folder.name,
    }


def _commit(api: HfApi, folder: Path, repository: str, message: str) -> str:
    """Makes the commit, without what earlier uploads left there of another form of the model."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = publishable(folder)
    there = api.list_repo_files(repository)
    stale = [name for name in there if EXPORTED.fullmatch(name) and name not in files]
    operations: list[Any] = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, content) for name, content in files.items()]
    return str(api.create_commit(repository, operations, commit_message=message).oid)


def commit_message(output: OutputFolder, model: str) -> str:
    """Run and step, by which a commit is known for that of a model."""
    run, result = read_folder(output.path), output.read_result() or {}
    at_best = result.get("best") or {}
    step = (result if model == "final" else at_best).get("step")
    at = "" if step is None else f", step {step:,}"
    return f"{model}/ of run {run.name}{at}"


def command_for(run_folder: Path) -> str:
    """The command that uploads the model of a run later."""
    return f"python -m llm_training.hub push {shlex.quote(str(run_folder))}"


# --------------------------------------------------------------------------------- the command


def main(words: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit code."""
    wish = build_parser().parse_args(words)
    try:
        noted = push(wish.run_folder, wish.which, wish.repo, is_public=wish.public)
    except (HubError, RecordedRunError) as error:
        print(f"push: {error}", file=sys.stderr)
        return 1
    print(published_line(noted))
    return 0


def push(run_folder: Path, which: str, wished: str | None, *, is_public: bool) -> dict[str, Any]:
    """Uploads a model of a run by hand, and notes it in result.json where the run has ended.

    Raises:
        RecordedRunError: the folder is no run's.
        HubError: there is no such model, or the hub does not take it.
    """
    output = OutputFolder(run_folder)
    run, folder = read_folder(run_folder), run_folder / which
    if not any(folder.glob("*.safetensors")):
        raise HubError(
            f"{folder} holds no model: final/ is written at the end of a run, and best/ with"
            " --save_best at each evaluation that is better than those before."
        )
    if wished is not None and not is_repository_id(wished):
        raise HubError(f"--repo {wished} cannot name a repository: use OWNER/NAME or NAME.")
    wished = wished or run.arguments.get("hub_model_id") or repository_name(run.name)
    is_private = not is_public and bool(run.arguments.get("hub_private_repo", True))
    repository = open_repository(str(wished), private=is_private)
    if is_private and not repository.is_private:
        raise HubError(
            f"{repository.id} exists and is public: all could read the model. Add --public if they"
            " may, or give another --repo."
        )
    message = commit_message(output, which)
    try:
        noted = upload(folder, repository, message, lambda line: print(line, flush=True))
    except Exception as error:
        raise HubError(f"{folder} is not on the hub: {reason_of(error)}. Try again.") from error
    if (result := output.read_result()) is not None:
        output.write_result(result | {"hub": noted})
    return noted


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_training.hub", description="Publishes models on the Hugging Face hub."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser(
        "push",
        help="upload the model of a run",
        description="Uploads the model of a run with its card, in one commit. What the hub has"
        " already is not sent again.",
    )
    command.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="output_dir of a run")
    command.add_argument(
        "--which", choices=("final", "best"), default="final", help="which model (default: final)"
    )
    command.add_argument(
        "--repo",
        metavar="OWNER/NAME",
        help="repository (default: hub_model_id of the run, or its name)",
    )
    command.add_argument(
        "--public",
        action="store_true",
        help="make a new repository public (default: as hub_private_repo of the run says)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
