"""Write ImageNet (ILSVRC 2012; arXiv 1409.0575) to ``train.beton`` and ``val.beton``.

Reads the published archives, packed or unpacked. Packed archives are read in place; the training
archive is a tar with one tar per class. A label is the position of the class among the sorted
WordNet ids, as in torchvision, so that published weights fit.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.archives import list_members, list_nested, read_member
from data_prep.image_files import Sample, WriteOptions, choose_subset, write_image_files
from data_prep.image_folder import common_classes, list_samples
from pipeline.datasets.folder_listing import list_classes, visible
from pipeline.datasets.image_file import ImageFile
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError
from pipeline.terminal.progress import show_progress

logger = logging.getLogger(__name__)

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
SYNSETS, VAL_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
KAGGLE = "ILSVRC/Data/CLS-LOC"  # where Kaggle's archive has the folders train and val
NUM_CLASSES = 1000
WNID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
MAX_BYTES = 64 << 20  # largest ground-truth file that is read


@dataclass(frozen=True)
class GroundTruth:
    """The classes of the validation images, and the number of training images per class."""

    wnids: Mapping[int, str]  # WordNet id of every validation image, numbered from 1
    num_train: Mapping[str, int]  # by WordNet id; empty when unknown


def write_imagenet(output: Path, *, source: Path, ground_truth: Path | None, options: WriteOptions) -> list[BetonInfo]:
    """Write both splits into ``output``.

    Args:
        output: folder to write the files to.
        source: folder with the archives, or with folders ``train`` and ``val``.
        ground_truth: devkit (archive or folder) or LOC_val_solution.csv; None looks for it in ``source``.
        options: shared by every command that writes image files.

    Raises:
        DataError: ``source`` is incomplete or damaged.
    """
    if (source / TRAIN).is_file():
        listed, classes = list_archives(source, ground_truth=ground_truth)
    else:
        listed, classes = list_unpacked(source, ground_truth=ground_truth)
    chosen = {split: choose_subset(by_class, options.subset, seed=options.seed) for split, by_class in listed.items()}
    return write_image_files(output, chosen, classes=classes, kind="imagenet", options=options)


ByClass = list[list[Sample]]


def list_archives(source: Path, *, ground_truth: Path | None) -> tuple[dict[str, ByClass], list[str]]:
    """List the samples of the archives in ``source``, by split and label, and the classes.

    Raises:
        DataError: an archive is missing, damaged or does not match the ground truth.
    """
    for name in (TRAIN, VAL):
        if not (source / name).is_file():
            raise DataError(
                f"{source}: has no {name}",
                do="download it from image-net.org, or unpack both splits into train and val",
            )
    truth = read_ground_truth(ground_truth or _find_devkit(source))
    with show_progress(f"listing {TRAIN}", "classes") as report:
        by_wnid = list_nested(source / TRAIN, on_archive=report)
    classes = sorted(by_wnid)
    _compare_classes(source / TRAIN, classes, truth)
    train = []
    for label, wnid in enumerate(classes):
        if not by_wnid[wnid]:
            raise DataError(f"{source / TRAIN}: {wnid}.tar contains no images", do="download the archive again")
        if len(by_wnid[wnid]) != truth.num_train.get(wnid, len(by_wnid[wnid])):
            logger.warning(
                "%s: %d images of %s, but the devkit says %d", TRAIN, len(by_wnid[wnid]), wnid, truth.num_train[wnid]
            )
        samples = (Sample(image, label, f"{wnid}/{PurePosixPath(image.member).name}") for image in by_wnid[wnid])
        train.append(sorted(samples, key=lambda sample: sample.name))
    val = _label_by_number(source / VAL, list_members(source / VAL), classes, truth)
    return {"train": train, "val": val}, classes


def list_unpacked(source: Path, *, ground_truth: Path | None) -> tuple[dict[str, ByClass], list[str]]:
    """List the samples of folders ``train/<wnid>`` and ``val/<wnid>``, or of ``val`` with all images in one folder.

    The folders are in ``source``, or in Kaggle's layout below it.

    Returns:
        The samples by split and label, and the classes.

    Raises:
        DataError: a folder is missing or does not match the ground truth.
    """
    root = _find_splits(source)
    train, val = root / "train", root / "val"
    is_flat = not any((val / name).is_dir() for name in visible(val))
    classes = list_classes(train) if is_flat else common_classes(train, val)
    folders = {"train": train} if is_flat else {"train": train, "val": val}
    listed = {name: _by_class(list_samples(folder, classes), len(classes)) for name, folder in folders.items()}
    if is_flat:
        truth = read_ground_truth(ground_truth or _find_devkit(source, root))
        _compare_classes(train, classes, truth)
        listed["val"] = _label_by_number(val, [ImageFile(val / name) for name in visible(val)], classes, truth)
    elif len(classes) != NUM_CLASSES:
        logger.warning("%s: has %d classes, ImageNet (ILSVRC 2012) has %d", train, len(classes), NUM_CLASSES)
    return listed, classes


def _find_splits(source: Path) -> Path:
    """Return the folder with ``train`` and ``val``: ``source``, or where Kaggle's archive has them below it."""
    for root in (source, source / "Data" / "CLS-LOC", source / KAGGLE):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise DataError(
        f"{source}: has neither {TRAIN} and {VAL} nor folders train and val, nor {KAGGLE} with them",
        do="pass the folder that holds them, after unpacking it if it is Kaggle's archive",
    )


