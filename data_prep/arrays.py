"""Write data sets that fit in memory as arrays: ``train.beton`` and ``val.beton`` with raw pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.hold_out import HELD_OUT, choose_held_out, refuse_stale
from data_prep.images import ImageOptions
from pipeline.datasets.sidecar import BetonInfo


@dataclass(frozen=True)
class ArrayImages:
    """Images and their labels; an item is an RGB image uint8 [height, width, 3] with its label."""

    images: np.ndarray  # uint8 [n, height, width, 3], or grey [n, height, width]
    labels: np.ndarray  # [n]
    sha256: str = ""  # of the files they come from

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = self.images[index]
        rgb = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)
        return rgb, int(self.labels[index])

    def choose(self, subset: int | None, *, seed: int) -> ArrayImages:
        """Choose ``subset`` images, spread over the classes and random within each, in their original order.

        None chooses all.
        """
        if subset is None or subset >= len(self):
            return self
        shuffled = np.random.default_rng(seed).permutation(len(self))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        _, starts, counts = np.unique(self.labels[by_class], return_index=True, return_counts=True)
        turn = np.arange(len(self)) - np.repeat(starts, counts)  # 0 for the first of each class, 1 for the second …
        chosen = np.sort(by_class[np.argsort(turn, kind="stable")[:subset]])
        return self.only(chosen)

    def only(self, chosen: np.ndarray) -> ArrayImages:
        """Take the images of an index or a boolean array, in their order."""
        return ArrayImages(self.images[chosen], self.labels[chosen], self.sha256)


@dataclass(frozen=True)
class ArrayOptions:
    """Options of every command that writes arrays."""

    num_workers: int
    chunk_size: int = 100
    subset: int | None = None  # images per split
    seed: int = 0
    hold_out: int | None = None  # images of the training set that are kept out of it


def write_arrays(
    output: Path, datasets: Mapping[str, ArrayImages], *, classes: Sequence[str], kind: str, options: ArrayOptions
) -> list[BetonInfo]:
    """Write every split into ``output``, and ``held_out.beton`` if ``options.hold_out`` is set.

    Raises:
        ConfigError: more images are to be held out than ``choose_held_out`` allows.
        WriteError: a file cannot be written.
        PermissionDenied: ``output`` may not be written.
        PeerError: a worker process died.
    """
    from data_prep.writer import Split, write_splits  # imports ffcv, so only after the sources have been checked

    refuse_stale(output, options.hold_out)
    parts = {name: whole.choose(options.subset, seed=options.seed) for name, whole in datasets.items()}
    if options.hold_out is not None:
        is_held_out = choose_held_out(parts["train"].labels, options.hold_out, seed=options.seed)
        parts |= {"train": parts["train"].only(~is_held_out), HELD_OUT: parts["train"].only(is_held_out)}
    splits = []
    for name, chosen in parts.items():
        origin = {"kind": kind, "num_images": len(chosen), "manifest_sha256": chosen.sha256}
        num_bytes = len(chosen) * chosen[0][0].nbytes
        splits.append(Split(output / f"{name}.beton", chosen, lambda _, origin=origin: origin, num_bytes))  # type: ignore[misc]
    return write_splits(
        splits,
        classes=classes,
        options=ImageOptions(write_mode="raw"),
        seed=options.seed,
        num_workers=options.num_workers,
        chunk_size=options.chunk_size,
    )
