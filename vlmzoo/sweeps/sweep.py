"""A study from its plan to its report: starts what has no result yet, shows each row when it is there."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmzoo import world
from vlmzoo.config import SweepConfig, dump, load
from vlmzoo.files import locked, write_whole
from vlmzoo.sweeps import figure, report, summary
from vlmzoo.sweeps.engine import Command, Failure, default_workers, execute
from vlmzoo.sweeps.metrics import fraction
from vlmzoo.sweeps.plan import Trial, plan
from vlmzoo.sweeps.table import align, duration

BAR = "{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    summary: summary.Summary
    failed: list[tuple[Trial, Failure]]


def sweep(study: SweepConfig, out: Path, command: Command, *, workers: int | None = None) -> Outcome:
    """Runs the trials of a resolved study that have no result, then writes summary.json, summary.csv, report.html.

    A trial that fails is reported, and the others go on.

    Raises:
        ValueError: another sweep is running in `out`, or the study gives its trials what all of them refuse.
    """
    trials = plan(study, out)
    summary.refuse_other_worlds(trials, world.VERSION)
    with locked(out):
        write_whole(out / "study.yaml", dump(study))
        waiting = [trial for trial in trials if trial.result() is None]
        if done := len(trials) - len(waiting):
            print(f"{done} of {len(trials)} trials are done already", file=sys.stderr)
        workers = workers or default_workers(len(waiting))
        if waiting:
            print(f"{len(waiting)} trials to run in {out}, {workers} at a time", file=sys.stderr)
        failed = _run(waiting, len(trials), command, workers)
        return Outcome(write_report(out), failed)


def write_report(out: Path) -> summary.Summary:
    """The summary of a sweep's directory, computed again from its trials and written there with the report.

    Raises:
        ValueError: no study there, results that cannot be read, or a summary without the trials that it came from.
    """
    study = load(SweepConfig, out / "study.yaml")
    if (out / "summary.json").exists() and not (out / "trials").is_dir():
        raise ValueError(f"{out / 'trials'}: is not there; summary.json, which came from it, stays as it is")
    trials = plan(study, out)
    found = summary.summarise(trials)
    summary.write(found, out)
    colours = report.colours(trials)
    write_whole(out / "figure.svg", figure.render(found, colours))
    write_whole(out / "report.html", report.render(out.resolve().name, study, trials, found))
    return found


def _run(waiting: Sequence[Trial], num_trials: int, command: Command, workers: int) -> list[tuple[Trial, Failure]]:
    failed: list[tuple[Trial, Failure]] = []
    finished = 0
    with tqdm(total=len(waiting), disable=not sys.stderr.isatty() or not waiting, bar_format=BAR, ncols=90) as bar:

        def watch(running: Sequence[Trial]) -> None:
            bar.n = round(finished + sum(map(fraction, running)), 2)
            bar.refresh()

        with closing(execute(waiting, command, workers=workers, watch=watch)) as ended:
            for trial, failure in ended:
                finished += 1
                if failure is not None:
                    failed.append((trial, failure))
                if len(failed) == finished and (refusal := _refusal(failed, finished == len(waiting))):
                    raise ValueError(refusal)
                bar.write(_row(trial, failure, num_trials - len(waiting) + finished, num_trials), file=sys.stdout)
                sys.stdout.flush()
    return failed


def _refusal(failed: Sequence[tuple[Trial, Failure]], all_of_them: bool) -> str | None:
    """What trials of several connectors, or all there are, refused in the same words: the study is at fault then."""
    messages = {failure.message if failure.refused else None for _, failure in failed}
    several = len({trial.connector for trial, _ in failed}) > 1
    return messages.pop() if len(messages) == 1 and (several or all_of_them) else None


def _row(trial: Trial, failure: Failure | None, number: int, num_trials: int) -> str:
    head = f"[{number}/{num_trials}] {trial.title}: "
    if failure is not None:
        return f"{head}FAILED: {failure.message} (log: {trial.folder / 'log.txt'})"
    result: dict[str, Any] = trial.result() or {}
    scores = [f"{task} {100 * found['accuracy']:.1f} %" for task, found in result.get("evaluation", {}).items()]
    return head + ", ".join([*scores, duration(result.get("seconds"))])


def states(trials: Sequence[Trial]) -> str:
    """A plan as a table: every trial and whether it is done, was begun, or is still to do."""
    rows = [[trial.hash, trial.connector, trial.encoder, trial.llm, str(trial.seed), state(trial)] for trial in trials]
    return align(["trial", "connector", "encoder", "llm", "seed", "state"], rows, num_left=4)


def state(trial: Trial) -> str:
    """`done`, `begun` or `to do`."""
    if trial.result() is not None:
        return "done"
    return "begun" if (trial.folder / "metrics.jsonl").is_file() else "to do"
