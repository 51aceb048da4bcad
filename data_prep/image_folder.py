"""torchvision's ImageFolder layout (``split/class/image``) to ``train.beton`` and ``val.beton``.

Every image is decoded before anything is written: one damaged file would otherwise end a run of hours, or hang it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.images import BadImage, ImageFacts, ImageOptions, check_image, load_rgb
from data_prep.progress import show_progress
from data_prep.workers import Send, run_workers
from pipeline.data.beton import BetonInfo
from pipeline.errors import DataError, PermissionDenied

log = logging.getLogger(__name__)

NUM_BAD_LISTED = 100
CHECK_CHUNK = 32  # images per message of a checking worker


@dataclass(frozen=True)
class Sample:
    """One image file and its label."""

    path: Path
    label: int


@dataclass(frozen=True)
class ImageFiles:
    """Checked image files; an item is uint8 [height, width, 3] with its label."""

    samples: list[Sample]
    facts: list[ImageFacts]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample = self.samples[index]
        try:
            return load_rgb(sample.path), sample.label
        except BadImage as error:
            raise DataError(
                f"{sample.path}: {error}, though it was whole when checked", do="leave the sources alone and start again"
            ) from None

    def manifest_sha256(self, root: Path) -> str:
        """Hash of every file's content, path below ``root`` and label, in order."""
        lines = (f"{fact.sha256} {s.path.relative_to(root)} {s.label}\n" for s, fact in zip(self.samples, self.facts, strict=True))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def write_image_folders(
    output: Path, *, train: Path, val: Path, options: ImageOptions, subset: int | None, skip_bad: int, num_workers: int, chunk_size: int
) -> list[BetonInfo]:
    """Write both splits into ``output``; up to ``skip_bad`` files that are no usable image are left out. Raises DataError."""
    folders = {"train": train, "val": val}
    classes = _common_classes(train, val)
    listed = {split: list_samples(folder, classes, subset) for split, folder in folders.items()}
    checked = _check_all(listed, max_resolution=options.max_resolution or 0, skip_bad=skip_bad, num_workers=num_workers)
    from data_prep.writer import write_beton  # imports ffcv: only when the sources are known to be good

    return [
        write_beton(
            output / f"{split}.beton",
            files,
            classes=classes,
            options=options,
            source={
                "kind": "image-folder",
                "num_images": len(files),
                "num_skipped": len(listed[split]) - len(files),
                "manifest_sha256": files.manifest_sha256(folders[split]),
            },
            num_workers=num_workers,
            chunk_size=chunk_size,
            min_bytes=_min_bytes(files, options),
        )
        for split, files in checked.items()
    ]


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted: the position is the label, as in torchvision."""
    classes = [path.name for path in _visible(folder) if path.is_dir()]
    if not classes:
        raise DataError(f"{folder}: has no class folders", do="name a folder with one folder of images per class")
    for name in classes:
        if not name.isprintable():  # among others, a name that is not UTF-8
            raise DataError(f"{folder}: the name of the class folder {name!a} cannot be printed", do="rename it in train and val")
    return classes


def list_samples(folder: Path, classes: list[str], subset: int | None) -> list[Sample]:
    """All files of all classes (hidden ones aside), in the order of label and name; with ``subset`` that many, spread over the classes."""
    by_class = []
    for label, name in enumerate(classes):
        samples = [Sample(path, label) for path in _visible(folder / name)]
        if not samples:
            raise DataError(f"{folder / name}: holds no images", do="add images, or remove the class from train and val")
        by_class.append(samples)
    if subset is None:
        return list(itertools.chain.from_iterable(by_class))
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    chosen = itertools.islice((sample for sample in in_turn if sample is not None), subset)
    return sorted(chosen, key=lambda sample: (sample.label, sample.path))


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        raise PermissionDenied(f"{folder}: may not be listed by user id {os.geteuid()}", do="make it readable (chmod a+rx)") from None
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", do="name a folder with one folder of images per class") from None


def _common_classes(train: Path, val: Path) -> list[str]:
    classes, val_classes = list_classes(train), list_classes(val)
    for names, present, absent in ((set(classes) - set(val_classes), train, val), (set(val_classes) - set(classes), val, train)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise DataError(f"{absent}: lacks classes that {present} has ({len(names)}): {shown}", do="give both the same class folders")
    return classes


def _check_all(listed: dict[str, list[Sample]], *, max_resolution: int, skip_bad: int, num_workers: int) -> dict[str, ImageFiles]:
    """Decode every file; list what is no usable image, and refuse when there are more of those than ``skip_bad``."""
    samples = list(itertools.chain.from_iterable(listed.values()))
    results: list[ImageFacts | str] = [""] * len(samples)
    done = 0

    def work(worker: int, send: Send) -> None:
        for start in range(worker * CHECK_CHUNK, len(samples), num_workers * CHECK_CHUNK):
            send((start, [_facts_or_reason(sample.path, max_resolution) for sample in samples[start : start + CHECK_CHUNK]]))

    with show_progress("checking images", "images") as report:

        def receive(message: tuple[int, list[ImageFacts | str]]) -> None:
            nonlocal done
            start, chunk = message
            results[start : start + len(chunk)] = chunk
            done += len(chunk)
            report(done, len(samples))

        run_workers(work, num_workers, receive=receive)
    _report_bad([(sample.path, result) for sample, result in zip(samples, results, strict=True) if isinstance(result, str)], skip_bad)

    remaining = iter(zip(samples, results, strict=True))
    checked = {}
    for split, split_samples in listed.items():
        good = [(sample, fact) for sample, fact in itertools.islice(remaining, len(split_samples)) if isinstance(fact, ImageFacts)]
        if not good:
            raise DataError(f"no usable image is left for {split}", do="look at the files listed above")
        checked[split] = ImageFiles([sample for sample, _ in good], [fact for _, fact in good])
    return checked


def _facts_or_reason(path: Path, max_resolution: int) -> ImageFacts | str:
    try:
        return check_image(path, max_resolution)
    except BadImage as error:
        return str(error)


def _report_bad(bad: list[tuple[Path, str]], skip_bad: int) -> None:
    for path, reason in bad[:NUM_BAD_LISTED]:
        log.warning("not usable: %s: %s", path, reason)
    if len(bad) > NUM_BAD_LISTED:
        log.warning("… and %d more", len(bad) - NUM_BAD_LISTED)
    if len(bad) > skip_bad:
        path, reason = bad[0]
        do = f"repair or remove them, or leave them out with --skip-bad {len(bad)}"
        raise DataError(
            f"files that are not usable images: {len(bad)}, where {skip_bad} may be skipped; the first is {path}: {reason}", do=do
        )


def _min_bytes(files: ImageFiles, options: ImageOptions) -> int:
    """What the raw images will take; how far the others compress is not known beforehand."""
    raw_share = {"raw": 1.0, "proportion": 1 - options.compress_probability}.get(options.write_mode, 0.0)
    total = 0.0
    for fact in files.facts:
        scale = min(1.0, (options.max_resolution or 0) / max(fact.width, fact.height))
        total += 3 * int(fact.width * scale) * int(fact.height * scale)
    return int(raw_share * total)
