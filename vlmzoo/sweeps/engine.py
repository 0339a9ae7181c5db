"""Runs trials as local subprocesses. The state is in their directories; this only starts, watches and reports."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmzoo.config import dump
from vlmzoo.files import write_whole
from vlmzoo.sweeps.plan import Trial

Command = Callable[[Trial], list[str]]

POLL_SECONDS = 0.2
MOST_WORKERS = 3  # each holds its own torch and models, about 1 GB: 3 keep the default study under 4 GB
PR_SET_PDEATHSIG = 1
ERROR = "vlmzoo: error: "


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result."""

    message: str
    refused: bool = False  # what it was given, before or while it trained, in the one line that commands end with


def train_command(cache_dir: Path, plugins: Sequence[Path] = (), track: Sequence[str] = ()) -> Command:
    """The command of a trial: given again, it continues; given once more, it does nothing."""

    def command(trial: Trial) -> list[str]:
        named = [argument for plugin in plugins for argument in ("--plugin", str(plugin))]
        named += [argument for tracker in track for argument in ("--track", tracker)]
        config, out = str(trial.folder / "config.yaml"), str(trial.folder)
        return [sys.executable, "-m", "vlmzoo", "train", config, "--out", out, "--cache", str(cache_dir), *named]

    return command


def default_workers(num_trials: int) -> int:
    """As many as there are GPUs; without any, one a core."""
    return max(1, min(num_trials, len(_devices()) or min(_num_cores(), MOST_WORKERS)))


def execute(
    trials: Sequence[Trial], command: Command, *, workers: int, watch: Callable[[Sequence[Trial]], None]
) -> Generator[tuple[Trial, Failure | None], None, None]:
    """Yields each trial as soon as it ends, with None or with what went wrong.

    `watch` is called with the running trials every POLL_SECONDS. Leaving the loop early ends what still runs.
    """
    waiting = list(trials)
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for worker in range(workers):
                if waiting and worker not in running:
                    trial = waiting.pop(0)
                    running[worker] = trial, _start(trial, command(trial), _environment(worker, workers))
            for worker, (trial, process) in list(running.items()):
                if process.poll() is not None:
                    del running[worker]
                    yield trial, _failure(trial, process.returncode)
            watch([trial for trial, _ in running.values()])
            time.sleep(POLL_SECONDS)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(trial: Trial, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    write_whole(trial.folder / "config.yaml", dump(trial.run))
    with (trial.folder / "log.txt").open("wb") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the trials.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
        )


def _die_with(parent: int) -> None:
    """In the child, before it runs the command: a killed driver leaves nobody behind who writes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _environment(worker: int, workers: int) -> dict[str, str]:
    threads = str(max(1, _num_cores() // workers))
    devices = _devices()
    chosen = {"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]} if devices else {}
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **chosen}


def _devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _failure(trial: Trial, code: int) -> Failure | None:
    if code == 0:
        return None if trial.result() is not None else Failure("ended without a result")
    if code < 0:
        with suppress(ValueError):
            return Failure(f"killed by {signal.Signals(-code).name}")
        return Failure(f"killed by signal {-code}")
    log = (trial.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return Failure(f"ended with code {code} and said nothing")
    return Failure(lines[-1].removeprefix(ERROR), refused=code == 2 and lines[-1].startswith(ERROR))
