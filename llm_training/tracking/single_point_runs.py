"""The runs of the trackers that take one point at a time: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.tracking.errors import TrackingError
from llm_training.tracking.record import Parameters, RunRecord
from llm_training.tracking.tracked_run import Ending, Point, Status, attempt_all

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from arguments import Arguments

WANDB_ID_FILE = "wandb_run_id.txt"
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 8.0  # what it could not send then, `wandb sync` can: it is on the disk
EXIT_CODES: dict[Status, int] = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}


class TensorBoardRun:
    """Event files in the run's own folder.

    What they hold cannot be asked of them, and a kill may have cost the last points. So a run that
    goes on hides all of them (`purge_step`) and writes them anew.
    """

    name = "tensorboard"
    points_at_once = 1

    def __init__(self, folder: Path, record: RunRecord) -> None:
        """Takes the folder of the event files and what is noted of the run.

        Raises:
            TrackingError: TensorBoard is missing.
        """
        require_package("tensorboard")
        self._folder = folder
        self._parameters = with_tags(record)

    def start(self) -> None:
        """Opens a new event file."""
        from accelerate.tracking import TensorBoardTracker

        # The first argument is a folder below the second: an experiment's name, such as /a/b, might
        # leave it.
        # Also where a run was killed before its first checkpoint and begins anew.
        purge_step = 0 if any(self._folder.glob("events.*")) else None
        self._tracker: GeneralTracker = TensorBoardTracker("", self._folder, purge_step=purge_step)
        self._tracker.start()
        self._tracker.store_init_configuration(self._parameters)

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """All of them."""
        return list(points)

    def send(self, points: Sequence[Point]) -> None:
        """Writes them with the times at which they were logged."""
        for point in points:
            self._tracker.log(point.metrics, step=point.step, walltime=point.time)

    def upload(self, path: Path) -> None:
        """Nothing: TensorBoard keeps no files."""

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        """Closes the file: TensorBoard knows neither status nor artifacts."""
        return attempt_all([self._tracker.finish])


class WandbRun:
    """A run of Weights & Biases, which goes on with the one of an earlier start in its folder.

    W&B keeps steps in order and passes over what is behind the last one it has. Offline
    (WANDB_MODE=offline) an earlier file cannot be asked what it holds: each start writes a file
    with all points, and the newest is the one to send (`wandb sync`).
    """

    name = "wandb"
    points_at_once = 1

    def __init__(self, arguments: Arguments, folder: Path, record: RunRecord) -> None:
        """Takes experiment and run names, the folder of its files, and what is noted of the run.

        Raises:
            TrackingError: W&B is missing.
        """
        require_package("wandb")
        self._project, self._run_name = arguments.experiment_name, arguments.run_name
        self._folder = folder
        self._parameters = with_tags(record)

    def start(self) -> None:
        """Begins a run or goes on with it.

        Raises:
            TrackingError: W&B is neither logged in nor offline; nobody is asked for a key.
        """
        import wandb
        from accelerate.tracking import WandBTracker

        mode = wandb.setup().settings.mode
        if mode not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False):
            raise TrackingError(
                "report_to: wandb is not logged in. Log in (wandb login, or the environment's"
                " WANDB_API_KEY), keep the run on this machine (WANDB_MODE=offline), or leave it"
                " out."
            )
        self._tracker: GeneralTracker = WandBTracker(
            self._project,
            name=self._run_name,
            id=self._own_id(),
            dir=str(self._folder),
            resume="allow",
            settings=wandb.Settings(**private_settings()),
        )
        self._tracker.start()
        self._tracker.store_init_configuration(self._parameters)

    def _own_id(self) -> str:
        """The run's id, kept in its folder."""
        file = self._folder / WANDB_ID_FILE
        if not file.exists():
            beside = file.with_suffix(".tmp")
            beside.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
            beside.replace(file)
        return file.read_text(encoding="utf-8").strip()

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those from the step on that W&B expects next."""
        expected = self._tracker.tracker.step if points else 0
        return [point for point in points if point.step >= expected]

    def send(self, points: Sequence[Point]) -> None:
        """Hands them to W&B, which sends them from a process of its own."""
        for point in points:
            self._tracker.log({**point.metrics, "_timestamp": point.time}, step=point.step)

    def upload(self, path: Path) -> None:
        """Nothing: W&B gets the numbers."""

    def close(self, ending: Ending, artifacts: Sequence[Path]) -> list[Exception]:
        """Ends the run; W&B shows an exit code other than 0 as failed."""
        finish = self._tracker.tracker.finish
        return attempt_all([partial(finish, exit_code=EXIT_CODES[ending.status])])


def private_settings() -> dict[str, Any]:
    """What W&B is told not to collect, and how long it may take; for `wandb.Settings`.

    Code, git remote, packages, host and its load stay here: our own points and record say what a
    reviewer needs.
    """
    off = (
        *("disable_code", "disable_git", "disable_job_creation", "quiet"),
        *("x_disable_meta", "x_disable_stats", "x_disable_machine_info"),
    )
    return {
        **dict.fromkeys(off, True),
        "save_code": False,
        "x_save_requirements": False,
        "console": "off",
        "init_timeout": WANDB_INIT_SECONDS,
        "finish_timeout": WANDB_FINISH_SECONDS,
    }


def with_tags(record: RunRecord) -> Parameters:
    """The parameters of a run and its tags, for trackers that have none."""
    return {**record.parameters, **record.tags}


def require_package(name: str) -> None:
    """Makes sure that a tracker can be imported.

    Raises:
        TrackingError: it cannot.
    """
    if importlib.util.find_spec(name) is None:
        raise TrackingError(
            f"report_to: {name} is not installed. Install it (pip install {name}) or leave it out."
        )
