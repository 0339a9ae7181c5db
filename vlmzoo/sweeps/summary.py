"""summary.json and summary.csv: one row an arm, computed again from what the trials predicted and recorded."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vlmzoo.files import write_json, write_whole
from vlmzoo.sweeps.plan import Trial
from vlmzoo.sweeps.statistics import Interval, Scores, intervals

SCHEMA = 1
Summary = dict[str, Any]
Answers = dict[str, dict[str, float]]
"""Capability -> item -> score."""


def summarise(trials: Sequence[Trial]) -> Summary:
    """What the finished trials say, best arm first.

    Blind and oracle arms, the gap they span and FLOPs are null: nothing measures them yet.

    Raises:
        ValueError: predictions that are missing, broken, or of other questions than those of the other trials.
    """
    arms = [arm for arm in _arms(trials) if arm]
    answers = [[read_answers(trial) for trial in arm] for arm in arms]
    scores = [_scores(arm, read, answers[0][0]) for arm, read in zip(arms, answers, strict=True)]
    rows = [_row(*arm) for arm in zip(arms, scores, intervals(scores), strict=True)]
    nothing = {"accuracy": None, "capabilities": None}
    return {
        "schema": SCHEMA,
        "blind": nothing,
        "oracle": dict(nothing),
        "rows": sorted(rows, key=lambda row: -row["accuracy"]),
    }


def _arms(trials: Sequence[Trial]) -> list[list[Trial]]:
    arms: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        arm = arms.setdefault((trial.connector, trial.encoder, trial.llm), [])
        if trial.result() is not None and trial.run.evaluation:
            arm.append(trial)
    return list(arms.values())


def read_answers(trial: Trial) -> Answers:
    """The score of every item by capability; capabilities of several tasks carry the task's name in front.

    Raises:
        ValueError: a file that cannot be read, or a line of it; the message names both.
    """
    answers: Answers = {}
    for task in trial.run.evaluation:
        file = trial.folder / "predictions" / f"{task}.jsonl"
        prefix = f"{task}." if len(trial.run.evaluation) > 1 else ""
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
        for number, line in enumerate(lines, start=1):
            try:
                item = json.loads(line)
                capability, identity, score = item["capability"], item["id"], float(item["score"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{file}:{number}: expected a prediction with id, capability and score, got {line[:80]!r}"
                ) from None
            answers.setdefault(prefix + str(capability or task), {})[str(identity)] = score
        if not lines:
            raise ValueError(f"{file}: expected predictions, found none")
    return answers


def _scores(arm: Sequence[Trial], read: Sequence[Answers], first: Answers) -> Scores:
    """(seeds, items) for every capability; `first` sets the questions and their order."""
    for trial, answers in zip(arm, read, strict=True):
        if {name: set(items) for name, items in answers.items()} != {name: set(items) for name, items in first.items()}:
            raise ValueError(
                f"{trial.folder}: was asked other questions than the other trials; delete it to run it again"
            )
    return {
        name: np.array([[answers[name][item] for item in items] for answers in read]) for name, items in first.items()
    }


def _row(arm: Sequence[Trial], scores: Scores, interval: Interval) -> dict[str, Any]:
    results = [result for trial in arm if (result := trial.result())]

    def mean(key: str) -> float | None:
        values = [result[key] for result in results if result.get(key) is not None]
        return fmean(values) if values else None

    def whole(key: str) -> int | None:
        value = mean(key)
        return None if value is None else round(value)

    return {
        "connector": arm[0].connector,
        "encoder": arm[0].encoder,
        "llm": arm[0].llm,
        "seeds": [trial.seed for trial in arm],
        "accuracy": interval.mean,
        "ci95": None if interval.low is None else [interval.low, interval.high],
        "dof": interval.dof,
        "gap_closed": None,
        "capabilities": {name: float(items.mean()) for name, items in scores.items()},
        "visual_tokens": whole("visual_tokens"),
        "trainable_parameters": whole("trainable_parameters"),
        "train_flops": None,
        "samples_per_second": mean("samples_per_second"),
        "peak_memory_bytes": max((result.get("peak_memory_bytes") or 0 for result in results), default=0) or None,
        "seconds": mean("seconds"),
    }


def write(summary: Summary, out: Path) -> None:
    """Writes summary.json and summary.csv into the sweep's directory."""
    write_json(out / "summary.json", summary)
    write_whole(out / "summary.csv", to_csv(summary))


def to_csv(summary: Summary) -> str:
    """The rows with one column a capability."""
    text = io.StringIO()
    rows = [_flat(row) for row in summary["rows"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["ci95"] or (None, None)
    flat = {
        **row,
        "seeds": " ".join(map(str, row["seeds"])),
        "ci95_low": low,
        "ci95_high": high,
        **{f"capability.{name}": value for name, value in row["capabilities"].items()},
    }
    return {key: value for key, value in flat.items() if key not in ("ci95", "capabilities")}
