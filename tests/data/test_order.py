"""Orders and shares: exact sets, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.order import epoch_order, eval_share, evenly_spread, recalibration_share, stream_key, train_share


def test_an_order_is_a_permutation_and_never_changes() -> None:
    # resuming a run needs the order it started with: a change of these numbers changes every run
    assert epoch_order(0, 0, 8).tolist() == [7, 0, 5, 4, 6, 3, 1, 2]
    assert sorted(epoch_order(3, 7, 1000)) == list(range(1000))


def test_neighbouring_seeds_share_no_epoch() -> None:
    assert not np.array_equal(epoch_order(0, 1, 100), epoch_order(1, 0, 100))
    assert stream_key("order", 1, 12) != stream_key("order", 11, 2)
    assert stream_key("order", 0, 0) != stream_key("augmentation", 0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(world_size: int) -> None:
    order = epoch_order(1, 0, 20)
    shares = [train_share(order, global_batch=6, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [share.shape for share in shares] == [(3, 6 // world_size)] * world_size  # 20 samples: three batches of 6, two samples dropped
    assert np.array_equal(np.concatenate(shares, axis=1), order[:18].reshape(3, 6))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_recalibration_is_the_same_set_of_micro_batches_on_any_number_of_ranks(world_size: int) -> None:
    whole = recalibration_share(4, 23, batch=5, num_batches=100, rank=0, world_size=1)
    assert whole.shape == (4, 5)  # capped: 23 // 5 micro-batches
    for rank in range(world_size):
        share = recalibration_share(4, 23, batch=5, num_batches=100, rank=rank, world_size=world_size)
        assert np.array_equal(share, whole[rank::world_size])
    assert recalibration_share(4, 23, batch=5, num_batches=2, rank=0, world_size=1).tolist() == whole[:2].tolist()


def test_evaluation_shares_cover_every_sample_once() -> None:
    assert [eval_share(7, rank=rank, world_size=3).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [eval_share(2, rank=rank, world_size=3).tolist() for rank in range(3)] == [[], [0], [1]]


def test_some_samples_are_spread_over_all() -> None:
    assert evenly_spread(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spread(5, 9).tolist() == evenly_spread(5, None).tolist() == [0, 1, 2, 3, 4]
