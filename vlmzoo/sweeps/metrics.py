"""What trials write down while they train: metrics.jsonl, one line a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmzoo.sweeps.plan import Trial

TAIL_BYTES = 4096


def fraction(trial: Trial) -> float:
    """The part of a trial's training that is behind it, every stage counted alike."""
    last = last_metrics(trial.folder / "metrics.jsonl")
    stages = list(trial.run.stages)
    if last is None or last.get("stage") not in stages:
        return 0.0
    return (stages.index(last["stage"]) + (last["step"] + 1) / last["num_steps"]) / len(stages)


def last_metrics(file: Path) -> dict[str, Any] | None:
    """The last whole line; None: nothing there yet."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = opened.read().split(b"\n")
    except FileNotFoundError:
        return None
    if len(lines) < 2:  # what follows the last line break may be half a line
        return None
    try:
        last = json.loads(lines[-2])
    except ValueError:
        return None
    return last if isinstance(last, dict) else None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl.

    Raises:
        ValueError: a line that is no JSON object.
    """
    if not file.is_file():
        return []
    rows = []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: expected a JSON object, got {line[:80]!r}")
        rows.append(row)
    return rows
