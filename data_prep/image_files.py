"""Write labelled image files to ``train.beton`` and ``val.beton``.

Every header is read before anything is written, and every image is decoded while it is written.
Files that are not usable images are logged and left out, or end the run with nothing written.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.bad_images import report_bad
from data_prep.hold_out import HELD_OUT, choose_held_out, refuse_stale
from data_prep.images import ImageOptions
from data_prep.workers import Send, run_workers, shared_array
from pipeline.datasets.image_file import BadImage, ImageFacts, ImageFile, load_rgb, read_facts
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError
from pipeline.terminal.progress import show_progress

logger = logging.getLogger(__name__)

CHECK_CHUNK = 32  # images per message of a checking worker


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, its label, and its name in the manifest: the path below the root of the data set."""

    source: ImageFile
    label: int
    name: str


@dataclass(frozen=True)
class WriteOptions:
    """Options of every command that writes image files."""

    images: ImageOptions
    subset: int | None = None  # images per split
    seed: int = 0  # draws the subset, the held-out images, and the images that write mode "proportion" compresses
    hold_out: int | None = None  # images of the training set that are kept out of it
    skip_bad: int = 0
    is_upright: bool = False  # rotate and mirror images as their EXIF orientation says
    num_workers: int = 1
    chunk_size: int = 100


class ImageFiles:
    """Image files as a data set; an item is uint8 [height, width, 3] with its label, or raises BadImage.

    Records the hash of each file it reads.
    """

    def __init__(self, samples: list[Sample], *, is_upright: bool) -> None:
        self.samples, self.is_upright = samples, is_upright
        self.sha256 = shared_array((len(samples), 32), np.dtype(np.uint8))  # filled by the workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample = self.samples[index]
        try:
            image, sha256 = load_rgb(sample.source, is_upright=self.is_upright)
        except BadImage as error:
            raise BadImage(f"{sample.source}: {error}") from error
        self.sha256[index] = np.frombuffer(sha256, dtype=np.uint8)
        return image, sample.label

    def manifest_sha256(self) -> str:
        """Hash over content, name and label of every file that was read, in order."""
        read = np.flatnonzero(self.sha256.any(axis=1))
        lines = (f"{self.sha256[i].tobytes().hex()} {self.samples[i].name} {self.samples[i].label}\n" for i in read)
        sha = hashlib.sha256()
        for line in lines:
            sha.update(line.encode(errors="surrogateescape"))
        return sha.hexdigest()


def write_image_files(
    output: Path, listed: Mapping[str, list[Sample]], *, classes: Sequence[str], kind: str, options: WriteOptions
) -> list[BetonInfo]:
    """Write every split of ``listed`` into ``output``, leaving out up to ``options.skip_bad`` unusable files.

    ``held_out.beton`` is written too if ``options.hold_out`` is set; unusable files are left out of
    it as well.

    Raises:
        ConfigError: more images are to be held out than ``choose_held_out`` allows.
        DataError: more files are unusable, or a split has no usable image.
    """
    refuse_stale(output, options.hold_out)
    if len(classes) == 1:
        logger.warning("only one class, %r: training needs at least 2", classes[0])
    listed = _with_held_out(listed, options)
    samples = list(itertools.chain.from_iterable(listed.values()))
    facts = _look_at_all(samples, options)
    bad = [fact for fact in facts if isinstance(fact, str)]
    if len(bad) > options.skip_bad:  # nothing will be written, so decode everything to report all bad files at once
        report_bad(
            [fact for fact in _look_at_all(samples, options, is_whole=True) if isinstance(fact, str)], options.skip_bad
        )
    _report_turned(facts, is_upright=options.is_upright)
    from data_prep.writer import Split, write_splits  # imports ffcv, so only after the sources have been checked

    remaining = iter(facts)
    splits = []
    for name, samples in listed.items():
        good = [
            (sample, fact) for sample, fact in zip(samples, remaining, strict=False) if isinstance(fact, ImageFacts)
        ]
        files = ImageFiles([sample for sample, _ in good], is_upright=options.is_upright)
        min_bytes = _min_bytes([fact for _, fact in good], options.images)
        splits.append(Split(output / f"{name}.beton", files, _origin(kind, files, num_listed=len(samples)), min_bytes))
    return write_splits(
        splits,
        classes=classes,
        options=options.images,
        seed=options.seed,
        bad=bad,
        skip_bad=options.skip_bad,
        num_workers=options.num_workers,
        chunk_size=options.chunk_size,
    )


