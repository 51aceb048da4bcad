"""Measure how fast .beton files are written: ``python -m benchmarks.writing``.

P1 write     images per second of our writing step / of ffcv's DatasetWriter, which reads the same
             images with PIL, resizes and compresses them
P1 whole     the same with everything that data_prep does: check every header, write with hashes,
             read everything again and decode it strictly

Both for the usual 50% mix at 500 pixels, with one and with two workers. The images (about 400×400
pixels, 40 KB) are made by the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.support.bars import Bounds, Figure, Results, bar, in_turn
from data_prep.image_files import ImageFiles, WriteOptions
from data_prep.image_folder import list_samples, write_image_folders
from data_prep.images import ImageOptions
from data_prep.writer import Split, write_pages
from pipeline.command_line import local_path
from pipeline.data.ffcv_import import importing_ffcv
from pipeline.datasets.folder_listing import list_classes

with importing_ffcv():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

MIX = ImageOptions("proportion", max_resolution=500)
CHUNK = 20


class Pictures:
    """The input of ffcv's writer: PIL images and labels."""

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=600, metavar="N", help="number of images to make and write (default: 600)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="numbers of processes to write with (default: 1 2)",
    )
    parser.add_argument(
        "--folder",
        type=local_path,
        metavar="FOLDER",
        help="write the images of its folders train and val instead of made ones",
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the results to FILE")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        source = given.folder or make_photographs(Path(temporary, "images"), given.images)
        for num_workers in given.workers:
            measure(results, source, Path(temporary, "out"), num_workers=num_workers, rounds=given.rounds)
    results.write(given.json)


def measure(results: Results, source: Path, output: Path, *, num_workers: int, rounds: int) -> None:
    """Measure both writers alternately, with ``num_workers``."""
    output.mkdir(exist_ok=True)
    classes = list_classes(source / "train")
    samples = [sample for name in ("train", "val") for sample in list_samples(source / name, classes)]
    pictures = Pictures([(sample.source.path, sample.label) for sample in samples])

    def ffcvs() -> None:
        fields = {"image": RGBImageField(**asdict(MIX)), "label": IntField()}
        with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
            DatasetWriter(str(output / "ffcv.beton"), fields, num_workers=num_workers).from_indexed_dataset(
                pictures, chunksize=CHUNK
            )

    def ours() -> None:
        split = Split(output / "ours.beton", ImageFiles(samples, is_upright=False), lambda _: {})
        write_pages(split, MIX, seed=0, num_workers=num_workers, chunk_size=CHUNK, report=lambda *_: None)

    def whole() -> None:
        options = WriteOptions(MIX, num_workers=num_workers, chunk_size=CHUNK)
        write_image_folders(output, train=source / "train", val=source / "val", options=options)

    legs: dict[str, Callable[[], None]] = {"write": ours, "whole": whole}
    for name, leg in legs.items():
        run = in_turn(ffcvs, leg, rounds=rounds)
        results.add(bar(f"P1 {name} {num_workers}w", [run], Bounds("–", "1", "–")))
        rates = [len(samples) / statistics.median(pair[which] for pair in run) * 1000 for which in (1, 0)]
        results.add(
            Figure(
                f"P1 {name} {num_workers}w img/s",
                f"{rates[0]:.0f}, ffcv {rates[1]:.0f}",
                {"ours": rates[0], "ffcv": rates[1]},
            )
        )


def make_photographs(root: Path, num: int) -> Path:
    """Write two classes of photographs, a tenth of them for validation."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(array) for array in load_sample_images().images]
    random = np.random.default_rng(0)
    for index in range(num):
        folder = root / ("val" if index % 10 == 0 else "train") / f"class{index // 10 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        left, top, width, height = (
            int(random.integers(low, high)) for low, high in ((0, 200), (0, 100), (300, 501), (300, 501))
        )
        photograph = originals[index % 2].resize(
            (width, height), Image.Resampling.BILINEAR, box=(left, top, left + 400, top + 320)
        )
        photograph.save(folder / f"{index}.jpg", quality=90)
    return root


if __name__ == "__main__":
    main()
