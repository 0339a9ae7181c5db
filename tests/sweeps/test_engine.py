"""Trials as processes: each once, failures told, nothing left behind by a driver that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.sweeps.conftest import PLAYER, make_study
from vlmzoo.config import SweepConfig
from vlmzoo.files import locked
from vlmzoo.sweeps.engine import Command, execute
from vlmzoo.sweeps.plan import Trial, plan
from vlmzoo.sweeps.sweep import sweep


def watch(running: Sequence[Trial]) -> None:
    pass


def started(out: Path) -> list[str]:
    return (out / "started.txt").read_text().split()


def run(study: SweepConfig, out: Path, command: Command, workers: int = 2) -> dict[str, str | None]:
    ended = execute(plan(study, out), command, workers=workers, watch=watch)
    return {trial.connector: failure and failure.message for trial, failure in ended}


def test_failures_are_told_and_the_others_go_on(tmp_path: Path, player: Command) -> None:
    failures = run(make_study(["broken", "killed", "silent", "mlp"], [0]), tmp_path, player)
    assert failures == {
        "broken": "ValueError: layer 3 is not a number",
        "killed": "killed by SIGKILL",
        "silent": "ended without a result",
        "mlp": None,
    }


def test_workers_share_the_cores(tmp_path: Path, player: Command) -> None:
    study = make_study(["mlp", "linear"], [0])
    run(study, tmp_path, player, workers=2)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    results = [trial.result() or {} for trial in plan(study, tmp_path)]
    assert [result["threads"] for result in results] == [str(max(1, cores // 2))] * 2


def test_a_sweep_run_again_redoes_nothing_but_what_failed(
    tmp_path: Path, player: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(["mlp", "broken"], [0, 1])
    outcome = sweep(study, tmp_path, player, workers=2)
    assert sorted(trial.connector for trial, _ in outcome.failed) == ["broken", "broken"]
    assert "FAILED: ValueError: layer 3 is not a number" in capsys.readouterr().out
    sweep(study, tmp_path, player, workers=2)
    counts = [started(tmp_path).count(trial.hash) for trial in plan(study, tmp_path)]
    assert counts == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("connectors", "num_started"),
    [
        (["refuses", "refuses as well", "mlp", "linear"], 2),  # two connectors: what they share is at fault
        (["refuses"], 4),
    ],
)
def test_what_all_refuse_alike_is_the_studys_fault(
    connectors: list[str], num_started: int, tmp_path: Path, player: Command
) -> None:
    script = tmp_path / "player.py"
    script.write_text(script.read_text().replace('"it" if name == "refuses" else name', '"data.json[3]: no answer"'))
    with pytest.raises(ValueError, match=r"^data.json\[3\]: no answer$"):
        sweep(make_study(connectors, [0, 1, 2, 3]), tmp_path, player, workers=1)
    assert len(started(tmp_path)) == num_started


@pytest.mark.parametrize("others", [["refuses this", "refuses that"], ["refuses", "mlp"], ["broken", "killed"]])
def test_what_only_some_refuse_stops_nobody(others: list[str], tmp_path: Path, player: Command) -> None:
    outcome = sweep(make_study([*others, "linear"], [0, 1]), tmp_path, player, workers=1)
    assert len(started(tmp_path)) == 6
    assert len(outcome.summary["rows"]) == (2 if "mlp" in others else 1)


def test_a_connector_more_runs_only_its_own_trials(tmp_path: Path, player: Command) -> None:
    sweep(make_study(["mlp"], [0, 1]), tmp_path, player, workers=2)
    outcome = sweep(make_study(["mlp", "linear"], [0, 1]), tmp_path, player, workers=2)
    assert len(started(tmp_path)) == len(set(started(tmp_path))) == 4
    assert len(outcome.summary["rows"]) == 2


def test_two_sweeps_cannot_work_in_one_directory(tmp_path: Path, player: Command, study: SweepConfig) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another process is working here"):
        sweep(study, tmp_path, player, workers=1)
    assert not (tmp_path / "trials").exists()


def test_leaving_the_loop_ends_what_still_runs(tmp_path: Path, player: Command) -> None:
    trials = plan(make_study(["endless", "mlp"], [0]), tmp_path)
    with closing(execute(trials, player, workers=2, watch=watch)) as ended:
        for trial, _ in ended:
            if trial.connector == "mlp":
                break
    pid_file = trials[0].folder / "pid"
    assert not pid_file.is_file() or not alive(int(pid_file.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux alone")
def test_trials_die_with_a_killed_driver(tmp_path: Path) -> None:
    script = tmp_path / "player.py"
    script.write_text(PLAYER)
    driver = f"""
import sys
from pathlib import Path
from tests.sweeps.conftest import make_study
from vlmzoo.sweeps.engine import execute
from vlmzoo.sweeps.plan import plan
trials = plan(make_study(["endless"], [0]), Path({str(tmp_path)!r}))
def watch(running):
    if (running[0].folder / "pid").is_file() and (pid := (running[0].folder / "pid").read_text()):
        print(pid, flush=True)
list(execute(trials, lambda trial: [sys.executable, {str(script)!r}, str(trial.folder)], workers=1, watch=watch))
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    descriptor = os.pidfd_open(pid)
    process.kill()
    process.wait()
    assert ended(descriptor)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ended(descriptor: int) -> bool:
    """Waits on the kernel, ten seconds at most, for a process that is not our child."""
    import select

    readable, _, _ = select.select([descriptor], [], [], 10)
    return bool(readable)
