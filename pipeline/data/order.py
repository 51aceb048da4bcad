"""Which sample comes when: orders keyed by (seed, epoch) and cut by rank, the same set of samples per step on any number of ranks."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def stream_key(purpose: str, *numbers: int) -> int:
    """128 bits that key one random stream.

    Hashed: with seed + epoch, seeds s and s + 1 would share their epochs, shifted by one.
    """
    text = " ".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _permutation(key: int, num_samples: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """All sample ids in the order of one epoch: [num_samples], a function of (seed, epoch) only."""
    return _permutation(stream_key("order", seed, epoch), num_samples)


def block_order(seed: int, epoch: int, blocks: NDArray[np.int64], *, window: int) -> NDArray[np.int64]:
    """All sample ids in an order that needs only about ``window`` blocks of the file at a time: [num_samples], a function of (seed, epoch).

    ``blocks``: the block (a page of the file) of every sample, [num_samples]. Blocks are laid
    around a circle in random order and each sample comes up to ``window`` places after its block,
    uniformly: at any time the samples of ``window`` blocks are mixed, the ends of an epoch
    included. With as many blocks in the window as there are, it is a full shuffle.
    """
    generator = np.random.Generator(np.random.Philox(key=stream_key("blocks", seed, epoch)))
    _, block = np.unique(blocks, return_inverse=True)
    num_blocks = int(block.max()) + 1
    places = generator.permutation(num_blocks)[block] + min(window, num_blocks) * generator.random(len(block))
    return np.argsort(places % num_blocks, kind="stable").astype(np.int64)


def mixing_shares(seed: int, step: int, global_batch: int, *, alpha: float) -> NDArray[np.float64]:
    """Share of itself that each sample of a step keeps when neighbours (2i, 2i + 1) are mixed: [global_batch], Beta(alpha, alpha).

    The two of a pair keep the same share, so that both mixtures are of the same strength.
    """
    generator = np.random.Generator(np.random.Philox(key=stream_key("mixup", seed, step)))
    return np.repeat(generator.beta(alpha, alpha, global_batch // 2), 2)


def arrivals(blocks: NDArray[np.int64], *, batch: int) -> list[tuple[int, int]]:
    """(batch, block) where each block of an order first comes up, in that order. ``blocks``: [samples of the order]."""
    found, first = np.unique(blocks, return_index=True)
    return [(int(first[i]) // batch, int(found[i])) for i in np.argsort(first)]


def train_share(order: NDArray[np.int64], *, global_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """One rank's part of an epoch: [steps, global_batch / world_size].

    Step s is ``order[s * global_batch : (s + 1) * global_batch]``, of which each rank takes a
    contiguous part; the last, incomplete global batch is dropped.
    """
    num_steps = len(order) // global_batch
    return order[: num_steps * global_batch].reshape(num_steps, world_size, global_batch // world_size)[:, rank]


def recalibration_share(
    seed: int, num_samples: int, *, batch: int, num_batches: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """This rank's micro-batches of one keyed order: [micro-batches, batch]. Micro-batch i goes to rank i mod world_size."""
    order = _permutation(stream_key("recalibration", seed), num_samples)
    num_batches = min(num_batches, num_samples // batch)
    return order[: num_batches * batch].reshape(num_batches, batch)[rank::world_size]


def evenly_spread(num_samples: int, num: int | None) -> NDArray[np.int64]:
    """``num`` of the sample ids (all, when it is None or there are fewer), ascending: so many of every class where a file is sorted."""
    num = num_samples if num is None else min(num, num_samples)
    return np.arange(num, dtype=np.int64) * num_samples // num


def eval_share(num_samples: int, *, rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's contiguous part of 0 … num_samples - 1: the parts are disjoint, cover all samples and differ by at most one in length."""
    return np.arange(rank * num_samples // world_size, (rank + 1) * num_samples // world_size, dtype=np.int64)
