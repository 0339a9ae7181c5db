from itertools import islice

import pytest

from vlmzoo.data.order import batches, epoch_order


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