def choose_subset(by_class: Sequence[Sequence[Sample]], subset: int | None, *, seed: int) -> list[Sample]:
    """Choose ``subset`` samples, spread over the classes and random within each, in the order of label and name.

    None chooses all.
    """
    if subset is None:
        return list(itertools.chain.from_iterable(by_class))
    random = np.random.default_rng(seed)
    shuffled = ([samples[i] for i in random.permutation(len(samples))] for samples in by_class)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    chosen = itertools.islice((sample for sample in in_turn if sample is not None), subset)
    return sorted(chosen, key=lambda sample: (sample.label, sample.name))


def _with_held_out(listed: Mapping[str, list[Sample]], options: WriteOptions) -> Mapping[str, list[Sample]]:
    if options.hold_out is None:
        return listed
    train = listed["train"]
    labels = np.array([sample.label for sample in train])
    is_held_out = choose_held_out(labels, options.hold_out, seed=options.seed)
    return {
        **listed,
        "train": [sample for sample, is_out in zip(train, is_held_out, strict=True) if not is_out],
        HELD_OUT: [sample for sample, is_out in zip(train, is_held_out, strict=True) if is_out],
    }


def _origin(kind: str, files: ImageFiles, *, num_listed: int) -> Callable[[int], dict[str, Any]]:
    def origin(num_written: int) -> dict[str, Any]:
        skipped = num_listed - num_written
        return {
            "kind": kind,
            "num_images": num_written,
            "num_skipped": skipped,
            "manifest_sha256": files.manifest_sha256(),
        }

    return origin


def _look_at_all(samples: list[Sample], options: WriteOptions, *, is_whole: bool = False) -> list[ImageFacts | str]:
    """Read the header of each image: its facts, or ``file: why it is not usable``; ``is_whole`` also decodes it."""
    results: list[ImageFacts | str] = [""] * len(samples)
    max_resolution = options.images.max_resolution or 1 << 16
    done = 0

    def examine(sample: Sample) -> ImageFacts | str:
        try:
            if is_whole:
                load_rgb(sample.source)
            return read_facts(sample.source, max_resolution)
        except BadImage as error:
            return f"{sample.source}: {error}"

    def work(worker: int, send: Send) -> None:
        for start in range(worker * CHECK_CHUNK, len(samples), options.num_workers * CHECK_CHUNK):
            send((start, [examine(sample) for sample in samples[start : start + CHECK_CHUNK]]))

    with show_progress("decoding images" if is_whole else "reading image headers", "images") as report:

        def receive(message: tuple[int, list[ImageFacts | str]]) -> None:
            nonlocal done
            start, chunk = message
            results[start : start + len(chunk)] = chunk
            done += len(chunk)
            report(done, len(samples))

        run_workers(work, options.num_workers, receive=receive)
    return results


def _report_turned(facts: list[ImageFacts | str], *, is_upright: bool) -> None:
    if num_turned := sum(isinstance(fact, ImageFacts) and fact.is_turned for fact in facts):
        how = (
            "they are turned upright"
            if is_upright
            else "they are stored without turning, as torchvision reads them (--upright turns them)"
        )
        logger.warning("%d images have an EXIF orientation: %s", num_turned, how)


def _min_bytes(facts: list[ImageFacts], options: ImageOptions) -> int:
    """Size of the images that are stored raw; the size of the others is not known beforehand."""
    if not facts:
        raise DataError("one of the splits has no usable image", do="check the files listed above")
    raw_share = {"raw": 1.0, "proportion": 1 - options.compress_probability}.get(options.write_mode, 0.0)
    total = 0.0
    for fact in facts:
        scale = min(1.0, (options.max_resolution or 1 << 16) / max(fact.width, fact.height))
        total += 3 * int(fact.width * scale) * int(fact.height * scale)
    return int(raw_share * total)
