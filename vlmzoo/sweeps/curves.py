"""Learning curves: the losses of several seeds, averaged over spans of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from vlmzoo.sweeps.charts import Curve
from vlmzoo.sweeps.metrics import read_metrics
from vlmzoo.sweeps.plan import Trial

NUM_SPANS = 60  # finer than that, a curve shows the noise of single batches


def curves(trials: Sequence[Trial], stage: str, colours: Mapping[str, int]) -> list[Curve]:
    """One curve a connector: the mean of its seeds in a band from the lowest to the highest.

    Spans that not every seed has reached are left out.
    """
    found = []
    for connector, colour in colours.items():
        seeds = [losses(trial, stage) for trial in trials if trial.connector == connector]
        seeds = [steps for steps in seeds if steps]
        if not seeds:
            continue
        last = min(max(steps) for steps in seeds)
        edges = np.unique(np.linspace(0, last, min(NUM_SPANS, last) + 1).round().astype(int))
        means = np.array([[_mean(steps, a, b) for a, b in pairwise(edges)] for steps in seeds])
        whole = np.isfinite(means).all(axis=0)
        if whole.any():
            middle = ((edges[:-1] + edges[1:] + 1) / 2)[whole]
            means = means[:, whole]
            band = means.mean(0).tolist(), means.min(0).tolist(), means.max(0).tolist()
            found.append(Curve(connector, middle.tolist(), *band, colour))
    return found


def losses(trial: Trial, stage: str) -> dict[int, float]:
    """Number of steps done -> loss of the last of them."""
    rows = [row for row in read_metrics(trial.folder / "metrics.jsonl") if row.get("stage") == stage]
    return {row["step"] + 1: row["loss"] for row in rows if row["loss"] > 0}  # the axis is logarithmic


def _mean(steps: Mapping[int, float], after: int, until: int) -> float:
    values = [steps[step] for step in range(after + 1, until + 1) if step in steps]
    return float(np.mean(values)) if values else float("nan")
