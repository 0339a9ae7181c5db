"""The order in which records are seen: a pure function of the seed, continued from any step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(num_records: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the records, of its own for each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_records).tolist()


def batches(num_records: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[list[int]]:
    """Endless batches of record indices, from the given step on.

    Epochs follow one another without a gap: where an epoch ends within a batch, the next one fills it. Every batch
    has exactly `batch_size` records, and step n is the same wherever the iteration began.
    """
    if num_records < 1 or batch_size < 1:
        raise ValueError(f"{num_records} records in batches of {batch_size}: expected at least 1 of each")
    epoch, place = divmod(start_step * batch_size, num_records)
    order = epoch_order(num_records, seed, epoch)
    while True:
        batch = []
        while len(batch) < batch_size:
            if place == num_records:
                epoch, place = epoch + 1, 0
                order = epoch_order(num_records, seed, epoch)
            taken = order[place : place + batch_size - len(batch)]
            batch += taken
            place += len(taken)
        yield batch
