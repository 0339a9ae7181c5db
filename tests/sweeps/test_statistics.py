"""The interval covers what it claims to; simulated, since nothing else can tell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlmzoo.sweeps.statistics import Scores, accuracies, intervals, item_variance

TRUTH = 0.6


def experiment(generator: np.random.Generator, *, num_arms: int, num_seeds: int, seed_sd: float) -> list[Scores]:
    """Right or wrong answers of arms whose true accuracy is TRUTH: seeds differ by luck, questions in difficulty."""
    arms = []
    difficulty = {name: generator.uniform(-0.3, 0.3, num) for name, num in (("count", 150), ("read", 90), ("rare", 60))}
    for _ in range(num_arms):
        luck = generator.normal(0, seed_sd, (num_seeds, 1))
        arms.append(
            {
                name: (generator.random((num_seeds, len(items))) < TRUTH + luck + items).astype(float)
                for name, items in difficulty.items()
            }
        )
    return arms


def coverage(num_seeds: int, seed_sd: float, repeats: int = 800) -> float:
    generator = np.random.default_rng(num_seeds)
    hits = [
        interval.low is not None and interval.high is not None and interval.low <= TRUTH <= interval.high
        for _ in range(repeats)
        for interval in intervals(experiment(generator, num_arms=5, num_seeds=num_seeds, seed_sd=seed_sd))
    ]
    return float(np.mean(hits))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.005, 0.02, 0.06])
def test_coverage(num_seeds: int, seed_sd: float) -> None:
    assert 0.93 <= coverage(num_seeds, seed_sd) <= 0.97


def test_one_arm_with_large_seed_spread_is_the_classical_interval() -> None:
    """With a negligible item term the interval is scipy's t interval of the seeds' accuracies."""
    accuracy = np.array([0.50, 0.62, 0.71])
    items = np.stack([np.tile((np.arange(100) < 100 * a).astype(float), 200) for a in accuracy])
    (interval,) = intervals([{"all": items}])
    low, high = stats.t.interval(0.95, 2, accuracy.mean(), stats.sem(accuracy))
    assert interval.low == pytest.approx(max(low, 0), abs=2e-3)
    assert interval.high == pytest.approx(high, abs=2e-3)
    assert interval.dof == pytest.approx(2, rel=0.05)


def test_accuracy_is_the_unweighted_mean_over_capabilities() -> None:
    scores = {"many": np.ones((2, 90)), "few": np.zeros((2, 10))}
    assert accuracies(scores).tolist() == [0.5, 0.5]


def test_one_seed_gives_no_interval() -> None:
    (interval,) = intervals([{"all": np.array([[0.0, 1.0, 1.0]])}])
    assert interval.low is None
    assert interval.high is None
    assert interval.dof == 0


def test_an_arm_with_one_seed_borrows_the_spread_of_the_others() -> None:
    generator = np.random.default_rng(0)
    many, few = experiment(generator, num_arms=2, num_seeds=4, seed_sd=0.05)
    wide, narrow = intervals([{name: items[:1] for name, items in few.items()}, many])
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.high - wide.low > narrow.high - narrow.low


def test_item_variance_of_one_seed_is_that_of_a_mean() -> None:
    items = np.random.default_rng(0).random((1, 50))
    assert item_variance({"all": items}) == pytest.approx(float(stats.sem(items[0])) ** 2)


def test_identical_seeds_leave_only_the_items() -> None:
    items = np.repeat((np.arange(200) % 4 > 0).astype(float)[None], 3, axis=0)
    (interval,) = intervals([{"all": items}])
    low, high = stats.t.interval(0.95, 199, 0.75, stats.sem(items[0]))
    assert interval.low == pytest.approx(low)
    assert interval.high == pytest.approx(high)
