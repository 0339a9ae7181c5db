"""Where a run's figures go besides metrics.jsonl: tensorboard, wandb and trackio, by accelerate's trackers."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from vlmzoo.config import RunConfig

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "vlmzoo"
PLACE = ("stage", "step", "num_steps", "total")  # of a line: where it stands, no figures


def check(names: Sequence[str]) -> None:
    """Raises a ValueError for a tracker that is not installed; imports none of them."""
    for name in names:
        for package in ("accelerate", name):
            if find_spec(package) is None:
                raise ValueError(f"--track {name}: {package} is not installed; pip install 'vlmzoo[tracking]' has it")


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of metrics.jsonl by name: `align/loss`, `align/lr/connector`."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{line['stage']}/{key}/{part}": number for part, number in value.items()}
        elif key not in PLACE:
            flat[f"{line['stage']}/{key}"] = value
    return flat


class Trackers:
    """What a run tells its trackers, no step twice: one that is continued goes on in the same place.

    tensorboard's files lie in `OUT/tracking/tensorboard`, and steps from `step` on that stand there already are purged
    when they are read. wandb's and trackio's runs cannot be cut back: they are not told a step again, which would be
    the same to the last bit. They start at the first line, when whoever trains in several processes has set accelerate
    up.

    Args:
        step: how many steps of all stages lie behind.
    """

    def __init__(self, names: Sequence[str], run: RunConfig, out: Path, step: int) -> None:
        self._names, self._run, self._folder, self._step = tuple(dict.fromkeys(names)), run, out / "tracking", step
        self._started: list[tuple[GeneralTracker, Told | None]] | None = None

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl.

        Raises:
            ValueError: a tracker does not start.
        """
        if self._started is None:
            self._started = [self._start(name) for name in self._names]
        for tracker, told in self._started:
            if told is None or told.first_time(line["total"]):
                tracker.log(figures(line), step=line["total"])

    def close(self) -> None:
        """Waits until all is written or sent."""
        for tracker, _ in self._started or []:
            with redirect_stdout(sys.stderr):
                tracker.finish()
        self._started = None

    def _start(self, name: str) -> tuple[GeneralTracker, Told | None]:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        from vlmzoo.config import to_dict

        PartialState()  # without it their logger raises
        self._folder.mkdir(parents=True, exist_ok=True)
        told = None if name == "tensorboard" else Told(self._folder / f"{name}.txt")
        if told is None:
            tracker = TensorBoardTracker(name, self._folder, purge_step=self._step)
        else:
            shared = {"name": f"{self._run.connector.name} {told.id}", "resume": "allow", "config": to_dict(self._run)}
            if name == "wandb":
                tracker = WandBTracker(PROJECT, id=told.id, dir=str(self._folder), **shared)
            else:
                tracker = TrackioTracker(PROJECT, **shared)  # which knows a run by its name
        try:
            with redirect_stdout(sys.stderr):
                tracker.start()
        except Exception as error:  # each has its own: no key, no connection, no right to write
            raise ValueError(f"--track {name}: does not start ({' '.join(str(error).split())})") from None
        return tracker, told


class Told:
    """The id of a tracker's run and how many steps it was told, in a file: a killed run knows both.

    The number is written before the tracker gets the step: killed between the two, that step is missing, not double.
    """

    def __init__(self, file: Path) -> None:
        from vlmzoo.files import write_whole

        if not file.exists():
            write_whole(file, self._text(secrets.token_hex(4), 0))
        self._file = file.open("r+", encoding="utf-8")
        self.id, steps = self._file.read().split()
        self._steps = int(steps)

    def first_time(self, step: int) -> bool:
        """Whether this step is new; it is not any more."""
        if step < self._steps:
            return False
        self._steps = step + 1
        self._file.seek(0)
        self._file.write(self._text(self.id, self._steps))  # as long as before: one write, whole or not at all
        self._file.flush()
        return True

    @staticmethod
    def _text(name: str, steps: int) -> str:
        return f"{name} {steps:012}\n"
