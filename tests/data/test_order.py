"""Orders and shares: exact sets on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.order import (
    arrivals,
    block_order,
    epoch_order,
    eval_share,
    evenly_spread,
    mixing_shares,
    recalibration_share,
    stream_key,
    train_share,
)


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
    assert [share.shape for share in shares] == [
        (3, 6 // world_size)
    ] * world_size  # 20 samples: three batches of 6, two samples dropped
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


def test_block_orders_are_permutations_that_use_a_window_of_blocks_at_a_time() -> None:
    blocks = np.arange(5000) // 10  # 500 blocks of 10
    order = block_order(3, 1, blocks, window=20)
    assert sorted(order) == list(range(5000))
    # a resumed run needs the order it started with
    assert block_order(0, 0, np.arange(12) // 2, window=2).tolist() == [11, 10, 1, 0, 8, 3, 9, 2, 4, 6, 7, 5]
    rows = blocks[order].reshape(-1, 100)  # batches: each is ten blocks' worth
    assert (
        max(len(set(row)) for row in rows) <= 20 + 10 + 1
    )  # the blocks of the window as the batch begins, and those that enter
    assert min(len(set(row)) for row in rows) > 20
    assert not np.array_equal(order, block_order(3, 2, blocks, window=20))


def test_a_window_of_all_blocks_is_a_full_shuffle() -> None:
    order = block_order(0, 0, np.arange(20_000) // 10, window=10**6)
    place = np.empty(20_000)
    place[order] = np.arange(20_000)
    neighbours = np.abs(place[1::10] - place[0::10])  # of one block
    assert abs((neighbours / 20_000).mean() - 1 / 3) < 0.03  # as any two places


def test_blocks_are_asked_for_when_they_first_come_up() -> None:
    assert arrivals(np.array([5, 5, 2, 5, 2, 9]), batch=2) == [(0, 5), (1, 2), (2, 9)]


def test_shares_of_mixup_are_equal_in_a_pair_and_beta_distributed() -> None:
    shares = mixing_shares(0, 7, 4000, alpha=0.2)
    assert np.array_equal(shares[0::2], shares[1::2])
    assert not np.array_equal(shares, mixing_shares(0, 8, 4000, alpha=0.2))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(shares.mean() - 0.5) < 0.04
    assert shares.var() == pytest.approx(1 / (4 * 1.4), rel=0.05)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("is_blockwise", [False, True])
def test_ten_epochs_give_each_sample_once_but_for_the_incomplete_batch(world_size: int, is_blockwise: bool) -> None:
    blocks = np.arange(1003) // 7
    for epoch in range(10):
        order = block_order(5, epoch, blocks, window=9) if is_blockwise else epoch_order(5, epoch, 1003)
        shares = [train_share(order, global_batch=16, rank=rank, world_size=world_size) for rank in range(world_size)]
        seen = np.concatenate([share.reshape(-1) for share in shares])
        assert len(seen) == len(set(seen)) == 1003 // 16 * 16 == 992
        assert set(range(1003)) - set(seen) == set(order[992:])
        assert np.array_equal(
            np.concatenate(shares, axis=1), order[:992].reshape(62, 16)
        )  # a step is the same set on any number of ranks
