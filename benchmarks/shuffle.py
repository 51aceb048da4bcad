"""Measure how random the order of a set larger than memory is: ``python -m benchmarks.shuffle``.

``data.order: quasi_random`` mixes a window of blocks that moves through the file. It is compared
with the full shuffle, for a file in the order of its classes and for one that was shuffled when it
was written:

displacement  mean distance between a sample's places in two epochs / number of samples (a full
              shuffle has 1/3)
same class    pairs of one class in a batch / the same in a full shuffle
met again     pairs that share a batch in two epochs in a row / the same in a full shuffle
read          how often an epoch reads the file, with a least-recently-used cache of 1.25 windows
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import block_order, epoch_order

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    displacement: float
    same_class: float
    met_again: float
    read: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1_281_167,
        metavar="N",
        help="number of samples of the data set (default: 1281167, as in ImageNet)",
    )
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="number of classes (default: 1000)")
    parser.add_argument(
        "--block",
        type=int,
        default=28,
        metavar="N",
        help="samples per block (default: 28, which are 8 MiB at 500 pixels, half of them as JPEG)",
    )
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="samples per batch (default: 1024)")
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[64, 512, 4096],
        metavar="N",
        help="blocks in the shuffle window (default: 64 512 4096, which are 0.5, 4 and 32 GiB)",
    )
    given = parser.parse_args()
    blocks = np.arange(given.samples) // given.block
    for written in ("by class", "shuffled"):
        labels = np.arange(given.samples) * given.classes // given.samples
        if written == "shuffled":
            labels = np.random.default_rng(0).permutation(labels)
        print(f"file written {written}: {given.samples:,} samples, {blocks[-1] + 1:,} blocks, batches of {given.batch}")
        full = [epoch_order(0, epoch, given.samples) for epoch in (0, 1)]
        print_line(
            "full shuffle", measure(full, labels, blocks, batch=given.batch, cache=int(1.25 * given.windows[-1]))
        )
        for window in given.windows:
            orders = [block_order(0, epoch, blocks, window=window) for epoch in (0, 1)]
            print_line(
                f"window of {window}", measure(orders, labels, blocks, batch=given.batch, cache=int(1.25 * window))
            )


def print_line(name: str, found: Measured) -> None:
    numbers = (
        f"displacement {found.displacement:.3f}  same class {found.same_class:.2f}  met again {found.met_again:.2f}"
    )
    print(f"  {name:16} {numbers}  read {found.read:.2f}", flush=True)


def measure(orders: list[Order], labels: Order, blocks: Order, *, batch: int, cache: int) -> Measured:
    """Measure the orders of two epochs. ``labels`` and ``blocks``: [samples]."""
    first, second = orders
    num_samples = len(first)
    place, next_place = np.empty_like(first), np.empty_like(first)
    place[first], next_place[second] = np.arange(num_samples), np.arange(num_samples)
    num_whole = num_samples // batch * batch
    same_class = _pairs(labels[first[:num_whole]].reshape(-1, batch))
    met_again = _pairs((next_place // batch)[first[:num_whole]].reshape(-1, batch))
    pairs = num_whole * (batch - 1) / 2
    counts = np.bincount(labels).astype(float)
    share_same = float((counts * (counts - 1)).sum() / (num_samples * (num_samples - 1)))
    share_met = (batch - 1) / (num_samples - 1)
    displacement = float(np.abs(place - next_place).mean()) / num_samples
    return Measured(
        displacement, same_class / pairs / share_same, met_again / pairs / share_met, _times_read(blocks[first], cache)
    )


def _pairs(rows: Order) -> float:
    """Count the pairs of equal numbers within a row, over all rows."""
    rows = np.sort(rows, axis=1)
    ends = np.flatnonzero(np.diff(rows.reshape(-1), append=-1) != 0) + 1
    edges = np.union1d(ends, np.arange(1, len(rows) + 1) * rows.shape[1])
    lengths = np.diff(edges, prepend=0).astype(float)
    return float((lengths * (lengths - 1) / 2).sum())


def _times_read(wanted: Order, cache: int) -> float:
    """Return blocks read / blocks in the file, with a least-recently-used cache of ``cache`` blocks."""
    held: OrderedDict[int, None] = OrderedDict()
    num_read = 0
    for block in wanted.tolist():
        if block in held:
            held.move_to_end(block)
            continue
        num_read += 1
        held[block] = None
        if len(held) > cache:
            held.popitem(last=False)
    return num_read / len(np.unique(wanted))


if __name__ == "__main__":
    main()
