"""The order of samples, keyed by (seed, epoch) and cut by rank; a step has the same samples on any number of ranks."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def stream_key(purpose: str, *numbers: int) -> int:
    """Return 128 bits that key one random stream.

    They are a hash. With seed + epoch, seeds s and s + 1 would have the same epochs, shifted by one.
    """
    # Not `sparse.select.key_of`, on purpose. An order needs a permutation, which numpy's Philox draws
    # from a key of 128 bits; one whose purpose is hashed in cannot meet another purpose's stream.
    # Masks need a number at every position, the same on CPU and GPU: a hash under 64 bits.
    text = " ".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _permutation(key: int, num_samples: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Return all sample ids in the order of one epoch, [num_samples]: a function of (seed, epoch) only."""
    return _permutation(stream_key("order", seed, epoch), num_samples)


def block_order(seed: int, epoch: int, blocks: NDArray[np.int64], *, window: int) -> NDArray[np.int64]:
    """Return all sample ids in an order that needs only about ``window`` blocks of the file at a time.

    Blocks are laid around a circle in random order, and each sample comes up to ``window`` places
    after its block, uniformly. At any time, also at the ends of an epoch, the samples of ``window``
    blocks are mixed. A window of all blocks gives a full shuffle. Like ``epoch_order``, the order is
    a function of (seed, epoch).

    Args:
        seed: of the run.
        epoch: from 0.
        blocks: block (page of the file) of every sample, [num_samples].
        window: number of blocks.

    Returns:
        Sample ids, [num_samples].
    """
    generator = np.random.Generator(np.random.Philox(key=stream_key("blocks", seed, epoch)))
    _, block = np.unique(blocks, return_inverse=True)
    num_blocks = int(block.max()) + 1
    places = generator.permutation(num_blocks)[block] + min(window, num_blocks) * generator.random(len(block))
    return np.argsort(places % num_blocks, kind="stable").astype(np.int64)


def mixing_shares(seed: int, step: int, global_batch: int, *, alpha: float) -> NDArray[np.float64]:
    """Return the share of itself that each sample keeps when neighbours (2i, 2i + 1) are mixed (mixup), [global_batch].

    Shares follow Beta(alpha, alpha). Both samples of a pair keep the same share, so that both
    mixtures are equally strong.
    """
    generator = np.random.Generator(np.random.Philox(key=stream_key("mixup", seed, step)))
    return np.repeat(generator.beta(alpha, alpha, global_batch // 2), 2)


def arrivals(blocks: NDArray[np.int64], *, batch: int) -> list[tuple[int, int]]:
    """Return a pair (batch, block) for the first use of each block, in order; ``blocks`` is [samples of the order]."""
    found, first = np.unique(blocks, return_index=True)
    return [(int(first[i]) // batch, int(found[i])) for i in np.argsort(first)]


def train_share(order: NDArray[np.int64], *, global_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return one rank's part of an epoch, [steps, global_batch / world_size].

    Step s is ``order[s * global_batch : (s + 1) * global_batch]``, of which each rank takes a
    contiguous part. The last, incomplete global batch is dropped.
    """
    num_steps = len(order) // global_batch
    return order[: num_steps * global_batch].reshape(num_steps, world_size, global_batch // world_size)[:, rank]


def recalibration_share(
    seed: int, num_samples: int, *, batch: int, num_batches: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Return this rank's micro-batches for BatchNorm recalibration, [micro-batches, batch].

    They are cut from one keyed order; micro-batch i goes to rank i mod world_size.
    """
    order = _permutation(stream_key("recalibration", seed), num_samples)
    num_batches = min(num_batches, num_samples // batch)
    return order[: num_batches * batch].reshape(num_batches, batch)[rank::world_size]


def evenly_spread(num_samples: int, num: int | None) -> NDArray[np.int64]:
    """Return ``num`` evenly spaced sample ids, ascending; all if ``num`` is None or there are fewer.

    If the file is sorted by class, each class gets its share.
    """
    num = num_samples if num is None else min(num, num_samples)
    return np.arange(num, dtype=np.int64) * num_samples // num


def eval_share(num_samples: int, *, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return this rank's contiguous part of 0 … num_samples - 1.

    The parts are disjoint, cover all samples and differ in length by at most one.
    """
    return np.arange(rank * num_samples // world_size, (rank + 1) * num_samples // world_size, dtype=np.int64)