def read_ground_truth(path: Path) -> GroundTruth:
    """Read the ground truth from the devkit (archive or folder), or from Kaggle's LOC_val_solution.csv.

    Raises:
        DataError: the file is missing or damaged.
    """
    if path.suffix == ".csv":
        return _read_solution(path)
    is_folder = path.is_dir()
    contents = [_read_file(path / name) if is_folder else read_member(path, name) for name in (SYNSETS, VAL_TRUTH)]
    synsets, numbers = _read_synsets(path, contents[0]), contents[1].split()
    try:
        wnids = {index: synsets[int(number)][0] for index, number in enumerate(numbers, 1)}
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path}: {VAL_TRUTH} holds {error.args[0]!a}, which is not a class of {SYNSETS}",
            do="download the devkit again",
        ) from None
    if not wnids:
        raise DataError(f"{path}: {VAL_TRUTH} is empty", do="download the devkit again")
    return GroundTruth(wnids, {wnid: count for wnid, count in synsets.values() if count})


def _read_synsets(path: Path, content: bytes) -> dict[int, tuple[str, int]]:
    """Read WordNet id and number of training images of each class, by the devkit's own number.

    Inner nodes of the hierarchy are left out.
    """
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"]
        keys = ("ILSVRC2012_ID", "WNID", "num_children", "num_train_images")
        columns = zip(*(rows[key].tolist() for key in keys), strict=True)
        synsets = {
            int(number): (str(wnid), int(count))
            for number, wnid, num_children, count in columns
            if int(num_children) == 0
        }
    except Exception as error:  # scipy raises many kinds on damaged input
        raise DataError(f"{path}: {SYNSETS} cannot be read: {error}", do="download the devkit again") from error
    wrong = [wnid for wnid, _ in synsets.values() if not WNID.fullmatch(wnid)]
    if wrong or len({wnid for wnid, _ in synsets.values()}) != len(synsets):
        raise DataError(
            f"{path}: {SYNSETS} names a class twice, or not by its WordNet id: {wrong[:3]}",
            do="download the devkit again",
        )
    return synsets


def _read_solution(path: Path) -> GroundTruth:
    """Read a header and rows ``ILSVRC2012_val_00000001,n01751748 111 108 …``. The first id is the class."""
    rows = csv.reader(_read_file(path).decode(errors="replace").splitlines()[1:])
    wnids = {}
    for row in rows:
        match = VAL_NAME.fullmatch(f"{row[0]}.JPEG") if len(row) == 2 else None
        if match is None or not WNID.fullmatch(row[1].split(" ")[0]):
            raise DataError(
                f"{path}: {','.join(row)[:80]!a} is not a row of LOC_val_solution.csv", do="download the file again"
            )
        wnids[int(match[1])] = row[1].split(" ")[0]
    return GroundTruth(wnids, {})


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{path}: has {path.stat().st_size >> 20} MiB, expected at most {MAX_BYTES >> 20}",
                do="download the file again",
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", do="pass the devkit or LOC_val_solution.csv with --ground-truth"
        ) from None


def _find_devkit(source: Path, root: Path | None = None) -> Path:
    """Find the ground truth in ``source``, or where Kaggle has it: beside the ILSVRC folder that ``root`` is in."""
    is_kaggle = root is not None and root.absolute().parts[-3:] == tuple(KAGGLE.split("/"))
    for place in (source, root.absolute().parents[2]) if root is not None and is_kaggle else (source,):
        for name in (DEVKIT, f"{DEVKIT}.tar.gz", "LOC_val_solution.csv"):
            if (place / name).exists():
                return place / name
    raise DataError(
        f"{source}: has no {DEVKIT}.tar.gz, which holds the labels of the validation images",
        do="put it there, or pass it or LOC_val_solution.csv with --ground-truth",
    )


def _compare_classes(train: Path, classes: list[str], truth: GroundTruth) -> None:
    expected = set(truth.num_train) or set(truth.wnids.values())
    for names, what in (
        (expected - set(classes), "classes of the ground truth are missing"),
        (set(classes) - expected, "classes are not in the ground truth"),
    ):
        if names:
            raise DataError(
                f"{train}: {what} ({len(names)}): {', '.join(sorted(names)[:3])}",
                do="download the archive again, or pass the right devkit",
            )


def _label_by_number(place: Path, images: list[ImageFile], classes: list[str], truth: GroundTruth) -> ByClass:
    """Group validation images by label; the ground truth must hold the number in each name, exactly once."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    samples: ByClass = [[] for _ in classes]
    missing = set(truth.wnids)
    for image in images:
        name = PurePosixPath(image.member or image.path.name).name
        match = VAL_NAME.fullmatch(name)
        if match is None or int(match[1]) not in missing:
            raise DataError(
                f"{place}: {name} is listed twice or is not one of the {len(truth.wnids)} images of the ground truth",
                do="remove it",
            )
        missing.remove(int(match[1]))
        wnid = truth.wnids[int(match[1])]
        samples[label_of[wnid]].append(Sample(image, label_of[wnid], f"{wnid}/{name}"))
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(truth.wnids)} images are missing, the first is number {min(missing)}",
            do="download it again",
        )
    return [sorted(of_class, key=lambda sample: sample.name) for of_class in samples]


def _by_class(samples: list[Sample], num_classes: int) -> ByClass:
    grouped: ByClass = [[] for _ in range(num_classes)]
    for label, of_class in itertools.groupby(samples, key=lambda sample: sample.label):
        grouped[label] = list(of_class)
    return grouped
