"""The order in which records are seen: a pure function of the seed, continued from any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

WINDOW = 2048  # records that are shuffled together where reading follows blocks


def epoch_order(
    num_records: int,
    seed: int,
    epoch: int,
    batch_size: int = 1,
    text_only: Sequence[bool] | np.ndarray | None = None,
    blocks: np.ndarray | None = None,
) -> list[int]:
    """A permutation of the records, of its own for each epoch.

    Args:
        text_only: of each record; batches then hold records of one kind, but for the one in which an epoch ends and
            the next one begins. Source: LLaVA's `group_by_modality_length`.
        blocks: where runs of records end that are read together. Blocks are permuted then, and records only within
            windows of whole blocks that hold at least `WINDOW` of them; where one window holds them all, blocks
            change nothing.
    """
    blocks = None if num_records <= WINDOW else blocks
    random = np.random.default_rng([seed, epoch])
    order = (random.permutation(num_records) if blocks is None else _by_blocks(blocks, random)).tolist()
    if text_only is None:
        return order
    head = -epoch * num_records % batch_size  # they fill the batch that the epoch before began
    first, rest = order[:head], order[head:]
    whole, left = [], []
    for kind in (False, True):
        of_kind = [index for index in rest if text_only[index] == kind]
        end = len(of_kind) // batch_size * batch_size
        whole += [of_kind[start : start + batch_size] for start in range(0, end, batch_size)]
        left += of_kind[end:]
    # What is left of both kinds makes batches of its own, the last one maybe not a whole one.
    mixed = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    last = mixed.pop() if mixed and len(mixed[-1]) < batch_size else []
    whole += mixed
    if blocks is None:
        batches = [whole[place] for place in random.permutation(len(whole))]
    else:  # as their first records come, so that reading still follows the blocks
        place = {index: place for place, index in enumerate(order)}
        batches = sorted(whole, key=lambda batch: place[batch[0]])
    return first + [index for batch in batches for index in batch] + last


def _by_blocks(blocks: np.ndarray, random: np.random.Generator) -> np.ndarray:
    ends, permuted = [0, *blocks.tolist()], random.permutation(len(blocks))
    order, window, held = [], [], 0
    for block in permuted.tolist():
        window.append(np.arange(ends[block], ends[block + 1]))
        held += len(window[-1])
        if held >= WINDOW:
            order.append(random.permutation(np.concatenate(window)))
            window, held = [], 0
    if window:
        order.append(random.permutation(np.concatenate(window)))
    return np.concatenate(order)


def batches(
    num_records: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    text_only: Sequence[bool] | np.ndarray | None = None,
    blocks: np.ndarray | None = None,
) -> Iterator[list[int]]:
    """Endless batches of record indices, from the given step on.

    Epochs follow one another without a gap: where an epoch ends within a batch, the next one fills it. Every batch
    has exactly `batch_size` records, and step n is the same wherever the iteration began.
    """
    if num_records < 1 or batch_size < 1:
        raise ValueError(f"{num_records} records in batches of {batch_size}: expected at least 1 of each")
    epoch, place = divmod(start_step * batch_size, num_records)
    order = epoch_order(num_records, seed, epoch, batch_size, text_only, blocks)
    while True:
        batch = []
        while len(batch) < batch_size:
            if place == num_records:
                epoch, place = epoch + 1, 0
                order = epoch_order(num_records, seed, epoch, batch_size, text_only, blocks)
            taken = order[place : place + batch_size - len(batch)]
            batch += taken
            place += len(taken)
        yield batch
