"""Files by which a person speaks to a run that is under way: `touch OUTPUT_DIR/SAVE`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# Save, evaluate or let the model speak now; stop with a checkpoint; let the learning rate decay.
COMMANDS = ("SAVE", "EVAL", "SAMPLE", "STOP", "DECAY")
# A look takes about 10 microseconds on a local disk, but milliseconds on storage over a network.
MIN_SECONDS = 1.0


class ControlFiles:
    """Looks for the files, on rank 0, and removes them: each acts once."""

    def __init__(
        self,
        folder: Path,
        min_seconds: float = MIN_SECONDS,
        say: Callable[[str], object] = print,
    ) -> None:
        """Nothing is looked for yet.

        Args:
            folder: the output folder of the run.
            min_seconds: between two looks; calls in between find nothing.
            say: told of a file that cannot be removed.
        """
        self._paths = {name: os.path.join(folder, name) for name in COMMANDS}
        self._min_seconds = min_seconds
        self._say = say
        self._next_look = -1.0
        self._stuck: set[str] = set()

    def take(self) -> frozenset[str]:
        """The commands given since the last look, each once; cheap enough for every step."""
        if (now := time.monotonic()) < self._next_look:
            return frozenset()
        self._next_look = now + self._min_seconds
        found = {name for name, path in self._paths.items() if os.path.isfile(path)}
        self._stuck &= found
        return frozenset(name for name in sorted(found - self._stuck) if self._remove(name))

    def _remove(self, name: str) -> bool:
        """Whether the command counts: not where somebody took its file back meanwhile."""
        try:
            os.unlink(self._paths[name])
        except FileNotFoundError:
            return False
        except OSError as error:
            self._stuck.add(name)
            self._say(
                f"{self._paths[name]} cannot be removed: {error.strerror}. It is obeyed this once;"
                " remove it before giving the same command again."
            )
        return True
