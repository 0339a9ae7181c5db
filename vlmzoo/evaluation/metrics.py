"""From answers to figures: normalised exact match, by capability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

OUTER = " .,;:!?\"'`()[]"
"""What an answer may stand in; not the signs that belong to a value, as in -5, 50% or #3."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One item of a task, as a line of predictions/<task>.jsonl."""

    id: str
    prompt: str
    answer: str
    expected: str
    score: float  # 0 to 1
    capability: str


def normalise(text: str) -> str:
    """The text in lower case, without outer punctuation, its words one space apart."""
    return " ".join(text.split()).strip(OUTER).casefold()


def exact_match(answer: str, expected: str) -> float:
    """1 where both texts normalise to the same one, else 0."""
    return float(normalise(answer) == normalise(expected))


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`accuracy` (the mean over capabilities, each weighing the same), `capabilities` by name, and `num_items`.

    Raises:
        ValueError: there is no prediction.
    """
    if not predictions:
        raise ValueError("there are no predictions to score; expected at least one")
    found: dict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        found[prediction.capability].append(prediction.score)
    capabilities = {name: fmean(found[name]) for name in sorted(found)}
    return {"accuracy": fmean(capabilities.values()), "capabilities": capabilities, "num_items": len(predictions)}
