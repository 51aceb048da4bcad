"""``python -m data_prep``: writes and verifies the FFCV data sets. Nothing heavy is imported before the arguments are checked."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import doctor
from pipeline.command_line import ArgumentParser
from pipeline.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from pipeline.data.beton import BetonInfo

NUM_CORES = len(os.sched_getaffinity(0))
WRITE_MODES = ("smart", "raw", "jpg", "proportion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error a user can cause is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half written is removed
    try:
        options = build_parser().parse_args(arguments)
        return int(options.run(options))
    except RunError as error:
        print(f"ERROR[{error.code}] {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m data_prep", description="Write and verify FFCV data sets.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    fashion = command("fashion-mnist", _fashion_mnist, "write Fashion-MNIST: OUTPUT/train.beton and OUTPUT/val.beton")
    help_source = "folder of the four IDX files, gzipped or not (default: %(default)s)"
    fashion.add_argument("--source", type=Path, metavar="FOLDER", default=doctor.FASHION_MNIST, help=help_source)
    fashion.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    _add_image_folder(command("image-folder", _image_folder, "write split/class/image folders: OUTPUT/train.beton and OUTPUT/val.beton"))

    _add_corrupt(command("corrupt", _corrupt, "corrupted copies of a .beton file: OUTPUT/<corruption>-<severity>.beton"))
    imagenet_c = command("imagenet-c", _imagenet_c, "the same from ImageNet-C as published: <corruption>/<severity>/<class>/<image>")
    cifar_c = command("cifar-c", _cifar_c, "the same from CIFAR-10-C or CIFAR-100-C as published: <corruption>.npy and labels.npy")
    for published in (imagenet_c, cifar_c):
        published.add_argument("--source", type=Path, required=True, metavar="FOLDER")
        published.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    cifar_c.add_argument("--like", type=Path, required=True, metavar="FILE", help=".beton file of the clean set, for the class names")

    verify = command("verify", _verify, "check files against their sidecars: size, hash of the tables, structure of every sample")
    verify.add_argument("files", type=Path, nargs="+", metavar="FILE")
    verify.add_argument("--deep", action="store_true", help="also the hash of every page and a strict decode of every JPEG")
    verify.add_argument("--classes", type=_integer(1), metavar="N", help="refuse files with more classes than this")
    help_sidecar = "for files without one: check everything that can be checked, then write it"
    verify.add_argument("--write-sidecar", action="store_true", help=help_sidecar)

    command("doctor", lambda _: doctor.run(), "name every missing system package, with the line that installs it")
    return parser


def _add_image_folder(parser: argparse.ArgumentParser) -> None:
    for name in ("--train", "--val", "--output"):
        parser.add_argument(name, type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--write-mode", choices=WRITE_MODES, default="proportion", help="raw pixels or JPEG (default: %(default)s)")
    help_probability = "share of images that --write-mode proportion stores as JPEG (default: %(default)s)"
    parser.add_argument("--compress-probability", type=_probability, metavar="P", default=0.5, help=help_probability)
    help_threshold = "with --write-mode smart: larger raw images are stored as JPEG"
    parser.add_argument("--smart-threshold", type=_integer(1), metavar="BYTES", help=help_threshold)
    help_resolution = "larger images are shrunk to this length of their longer side (default: %(default)s)"
    parser.add_argument("--max-resolution", type=_integer(1, 8192), metavar="PIXELS", default=500, help=help_resolution)
    parser.add_argument("--jpeg-quality", type=_integer(1, 100), metavar="Q", default=90, help="default: %(default)s")
    parser.add_argument("--subset", type=_integer(1), metavar="N", help="only N images per split, spread over the classes")
    parser.add_argument("--skip-bad", type=_integer(0), default=0, metavar="N", help="leave out up to N unusable files (default: 0)")
    parser.add_argument("--workers", type=_integer(1, 256), metavar="N", default=NUM_CORES, help="processes (default: %(default)s)")
    parser.add_argument(
        "--chunk-size", type=_integer(1), metavar="N", default=100, help="images a worker takes at a time (default: %(default)s)"
    )


def _add_corrupt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="the .beton file to corrupt")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--corruptions", nargs="+", metavar="NAME", help="default: all 15 of ImageNet-C")
    parser.add_argument("--severities", nargs="+", type=_integer(1, 5), default=[1, 2, 3, 4, 5], metavar="N", help="default: 1 to 5")
    parser.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--subset", type=_integer(1), metavar="N", help="only N of the images, evenly spread; default: all")
    help_crop = "first scale and crop as ImageNet-C was made (224); default: whole images"
    parser.add_argument("--crop", type=_integer(8, 8192), metavar="PIXELS", help=help_crop)
    help_side = "enlarge smaller images to this shorter side while they are corrupted: milder for them (default: %(default)s)"
    parser.add_argument("--work-side", type=_integer(32, 8192), default=32, metavar="PIXELS", help=help_side)
    parser.add_argument("--workers", type=_integer(1, 256), metavar="N", default=NUM_CORES, help="processes (default: %(default)s)")


def _corrupt(options: argparse.Namespace) -> int:
    from data_prep.corrupt import CORRUPTIONS, write_corrupted

    corruptions = options.corruptions or CORRUPTIONS
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise ConfigError(f"--corruptions: {name!r} is none of {', '.join(CORRUPTIONS)}", do="choose among them")
    written = write_corrupted(
        options.source,
        options.output,
        corruptions=corruptions,
        severities=options.severities,
        seed=options.seed,
        crop=options.crop,
        work_side=options.work_side,
        subset=options.subset,
        num_workers=options.workers,
    )
    for info in written:
        _print([info])
    return 0


def _imagenet_c(options: argparse.Namespace) -> int:
    from data_prep.corrupt import write_imagenet_c

    for info in write_imagenet_c(options.source, options.output, num_workers=NUM_CORES):
        _print([info])
    return 0


def _cifar_c(options: argparse.Namespace) -> int:
    from data_prep.corrupt import write_cifar_c

    for info in write_cifar_c(options.source, options.output, like=options.like, num_workers=NUM_CORES):
        _print([info])
    return 0


def _fashion_mnist(options: argparse.Namespace) -> int:
    from data_prep.fashion_mnist import write_fashion_mnist

    _print(write_fashion_mnist(options.output, source=options.source, num_workers=NUM_CORES))
    return 0


def _image_folder(options: argparse.Namespace) -> int:
    if (options.write_mode == "smart") != (options.smart_threshold is not None):
        do = "give both, for instance --write-mode smart --smart-threshold 206432"
        raise ConfigError(
            "--write-mode smart and --smart-threshold belong together (without a threshold ffcv stores everything raw)", do=do
        )
    from data_prep.image_folder import write_image_folders
    from data_prep.images import ImageOptions

    infos = write_image_folders(
        options.output,
        train=options.train,
        val=options.val,
        options=ImageOptions(
            write_mode=options.write_mode,
            max_resolution=options.max_resolution,
            smart_threshold=options.smart_threshold,
            jpeg_quality=options.jpeg_quality,
            compress_probability=options.compress_probability,
        ),
        subset=options.subset,
        skip_bad=options.skip_bad,
        num_workers=options.workers,
        chunk_size=options.chunk_size,
    )
    _print(infos)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_prep.progress import show_progress
    from pipeline.data.beton import build_sidecar, save_sidecar, sidecar_path, verify

    for path in options.files:
        with show_progress(f"checking {path.name}", "pages") as report:
            if options.write_sidecar:
                if sidecar_path(path).exists():
                    raise DataError(
                        f"{path}: has a sidecar already", do="verify it with --deep, or remove the sidecar if it is not to count"
                    )
                origin = {"kind": "unknown"}  # written elsewhere: neither its sources nor its parameters are known
                classes = None if options.classes is None else [str(label) for label in range(options.classes)]
                save_sidecar(path, build_sidecar(path, classes=classes, writer=origin, source=origin, on_progress=report))
            level = 2 if options.deep and not options.write_sidecar else 1
            info = verify(path, level=level, num_classes=options.classes, on_progress=report)
        _print([info])
    return 0


def _print(infos: list[BetonInfo]) -> None:
    for info in infos:
        size = f"{info.image_mode} images of up to {info.max_width}×{info.max_height} pixels"
        print(f"{info.path}: {info.num_samples} samples, {info.num_classes} classes, {size}, digest {info.digest[:16]}")


def _integer(minimum: int, maximum: int = 1 << 40) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            upper = "" if maximum == 1 << 40 else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {minimum}{upper}")
        return int(text)

    return parse


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
