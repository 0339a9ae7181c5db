"""What a run writes down while it trains: a line a step, and how far it is for whoever watches."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vlmzoo.files import write_whole
from vlmzoo.training.trackers import Trackers

PLAIN_SECONDS = 15  # between two lines where there is no terminal
LAST = 20  # steps whose mean is a stage's final loss


class Log:
    """metrics.jsonl, cut back to where the run stands, and a progress bar (plain lines without a terminal).

    Args:
        file: None: nothing is written or shown, as in all processes of a run but the first.
        trackers: are told every line that is written.
    """

    def __init__(self, file: Path | None, total: int, trackers: Trackers) -> None:
        self._trackers = trackers
        self.first: dict[str, dict[str, Any]] = {}  # stage -> the line of its first step
        self.lines: list[dict[str, Any]] = []
        self._bar: tqdm | None = None
        self._samples, self._seconds = 0, 0.0
        self._said = time.monotonic()
        self._file: TextIO | None = None
        if file is None:
            return
        if file.is_file():
            whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            self.lines = [line for line in map(json.loads, whole) if line["total"] < total]
        for line in self.lines:
            self.first.setdefault(line["stage"], line)
        write_whole(file, "".join(json.dumps(line) + "\n" for line in self.lines))  # killed here, nothing is lost
        self._file = file.open("a", encoding="utf-8")

    def stage(self, name: str, start: int, num_steps: int) -> None:
        """A stage begins, or goes on at `start`."""
        self._end_bar()
        self._name, self._num_steps = name, num_steps
        if sys.stderr.isatty() and self._file is not None:
            self._bar = tqdm(desc=name, initial=start, total=num_steps, unit="step", file=sys.stderr)

    def write(self, line: dict[str, Any]) -> None:
        """One step's figures, `seconds` and `samples` among them."""
        self.lines.append(line)
        self.first.setdefault(line["stage"], line)
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None  # a failed write names no file
        self._trackers.log(line)
        self._samples += line["samples"]
        self._seconds += line["seconds"]
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said > PLAIN_SECONDS or line["step"] + 1 == self._num_steps:
            self._said = time.monotonic()
            rate = self._samples / self._seconds
            left = (self._num_steps - line["step"] - 1) * line["samples"] / rate
            print(
                f"{self._name}: step {line['step'] + 1} of {self._num_steps}, loss {line['loss']:.3f}, "
                f"{rate:.0f} samples/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """The run has ended."""
        self._end_bar()
        self._trackers.close()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def samples_per_second(self) -> float | None:
        """Of all steps ever taken, waiting for data included; None: none was."""
        seconds = sum(line["seconds"] for line in self.lines)
        return sum(line["samples"] for line in self.lines) / seconds if seconds else None

    @property
    def flops(self) -> int | None:
        """Of all stages: what the first step of each took, times its steps; None: none was taken."""
        first = [line["flops"] * line["num_steps"] for line in self.lines if line["step"] == 0]
        return sum(first) if first else None

    def final_loss(self) -> dict[str, float]:
        """Stage -> mean loss of its last steps."""
        losses: dict[str, list[float]] = {}
        for line in self.lines:
            losses.setdefault(line["stage"], []).append(line["loss"])
        return {stage: sum(values[-LAST:]) / len(values[-LAST:]) for stage, values in losses.items()}
