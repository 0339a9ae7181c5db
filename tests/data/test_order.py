from itertools import islice

import numpy as np
import pytest

from vlmzoo.data.order import batches, epoch_order
from vlmzoo.training.processes import Processes


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(50, 0, 0)


@pytest.mark.parametrize(("num_records", "batch_size"), [(10, 5), (10, 4), (10, 3), (3, 7), (1, 1), (1, 4)])
def test_batches_are_the_epochs_in_a_row(num_records: int, batch_size: int) -> None:
    found = list(islice(batches(num_records, batch_size, seed=3), 20))
    assert all(len(batch) == batch_size for batch in found)
    stream = [index for epoch in range(160) for index in epoch_order(num_records, 3, epoch)]
    assert [index for batch in found for index in batch] == stream[: 20 * batch_size]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 11])
@pytest.mark.parametrize(("num_records", "batch_size"), [(10, 5), (10, 3), (3, 7)])
def test_any_step_can_be_continued_from(start: int, num_records: int, batch_size: int) -> None:
    whole = list(islice(batches(num_records, batch_size, seed=0), 20))
    assert list(islice(batches(num_records, batch_size, seed=0, start_step=start), 20 - start)) == whole[start:]


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ValueError, match=r"0 records in batches of 4: expected at least 1"):
        next(batches(0, 4, seed=0))


TEXT_ONLY = [index % 5 == 0 for index in range(53)]


@pytest.mark.parametrize("batch_size", [4, 6])
def test_batches_by_modality_hold_one_kind(batch_size: int) -> None:
    """LLaVA's `group_by_modality_length`: all but what is left over, which every epoch still sees once."""
    found = list(islice(batches(53, batch_size, 0, 0, TEXT_ONLY), 53))
    kinds = [{TEXT_ONLY[index] for index in batch} for batch in found]
    assert sum(len(kind) == 1 for kind in kinds) > 0.7 * len(kinds)
    assert {True} in kinds
    stream = [index for batch in found for index in batch]
    for epoch in range(batch_size):
        assert sorted(stream[epoch * 53 : (epoch + 1) * 53]) == list(range(53))
    assert found != list(islice(batches(53, batch_size, 1, 0, TEXT_ONLY), 53))


@pytest.mark.parametrize("start", [1, 7, 13, 14, 30])
def test_batches_by_modality_can_be_continued_from(start: int) -> None:
    whole = list(islice(batches(53, 4, 0, 0, TEXT_ONLY), 40))
    assert list(islice(batches(53, 4, 0, start, TEXT_ONLY), 40 - start)) == whole[start:]


def test_ranks_share_the_steps_of_one_process() -> None:
    """Every rank is given the whole step and takes its part: the same records for one, two and three of them."""
    blocks = np.arange(10, 6001, 10)
    for kind in (None, blocks):
        steps = list(islice(batches(6000, 12, 0, blocks=kind), 40))
        for world in (1, 2, 3):
            ranks = [Processes(rank=rank, world=world) for rank in range(world)]
            for micro in (None, 2):
                shares = [[rank.micro_batches(step, micro) for rank in ranks] for step in steps]
                found = [sorted(i for share in step for part in share for i in part) for step in shares]
                assert found == [sorted(step) for step in steps]


def test_blocks_change_nothing_where_one_window_holds_all() -> None:
    assert epoch_order(2000, 0, 1, blocks=np.arange(10, 2001, 10)) == epoch_order(2000, 0, 1)
    assert epoch_order(3000, 0, 1, blocks=np.arange(10, 3001, 10)) != epoch_order(3000, 0, 1)


def test_the_order_of_published_runs_stands() -> None:
    assert epoch_order(10, 0, 0) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
