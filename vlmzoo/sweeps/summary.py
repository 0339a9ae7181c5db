"""summary.json and summary.csv: one row an arm, computed again from what the trials predicted and recorded."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vlmzoo.config import SIGHT, Baseline
from vlmzoo.evaluation.metrics import normalise
from vlmzoo.files import write_json, write_whole
from vlmzoo.sweeps.plan import Trial
from vlmzoo.sweeps.statistics import Interval, Scores, intervals

SCHEMA = 2
Summary = dict[str, Any]
Answers = dict[str, dict[str, float]]
"""Capability -> item -> score."""

NOTHING = {"accuracy": None, "capabilities": None}


def summarise(trials: Sequence[Trial]) -> Summary:
    """What the finished trials say, best arm first.

    Beside the connectors' rows stand what they are measured by: `blind` and `oracle`, trained without images (over all
    LLMs, and `by_llm`), and `frequent`, the commonest answer of each capability. A row's `gap_closed` is the part of
    the way from its LLM's blind arm to its oracle; `shuffled` its accuracy with the images of other questions.

    Raises:
        ValueError: predictions that are missing, broken, or of other questions than those of the other trials, or
            results from several versions of the embedded world.
    """
    refuse_other_worlds(trials)
    arms = [arm for arm in _arms(trials) if arm]
    first = read_answers(arms[0][0]) if arms else {}
    scores = [_scores(arm, first) for arm in arms]
    connectors = [(arm, found) for arm, found in zip(arms, scores, strict=True) if not arm[0].is_baseline]
    baselines = {name: _baseline(name, arms, scores) for name in SIGHT}
    estimates = intervals([found for _, found in connectors])
    rows = [_row(arm, found, interval, baselines) for (arm, found), interval in zip(connectors, estimates, strict=True)]
    return {
        "schema": SCHEMA,
        **baselines,
        "frequent": _frequent(arms[0][0]) if arms else dict(NOTHING),
        "rows": sorted(rows, key=lambda row: -row["accuracy"]),
    }


def refuse_other_worlds(trials: Sequence[Trial], version: int | None = None) -> None:
    """Refuses results from several versions of the embedded world, or from another than `version`.

    Raises:
        ValueError: naming the first trial that does not belong to the others.
    """
    expected = version
    for trial in trials:
        found = (trial.result() or {}).get("world")
        if found is None:
            continue
        expected = found if expected is None else expected
        if found != expected:
            raise ValueError(
                f"{trial.folder}: comes from version {found} of the embedded world, expected {expected}: "
                "one table compares one world; choose another --out or delete it"
            )


def _arms(trials: Sequence[Trial]) -> list[list[Trial]]:
    arms: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        arm = arms.setdefault((trial.connector, trial.encoder, trial.llm), [])
        if trial.result() is not None and trial.run.evaluation:
            arm.append(trial)
    return list(arms.values())


def _baseline(name: Baseline, arms: Sequence[Sequence[Trial]], scores: Sequence[Scores]) -> dict[str, Any]:
    """The arm's figures for every LLM, and their means."""
    own = [(arm[0].llm, found) for arm, found in zip(arms, scores, strict=True) if arm[0].run.sees == SIGHT[name]]
    if not own:
        return dict(NOTHING)
    by_llm = {
        llm: {"accuracy": interval.mean, "ci95": _ci95(interval), "capabilities": _capabilities(found)}
        for (llm, found), interval in zip(own, intervals([found for _, found in own]), strict=True)
    }
    names = list(own[0][1])
    return {
        "accuracy": fmean(arm["accuracy"] for arm in by_llm.values()),
        "capabilities": {name: fmean(arm["capabilities"][name] for arm in by_llm.values()) for name in names},
        "by_llm": by_llm,
    }


def _frequent(trial: Trial) -> dict[str, Any]:
    """Always giving the commonest right answer of a question's capability."""
    expected: dict[str, Counter[str]] = {}
    for name, item in _predictions(trial):
        expected.setdefault(name, Counter())[normalise(str(item.get("expected")))] += 1
    capabilities = {name: max(found.values()) / found.total() for name, found in expected.items()}
    return {"accuracy": fmean(capabilities.values()), "capabilities": capabilities}


def _predictions(trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Capability and prediction of every item; capabilities of several tasks carry the task's name in front.

    Raises:
        ValueError: a file that cannot be read, or a line of it; the message names both.
    """
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
                yield (
                    prefix + str(item["capability"] or task),
                    {**item, "id": str(item["id"]), "score": float(item["score"])},
                )
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{file}:{number}: expected a prediction with id, capability and score, got {line[:80]!r}"
                ) from None
        if not lines:
            raise ValueError(f"{file}: expected predictions, found none")


def read_answers(trial: Trial) -> Answers:
    """The score of every item by capability.

    Raises:
        ValueError: a file that cannot be read, or a line of it; the message names both.
    """
    answers: Answers = {}
    for capability, item in _predictions(trial):
        answers.setdefault(capability, {})[item["id"]] = item["score"]
    return answers


def _scores(arm: Sequence[Trial], first: Answers) -> Scores:
    """(seeds, items) for every capability; `first` sets the questions and their order."""
    read = [read_answers(trial) for trial in arm]
    for trial, answers in zip(arm, read, strict=True):
        if {name: set(items) for name, items in answers.items()} != {name: set(items) for name, items in first.items()}:
            raise ValueError(
                f"{trial.folder}: was asked other questions than the other trials; delete it to run it again"
            )
    return {
        name: np.array([[answers[name][item] for item in items] for answers in read]) for name, items in first.items()
    }


def _ci95(interval: Interval) -> list[float] | None:
    return None if interval.low is None or interval.high is None else [interval.low, interval.high]


def _capabilities(scores: Scores) -> dict[str, float]:
    return {name: float(items.mean()) for name, items in scores.items()}


def _gap_closed(accuracy: float, blind: float | None, oracle: float | None) -> float | None:
    return None if blind is None or oracle is None or oracle <= blind else (accuracy - blind) / (oracle - blind)


def _row(
    arm: Sequence[Trial], scores: Scores, interval: Interval, baselines: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    results = [result for trial in arm if (result := trial.result())]

    def mean(key: str) -> float | None:
        values = [result[key] for result in results if result.get(key) is not None]
        return fmean(values) if values else None

    def shuffled() -> float | None:
        found = [score["accuracy"] for result in results for score in (result.get("shuffled") or {}).values()]
        return fmean(found) if found else None

    def of_baseline(name: Baseline) -> float | None:
        return baselines[name].get("by_llm", {}).get(arm[0].llm, {}).get("accuracy")

    def whole(key: str) -> int | None:
        value = mean(key)
        return None if value is None else round(value)

    return {
        "connector": arm[0].connector,
        "encoder": arm[0].encoder,
        "llm": arm[0].llm,
        "seeds": [trial.seed for trial in arm],
        "accuracy": interval.mean,
        "ci95": _ci95(interval),
        "dof": interval.dof,
        "gap_closed": _gap_closed(interval.mean, of_baseline("blind"), of_baseline("oracle")),
        "shuffled": shuffled(),
        "capabilities": _capabilities(scores),
        "visual_tokens": whole("visual_tokens"),
        "trainable_parameters": whole("trainable_parameters"),
        "train_flops": whole("train_flops"),
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
