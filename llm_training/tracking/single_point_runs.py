"""The runs of the trackers that take one point at a time: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_training.tracking.errors import TrackingError
from llm_training.tracking.tracked_run import Point, Status

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from arguments import Arguments

Parameters = dict[str, bool | int | float | str]


class TensorBoardRun:
    """Event files in the run's own folder.

    What they hold cannot be asked of them, and a kill may have cost the last points. So a run that
    goes on hides all of them (`purge_step`) and writes them anew.
    """

    name = "tensorboard"
    points_at_once = 1

    def __init__(self, folder: Path, parameters: Parameters, *, is_resumed: bool) -> None:
        """Takes the folder of the event files and what is noted of the run.

        Raises:
            TrackingError: TensorBoard is missing.
        """
        require_package("tensorboard")
        self._folder = folder
        self._parameters = parameters
        self._is_resumed = is_resumed

    def start(self) -> None:
        """Opens a new event file."""
        from accelerate.tracking import TensorBoardTracker

        # The first argument is a folder below the second: an experiment's name, such as /a/b, might
        # leave it.
        purge_step = 0 if self._is_resumed else None
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

    def closing_calls(self, status: Status, artifacts: Sequence[Path]) -> list[Callable[[], Any]]:
        """Closes the file: TensorBoard knows neither status nor artifacts."""
        return [self._tracker.finish]


class WandbRun:
    """A run of Weights & Biases, which goes on with one that broke off in the same folder.

    It keeps steps in order and passes over what is behind the last one it has.
    """

    name = "wandb"
    points_at_once = 1

    def __init__(self, arguments: Arguments, folder: Path, parameters: Parameters) -> None:
        """Takes experiment and run names, the folder of its files, and what is noted of the run.

        Raises:
            TrackingError: W&B is missing.
        """
        require_package("wandb")
        self._project, self._run_name = arguments.experiment_name, arguments.run_name
        self._folder = folder
        self._parameters = parameters

    def start(self) -> None:
        """Begins a run or goes on with it."""
        from accelerate.tracking import WandBTracker

        self._tracker: GeneralTracker = WandBTracker(
            self._project, name=self._run_name, dir=str(self._folder), resume="auto"
        )
        self._tracker.start()
        self._tracker.store_init_configuration(self._parameters)

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those from the step on that W&B expects next."""
        expected = self._tracker.tracker.step if points else 0
        return [point for point in points if point.step >= expected]

    def send(self, points: Sequence[Point]) -> None:
        """Hands them to W&B, which sends them from a process of its own."""
        for point in points:
            self._tracker.log(point.metrics, step=point.step)

    def closing_calls(self, status: Status, artifacts: Sequence[Path]) -> list[Callable[[], Any]]:
        """Ends the run."""
        return [self._tracker.finish]


def require_package(name: str) -> None:
    """Makes sure that a tracker can be imported.

    Raises:
        TrackingError: it cannot.
    """
    if importlib.util.find_spec(name) is None:
        raise TrackingError(
            f"report_to: {name} is not installed. Install it (pip install {name}) or leave it out."
        )
