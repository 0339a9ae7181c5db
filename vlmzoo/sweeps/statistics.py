"""Intervals for the accuracy of an arm, over its seeds and over the questions it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Scores = Mapping[str, NDArray[np.float64]]
"""One arm: capability -> (seeds, items), the items in the same order for every arm."""


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float | None  # None: one seed an arm says nothing about the spread between seeds
    high: float | None
    dof: float


def accuracies(scores: Scores) -> NDArray[np.float64]:
    """The accuracy of every seed: the unweighted mean over capabilities. Shape (seeds,)."""
    return np.mean([items.mean(axis=1) for items in scores.values()], axis=0)


def intervals(arms: Sequence[Scores]) -> list[Interval]:
    """For each arm mean ± t(ν)·s, which covers the mean over all seeds and all questions in 95 % of experiments.

    s² = between-seed variance / seeds + item term. The between-seed variance is pooled over the arms, for two seeds
    alone say next to nothing (ν = 1). Only this part of s² is uncertain, so ν is its degrees of freedom times
    (s² / seed part)² (Welch-Satterthwaite), at most those of the items.
    """
    seeds = [accuracies(scores) for scores in arms]
    seed_dof = sum(len(values) - 1 for values in seeds)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in seeds)
    result = []
    for scores, values in zip(arms, seeds, strict=True):
        mean = float(values.mean())
        if seed_dof == 0:
            result.append(Interval(mean, None, None, 0.0))
            continue
        seed_part = squares / seed_dof / len(values)
        variance = seed_part + item_variance(scores)
        item_dof = float(sum(items.shape[1] - 1 for items in scores.values()))
        dof = item_dof
        if seed_part > 0:
            dof = min(item_dof, seed_dof * (variance / seed_part) ** 2)
        half = float(stdtrit(max(dof, 1.0), 0.975)) * variance**0.5
        result.append(Interval(mean, max(0.0, mean - half), min(1.0, mean + half), dof))
    return result


def item_variance(scores: Scores) -> float:
    """The variance of an arm's accuracy that comes from the choice of questions.

    Where there are several seeds, how a seed's luck varies from question to question is taken out (two-way analysis
    of variance): the spread between seeds holds it already.
    """
    total = 0.0
    for items in scores.values():
        num_seeds, num_items = items.shape
        if num_items < 2:
            continue
        of_item = items.mean(axis=0)
        variance = float(of_item.var(ddof=1))
        if num_seeds > 1:
            residual = items - of_item - items.mean(axis=1, keepdims=True) + items.mean()
            interaction = float((residual**2).sum()) / ((num_seeds - 1) * (num_items - 1))
            variance = max(0.0, variance - interaction / num_seeds)
        total += variance / num_items
    return total / len(scores) ** 2
