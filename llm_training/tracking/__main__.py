"""What is done to the record of a run by hand: `sync` sends what MLflow lacks of it.

`python -m llm_training.tracking sync OUTPUT_DIR`, and `log_model` in its place for the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_training.tracking.errors import TrackingError
from llm_training.tracking.sync import log_model_of, sync


def main(words: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit code."""
    arguments = build_parser().parse_args(words)
    folder, uri = arguments.output_dir, arguments.tracking_uri
    try:
        if arguments.command == "sync":
            print(sync(folder, uri).line)
        else:
            print(log_model_of(folder, uri, arguments.register_model))
    except TrackingError as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_training.tracking", description="What is done to the record of a run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    sync_command = commands.add_parser(
        "sync",
        help="send to MLflow what it lacks of a run",
        description="Sends to MLflow what it lacks of a run: parameters, tags, data sets, points,"
        " files, and how it ended. What is there is not sent again.",
    )
    model_command = commands.add_parser(
        "log_model",
        help="log the finished model of a run to MLflow",
        description="Logs the model in final/ to the run in MLflow, with its signature.",
    )
    model_command.add_argument(
        "--register_model", metavar="NAME", help="also register it under this name"
    )
    for command in (sync_command, model_command):
        command.add_argument(
            "output_dir", type=Path, metavar="OUTPUT_DIR", help="folder of the run"
        )
        command.add_argument(
            "--tracking_uri",
            metavar="URI",
            help="MLflow store or server (default: that of the run)",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
