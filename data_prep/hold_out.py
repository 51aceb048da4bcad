"""Choose images of a training set that are held out: kept out of training, to choose a state or a coefficient with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError

HELD_OUT = "held_out"  # name of the split


def choose_held_out(labels: np.ndarray, number: int, *, seed: int) -> np.ndarray:
    """Choose ``number`` images of a training set at random, as many of each class as of any other.

    The classes give one image in turn. One that has given half of its images waits until all others
    have done so too, and each keeps at least one image for training.

    Args:
        labels: [n], the label of every image.
        number: how many images to choose.
        seed: of the choice, which is the same for equal labels and an equal seed.

    Returns:
        bool [n], True = held out.

    Raises:
        ConfigError: a class would keep no image for training.
    """
    shuffled = np.random.default_rng([seed, 1]).permutation(len(labels))  # a stream apart from that of --subset
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    size = np.repeat(counts, counts)  # of the class of each image
    turn = np.arange(len(labels)) - np.repeat(starts, counts)  # 0 for the first of each class, 1 for the second …
    waits = np.where(turn < size // 2, 0, np.where(turn < size - 1, 1, 2))  # 2: the last image of a class
    most = int(np.count_nonzero(waits < 2))
    if number > most:
        raise ConfigError(
            f"--hold-out: expected at most {most} of the {len(labels)} training images, so that each class keeps one "
            f"for training, got {number}",
            do="hold out fewer images",
        )
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[by_class[np.lexsort((turn, waits))[:number]]] = True
    return is_held_out


def refuse_stale(output: Path, number: int | None) -> None:
    """Refuse to write ``train.beton`` beside a held-out set whose images it would contain.

    Raises:
        ConfigError: ``output`` has a held-out set, which this command does not write again.
    """
    path = output / f"{HELD_OUT}.beton"
    if number is None and os.path.lexists(path):
        raise ConfigError(
            f"{path}: contains images held out of the train.beton that this command would replace; the new train.beton "
            "could contain the same images",
            do=f"pass --hold-out N to write {path.name} again, or remove {path.name}, or choose another --output",
        )
