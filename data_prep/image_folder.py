"""Write data sets in torchvision's ImageFolder layout (``split/class/image``) to ``train.beton`` and ``val.beton``."""

from __future__ import annotations

from pathlib import Path

from data_prep.image_files import Sample, WriteOptions, choose_subset, write_image_files
from pipeline.datasets.folder_listing import list_class, list_classes
from pipeline.datasets.image_file import ImageFile
from pipeline.datasets.sidecar import BetonInfo, refuse_other_forms
from pipeline.errors import DataError


def write_image_folders(output: Path, *, train: Path, val: Path, options: WriteOptions) -> list[BetonInfo]:
    """Write both splits into ``output``.

    Raises:
        DataError: the folders differ in their classes, or hold too many unusable images.
    """
    classes = common_classes(train, val)
    listed = {
        name: list_samples(folder, classes, options.subset, seed=options.seed)
        for name, folder in (("train", train), ("val", val))
    }
    return write_image_files(output, listed, classes=classes, kind="image-folder", options=options)


def list_samples(folder: Path, classes: list[str], subset: int | None = None, *, seed: int = 0) -> list[Sample]:
    """List the files of all classes, without hidden ones, in the order of label and name.

    Args:
        folder: a split, with one folder per class.
        classes: names of the class folders, in the order of their labels.
        subset: number of files to choose, spread over the classes; None lists all.
        seed: draws the subset.

    Raises:
        DataError: a class has no files.
    """
    by_class = [
        [Sample(ImageFile(folder / name / file), label, f"{name}/{file}") for file in list_class(folder, name)]
        for label, name in enumerate(classes)
    ]
    return choose_subset(by_class, subset, seed=seed)


def common_classes(train: Path, val: Path) -> list[str]:
    """List the class folders, which must be the same in both splits.

    Raises:
        DataError: they differ.
    """
    classes, val_classes = list_classes(train), list_classes(val)
    refuse_other_forms(classes, val_classes, train, val)
    for names, present, absent in (
        (set(classes) - set(val_classes), train, val),
        (set(val_classes) - set(classes), val, train),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            count = "1 class" if len(names) == 1 else f"{len(names)} classes"
            raise DataError(
                f"{absent}: {count} of {present} {'is' if len(names) == 1 else 'are'} missing: {shown}{more}",
                do="give both splits the same class folders",
            )
    return classes
