"""Kills a run again and again, each time at a random function call, until it ends: `kills.py RUN.yaml OUT SEED`.

A killed process is a fork of this one, which has imported everything and computed nothing. OUT.kills says where each
was killed: [stage, step, and whether a checkpoint was being written].
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from functools import wraps
from pathlib import Path
from threading import RLock
from types import FrameType
from typing import Any

from tqdm import tqdm

from vlmzoo.config import RunConfig, load
from vlmzoo.sweeps.trial import run_trial
from vlmzoo.training import checkpoint, engines, run

_ = engines  # imported before the forks


def train(config: Path, out: Path, mark: int, calls: int) -> bool:
    """Trains in a fork that is killed so many calls behind its n-th mark: a step's or a checkpoint's begin.

    Returns:
        whether it ended by itself.
    """
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if status and not killed:
            sys.exit(f"a run ended with status {status}")
        return not killed
    tqdm.set_lock(RLock())  # its own is shared with forks: one that is killed holding it would stop all others
    marks = seen = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            sys.setprofile(None)
            tell(frame, out)
            os.kill(os.getpid(), signal.SIGKILL)

    def marked(function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal marks
            marks += 1
            if marks == mark:
                sys.setprofile(count)
            return function(*arguments)

        return call

    run.take_step, checkpoint.save = marked(run.take_step), marked(checkpoint.save)
    run_trial(load(RunConfig, config), out, out / "cache")
    os._exit(0)


def tell(frame: FrameType | None, out: Path) -> None:
    stage, step, saving = None, None, False
    while frame is not None:
        if frame.f_code is run.train.__code__:
            stage, step = frame.f_locals.get("name"), frame.f_locals.get("step")
        saving = saving or frame.f_code.co_filename == checkpoint.__file__
        frame = frame.f_back
    with (out.parent / f"{out.name}.kills").open("a") as file:
        file.write(json.dumps([stage, step, saving]) + "\n")


def main(config: str, out: str, seed: str) -> None:
    place = Path(out)
    place.parent.mkdir(parents=True, exist_ok=True)
    assert train(Path(config), place.with_name(f"{place.name}-whole"), 0, 0)
    draw = random.Random(int(seed))
    while not train(Path(config), place, draw.randint(1, 6), draw.randint(1, 20_000)):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
