"""Write corrupted copies of a data set, for the robustness part of an evaluation.

One folder holds one file ``<corruption>-<severity>.beton`` per corruption and severity. They are
made from any .beton file (Hendrycks and Dietterich, arXiv 1903.12261, by the package
``imagecorruptions-imaug``), or read from the published ImageNet-C and CIFAR-C. Labels, order and
class list are those of the original.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.arrays import ArrayImages
from data_prep.image_files import ImageFiles
from data_prep.images import ImageOptions
from pipeline.data.order import evenly_spread
from pipeline.datasets.beton_format import JPEG, Tables, read_tables
from pipeline.datasets.image_file import decode_rgb
from pipeline.datasets.sidecar import BetonInfo, verify
from pipeline.errors import DataError, ServiceError

logger = logging.getLogger(__name__)

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
OWN_GENERATOR = ("impulse_noise", "glass_blur")  # these take a seed
SMALLEST_SIDE = 32  # pixels: the smallest image that the package accepts
CIFAR_C_IMAGES = 10_000  # per severity

# (image uint8 [height, width, 3], corruption, severity, seed) -> image of the same size
Corrupt = Callable[[np.ndarray, str, int, int], np.ndarray]


@dataclass(frozen=True)
class BetonImages:
    """The images of a .beton file as stored; an item is uint8 [height, width, 3] with its label."""

    tables: Tables
    content: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> BetonImages:
        """Open a file that has been verified."""
        return cls(read_tables(path), np.memmap(path, dtype=np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self.tables.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row, start = self.tables.samples[index], int(self.tables.pointer[index])
        stored = self.content[start : start + int(self.tables.size[index])]
        image = row["image"]
        if image["mode"] != JPEG:
            return stored.reshape(int(image["height"]), int(image["width"]), 3), int(row["label"])
        return decode_rgb(stored.tobytes()), int(row["label"])


@dataclass(frozen=True)
class CorruptedImages:
    """Images under one corruption at one severity.

    The random numbers depend on seed, corruption, severity and sample alone.
    """

    images: BetonImages
    corruption: str
    severity: int
    seed: int
    # side of the central square that is kept after scaling the shorter side to 256/224 of it; None: the whole image
    crop: int | None
    work_side: int  # pixels: images whose shorter side is smaller are enlarged while they are corrupted
    corrupt: Corrupt
    ids: NDArray[np.int64] | None = None  # which images; None: all

    def __len__(self) -> int:
        return len(self.images) if self.ids is None else len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample = index if self.ids is None else int(self.ids[index])
        image, label = self.images[sample]
        if self.crop is not None:
            image = centre_square(image, self.crop)
        height, width = image.shape[:2]
        large = _resized(image, max(1.0, self.work_side / min(height, width)))
        key = f"{self.seed} {self.corruption} {self.severity} {sample}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
        corrupted = self.corrupt(np.ascontiguousarray(large), self.corruption, self.severity, seed)
        return _fitted(corrupted, height, width), label


def write_corrupted(
    source: Path,
    output: Path,
    *,
    corruptions: Sequence[str],
    severities: Sequence[int],
    seed: int,
    crop: int | None,
    work_side: int,
    num_workers: int,
    subset: int | None = None,
    corrupt: Corrupt | None = None,
) -> Iterator[BetonInfo]:
    """Write every corruption of ``source`` at every severity.

    Existing files that are intact and were made with the same settings are kept.

    Args:
        source: the .beton file to corrupt.
        output: folder of the files.
        corruptions: names of CORRUPTIONS.
        severities: each from 1 to 5.
        seed: keys the random numbers.
        crop: side to scale and crop the images to first; None keeps whole images.
        work_side: images with a smaller shorter side are enlarged to it while they are corrupted.
        num_workers: number of processes.
        subset: number of images to use, evenly spaced; None uses all.
        corrupt: replaces the package's function.

    Raises:
        ServiceError: the package is not installed.
        DataError: ``source`` is damaged, or ``output`` holds files of another kind or with other settings.
    """
    info = verify(source, level=2)
    corrupt, made_by = (
        (package_corrupt(), f"imagecorruptions-imaug {version('imagecorruptions-imaug')}")
        if corrupt is None
        else (corrupt, "caller")
    )
    _require_only("corrupted", output)
    images = BetonImages.of(source)
    ids = evenly_spread(len(images), subset)
    for corruption in corruptions:
        for severity in severities:
            how = {
                "kind": "corrupted",
                "corruption": corruption,
                "severity": severity,
                "seed": seed,
                "crop": crop,
                "work_side": work_side,
            }
            origin = (
                how
                | ({} if len(ids) == len(images) else {"subset": len(ids)})
                | {"made_by": made_by, "of": info.digest}
            )
            dataset = CorruptedImages(images, corruption, severity, seed, crop, work_side, corrupt, ids)
            yield _write(
                output, corruption, severity, dataset, classes=info.classes, origin=origin, num_workers=num_workers
            )


def write_imagenet_c(source: Path, output: Path, *, num_workers: int) -> Iterator[BetonInfo]:
    """Write ImageNet-C from its published layout, ``<corruption>/<severity>/<class>/<image>.JPEG``.

    All corruptions and severities found in ``source`` are written. Existing intact files are kept.

    Raises:
        DataError: a folder has other classes than the first, or holds an image that cannot be read.
    """
    from data_prep.image_folder import list_samples
    from pipeline.datasets.folder_listing import list_classes

    folders = sorted(
        (path for path in source.glob("*/*") if path.is_dir() and path.name.isdecimal()),
        key=lambda path: (path.parent.name, int(path.name)),
    )
    if not folders:
        raise DataError(
            f"{source}: contains no <corruption>/<severity> folders",
            do="pass the folder that ImageNet-C was unpacked into",
        )
    _require_only("imagenet-c", output)
    classes = list_classes(folders[0])
    for folder in folders:
        if list_classes(folder) != classes:
            raise DataError(f"{folder}: its classes differ from those of {folders[0]}", do="unpack ImageNet-C again")
        files = ImageFiles(list_samples(folder, classes), is_upright=False)
        origin = {"kind": "imagenet-c", "num_images": len(files)}
        yield _write(
            output, folder.parent.name, int(folder.name), files, classes=classes, origin=origin, num_workers=num_workers
        )


def write_cifar_c(source: Path, output: Path, *, like: Path, num_workers: int) -> Iterator[BetonInfo]:
    """Write CIFAR-10-C or CIFAR-100-C from its published layout.

    That is ``<corruption>.npy``, uint8 [50000, 32, 32, 3] with one severity after the other, and
    ``labels.npy``. Existing intact files are kept.

    Args:
        source: folder of the .npy files.
        output: folder to write the files to.
        like: .beton file of the clean data set, read for the names of the classes.
        num_workers: number of processes.

    Raises:
        DataError: ``source`` is incomplete or damaged.
    """
    _require_only("cifar-c", output)
    classes = verify(like).classes
    labels = _load_array(source / "labels.npy")
    names = sorted(path.stem for path in source.glob("*.npy") if path.stem != "labels")
    if not names:
        raise DataError(
            f"{source}: contains no <corruption>.npy files", do="pass the folder that CIFAR-C was unpacked into"
        )
    if labels.ndim != 1 or len(labels) % CIFAR_C_IMAGES or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"{source / 'labels.npy'}: expected {CIFAR_C_IMAGES} labels of {len(classes)} classes for each severity",
            do="download the file again",
        )
    for name in names:
        images = _load_array(source / f"{name}.npy")
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
            raise DataError(
                f"{source / name}.npy: expected uint8 {(len(labels), 32, 32, 3)}, got {images.dtype} {images.shape}",
                do="download the file again",
            )
        for severity in range(1, len(labels) // CIFAR_C_IMAGES + 1):
            part = slice((severity - 1) * CIFAR_C_IMAGES, severity * CIFAR_C_IMAGES)
            origin = {"kind": "cifar-c", "num_images": CIFAR_C_IMAGES}
            yield _write(
                output,
                name,
                severity,
                ArrayImages(images[part], labels[part]),
                classes=classes,
                origin=origin,
                num_workers=num_workers,
            )


def _write(
    output: Path,
    corruption: str,
    severity: int,
    dataset: Any,
    *,
    classes: Sequence[str],
    origin: dict[str, Any],
    num_workers: int,
) -> BetonInfo:
    path = output / f"{corruption}-{severity}.beton"
    if path.exists():
        try:
            there = verify(path)
        except DataError as error:
            logger.warning("%s; the file will be rewritten", error.what)
        else:
            if there.sidecar["source"] != origin or there.classes != list(classes):
                raise DataError(
                    f"{path}: already exists and was made with other settings",
                    do="choose another --output, or remove the file",
                )
            logger.info("%s already exists", path)
            return there
    from data_prep.writer import write_beton  # imports ffcv, so only after the sources have been checked

    return write_beton(
        path, dataset, classes=classes, options=ImageOptions(write_mode="raw"), source=origin, num_workers=num_workers
    )


def _require_only(kind: str, output: Path) -> None:
    """Raise DataError when ``output`` holds data sets of another kind.

    An evaluation compares the numbers of a folder as those of one benchmark.
    """
    for path in sorted(output.glob("*-[1-9]*.beton")):
        try:
            there = verify(path, level=0).sidecar["source"].get("kind")
        except DataError:  # damaged: replaced when its turn comes
            continue
        if there != kind:
            raise DataError(
                f"{path}: expected kind {kind!r}, got {there!r}: one folder holds data sets of one kind",
                do="choose another --output",
            )


def package_corrupt() -> Corrupt:
    """Return the corruption function of the package ``imagecorruptions-imaug``.

    Raises:
        ServiceError: the package is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise ServiceError(
            f"corrupting images needs the package {error.name}, which is not installed",
            do="python -m pip install -e '.[corruptions]'",
        ) from None

    def corrupt(image: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
        np.random.seed(seed)  # noqa: NPY002  all but two draw from numpy's global generator
        own = {"seed": seed} if corruption in OWN_GENERATOR else {}
        return np.asarray(imagecorruptions.corrupt(image, corruption_name=corruption, severity=severity, **own))

    return corrupt


def centre_square(image: np.ndarray, side: int) -> np.ndarray:
    """Scale and crop an image as was done for ImageNet-C: uint8 [side, side, 3].

    The shorter side is scaled to 256/224 of ``side``, then the central square is cut out.
    """
    large = _resized(image, round(side * 256 / 224) / min(image.shape[:2]))
    top, left = (large.shape[0] - side) // 2, (large.shape[1] - side) // 2
    return large[top : top + side, left : left + side]


def _resized(image: np.ndarray, scale: float) -> np.ndarray:
    height, width = image.shape[:2]
    return _fitted(image, round(height * scale), round(width * scale))


def _fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}", do="download the file again") from None
