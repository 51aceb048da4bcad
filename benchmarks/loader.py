"""Measure how fast images are loaded: ``python -m benchmarks.loader``.

1,500 photographs of about 440×420 pixels, random resized crop to 224, flip. Parts, for ``--only``:

bars      L1 L2 L3: our loader against ImageFolder with Pillow and against bare FFCV, on JPEGs of at
          most 500 pixels, on a mix of half JPEG, half raw, and on raw images of at most 256 pixels;
          also against ``decode_jpeg`` with transforms v2, and our folder loader
pixels    how much our pixels differ from torchvision's and OpenCV's, for the same boxes

With one and with two decoding workers (for torch: worker processes). Every loader delivers
normalised float32 batches in the process that trains; in a round they run one after another. Ends
with an error only if the decoded part of a JPEG differs from the same part of the whole image.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.support.bars import Bounds, Figure, Leg, Options, Results, Rounds, bar, milliseconds, options
from benchmarks.support.photographs import VERSION, photographs
from pipeline.config.schema import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from pipeline.data.loaders import TrainLoader, open_train_loader

PARTS = ("bars", "pixels")
NUM_IMAGES, BATCH, SIDE = 1500, 100, 224
BOUNDS = {
    "L1": Bounds("≥ 1.5", "2.0", "2.3 if JPEGs are decoded whole"),
    "L2": Bounds("≥ 2.0", "3.0", "3.4 if JPEGs are decoded whole"),
    "L3": Bounds("≤ 1.05", "1.00", "1.00 with FFCV's decoder"),
    "L3 raw 256": Bounds("≤ 0.80"),
}
STORED: dict[str, dict[str, Any]] = {
    "jpeg 500": {"write_mode": "jpg", "max_resolution": 500},
    "mix 500": {"write_mode": "proportion", "max_resolution": 500},
    "raw 256": {"write_mode": "raw", "max_resolution": 256},
}


def main() -> None:
    given = options(__doc__, PARTS, models=(), quick_model="")
    results = Results()
    num_images = 60 if given.is_quick else NUM_IMAGES
    folder = photographs(num_images)
    require_same_pixels(stored(folder, "jpeg 500"))
    if "bars" in given.only:
        files = {name: stored(folder, name) for name in STORED}
        for num_workers in (1,) if given.is_quick else (1, 2):
            measure(folder, files, num_workers, given, results)
    if "pixels" in given.only:
        from benchmarks.support.pixels import differences

        for figure in differences(folder, num_images=20 if given.is_quick else 200):
            results.add(figure)
    results.write(given.json)


def stored(folder: Path, name: str) -> dict[str, Path]:
    """Write the .beton files of ``folder``, stored as ``STORED[name]``, unless they exist.

    Returns:
        Their paths: ``ours`` as data_prep writes it, ``ffcv`` with JPEGs as FFCV writes them.
    """
    paths = {
        maker: folder.with_name(f"{folder.name}-{name.replace(' ', '-')}-{maker}.beton") for maker in ("ours", "ffcv")
    }
    if not all(path.exists() for path in paths.values()):
        from benchmarks.support.bare_ffcv import write_as_ffcv
        from data_prep.images import ImageOptions
        from data_prep.writer import write_beton
        from pipeline.datasets.folder_listing import list_images
        from pipeline.datasets.image_file import ImageFile, load_rgb

        classes, listed = list_images(folder)

        class Images:
            def __len__(self) -> int:
                return len(listed)

            def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
                return load_rgb(ImageFile(listed[index][0]))[0], listed[index][1]

        def write(path: Path) -> object:
            settings = ImageOptions(**STORED[name])
            return write_beton(
                path, Images(), classes=classes, options=settings, source={"version": VERSION}, num_workers=2
            )

        write(paths["ours"])
        write_as_ffcv(lambda: write(paths["ffcv"]))
    return paths


def measure(
    folder: Path, files: dict[str, dict[str, Path]], num_workers: int, given: Options, results: Results
) -> None:
    """Time one epoch of every loader in each round; report their ratios and images per second."""
    legs: dict[str, Leg] = {
        "torch PIL": torch_leg(folder, num_workers, is_v2=False),
        "torch v2": torch_leg(folder, num_workers, is_v2=True),
        "folder": our_leg(folder, num_workers),
    }
    for name, paths in files.items():
        legs[f"ours {name}"] = our_leg(paths["ours"], num_workers)
        legs[f"ffcv {name}"] = ffcv_leg(paths["ffcv"], num_workers)
    legs["ours jpeg 500, FFCV's file"] = our_leg(files["jpeg 500"]["ffcv"], num_workers)
    for leg in legs.values():
        leg()  # compiles, starts workers, reads the files once
    runs: dict[str, list[list[float]]] = {name: [] for name in legs}
    for _ in range(given.runs):
        for times in runs.values():
            times.append([])
        for index in range(given.rounds):
            for name in list(legs)[:: -1 if index % 2 else 1]:
                runs[name][-1].append(milliseconds(legs[name]))

    def ratio(title: str, numerator: str, denominator: str, bounds: Bounds | None = None) -> None:
        pairs: list[Rounds] = [
            list(zip(a, b, strict=True)) for a, b in zip(runs[numerator], runs[denominator], strict=True)
        ]
        results.add(bar(title if num_workers == 1 else f"{title} {num_workers} workers", pairs, bounds))

    ratio("L1", "torch PIL", "ours jpeg 500", BOUNDS["L1"])
    ratio("L1 transforms v2", "torch v2", "ours jpeg 500")
    ratio("L2", "torch PIL", "ours mix 500", BOUNDS["L2"])
    ratio("L2 transforms v2", "torch v2", "ours mix 500")
    ratio("raw 256 / torch PIL", "torch PIL", "ours raw 256")
    for name in STORED:
        title = "L3" if name == "jpeg 500" else f"L3 {name}"
        ratio(title, f"ours {name}", f"ffcv {name}", BOUNDS.get(title, BOUNDS["L3"]))
    ratio("L3 FFCV's file", "ours jpeg 500, FFCV's file", "ffcv jpeg 500")
    num_images = num_epoch_images(folder)
    speeds = {
        name: 1000 * num_images / statistics.median(ms for run in times for ms in run) for name, times in runs.items()
    }
    text = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    results.add(Figure(f"images/s {num_workers} workers", text, speeds))


def num_epoch_images(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.jpg")) // _batch(folder) * _batch(folder)


def _batch(folder: Path) -> int:
    return min(BATCH, sum(1 for _ in folder.rglob("*.jpg")) // 3)


def our_loader(path: Path, num_workers: int, batch: int) -> TrainLoader:
    data = DataConfig(
        loader="folder" if path.is_dir() else "ffcv", train=str(path), train_resolution=SIDE, num_workers=num_workers
    )
    return open_train_loader(path, data, global_batch=batch, seed=0, device=torch.device("cpu"), channels_last=True)


def our_leg(path: Path, num_workers: int) -> Leg:
    loader = our_loader(path, num_workers, _batch(photographs_of(path)))
    epochs = count()

    def epoch() -> None:
        start = next(epochs) * loader.steps_per_epoch
        for _, batch in loader.steps(start, start + loader.steps_per_epoch):
            _use(*batch)

    return epoch


def photographs_of(path: Path) -> Path:
    """Return the folder that a .beton file was written from."""
    return path if path.is_dir() else photographs(int(path.name.split("-")[3]))


def torch_leg(folder: Path, num_workers: int, *, is_v2: bool) -> Leg:
    """Load with torchvision's ImageFolder and DataLoader.

    Pillow and the classic transforms, or decode_jpeg and transforms v2.
    """
    from torchvision import datasets, transforms
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    def load(path: str) -> Tensor:
        image: Tensor = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
        return image

    if is_v2:
        chain: Any = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])
        images = datasets.ImageFolder(str(folder), chain, loader=load)
    else:
        chain = transforms.Compose(
            [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )
        images = datasets.ImageFolder(str(folder), chain)
    loader = DataLoader(
        images, _batch(folder), shuffle=True, num_workers=num_workers, drop_last=True, persistent_workers=True
    )
    return _normalising(lambda: iter(loader))


def ffcv_leg(path: Path, num_workers: int) -> Leg:
    from benchmarks.support.bare_ffcv import batches_of

    return _normalising(batches_of(path, batch=_batch(photographs_of(path)), num_workers=num_workers, resolution=SIDE))


def _normalising(epoch: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Leg:
    """Turn uint8 batches into what training takes, in the same way as our loader."""
    shape = (1, 3, SIDE, SIDE)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1).expand(shape).contiguous(memory_format=torch.channels_last)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def leg() -> None:
        for images, labels in epoch():
            _use(images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std), labels)

    return leg


def _use(images: Tensor, labels: Tensor) -> None:
    assert images.dtype == torch.float32 and len(images) == len(labels)


def require_same_pixels(paths: dict[str, Path]) -> None:
    """Compare both files, which hold the same images: parts of JPEGs against whole JPEGs.

    Raises:
        AssertionError: if any pixel differs.
    """
    batches = []
    for path in paths.values():
        loader = our_loader(path, 1, _batch(photographs_of(path)))
        batches.append([images for _, (images, _) in loader.steps(0, min(3, loader.steps_per_epoch))])
    for ours, whole in zip(*batches, strict=True):
        assert torch.equal(ours, whole)


if __name__ == "__main__":
    main()
