"""Options shared by the commands of data_prep, and how to read them. Standard library only."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.command_line import local_path, number, whole_number
from pipeline.errors import ConfigError
from pipeline.limits import usable_cpus

if TYPE_CHECKING:
    from data_prep.arrays import ArrayOptions
    from data_prep.image_files import WriteOptions

NUM_CORES = usable_cpus()
WRITE_MODES = ("smart", "raw", "jpg", "proportion")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``."""
    parser.add_argument(
        "--output",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder to write the files to; it is created if it does not exist",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``."""
    parser.add_argument(
        "--workers",
        type=whole_number(1, 256),
        metavar="N",
        default=NUM_CORES,
        help="number of processes (default: number of usable CPUs, here %(default)s)",
    )


def add_array_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that writes arrays; ``array_options`` reads them."""
    add_output(parser)
    parser.add_argument(
        "--subset",
        type=whole_number(1),
        metavar="N",
        help="write only N images per split, drawn at random, equally from all classes (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of the random choices of this command (default: %(default)s)",
    )
    parser.add_argument(
        "--hold-out",
        type=whole_number(1),
        metavar="N",
        help="write N training images to held_out.beton instead of train.beton, drawn at random, equally from all "
        "classes (default: none)",
    )
    parser.add_argument(
        "--chunk-size",
        type=whole_number(1),
        metavar="N",
        default=100,
        help="number of images that a process takes at a time (default: %(default)s)",
    )
    add_workers(parser)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that writes image files; ``write_options`` reads them."""
    add_array_options(parser)
    parser.add_argument(
        "--write-mode",
        choices=WRITE_MODES,
        default="proportion",
        help="how to store the images; raw: as pixels; jpg: as JPEG; proportion: a share of them as JPEG and the "
        "others as pixels; smart: large ones as JPEG and the others as pixels (default: %(default)s)",
    )
    help_probability = (
        "with --write-mode proportion: share of the images to store as JPEG, from 0 to 1, chosen at random "
        "(default: %(default)s)"
    )
    parser.add_argument("--compress-probability", type=number(0, 1), metavar="P", default=0.5, help=help_probability)
    help_threshold = (
        "with --write-mode smart, which needs it: an image whose pixels take more bytes than this is stored as JPEG"
    )
    parser.add_argument("--smart-threshold", type=whole_number(1), metavar="BYTES", help=help_threshold)
    help_resolution = "shrink larger images so that their longer side has this many pixels (default: %(default)s)"
    parser.add_argument(
        "--max-resolution", type=whole_number(1, 8192), metavar="PIXELS", default=500, help=help_resolution
    )
    parser.add_argument(
        "--jpeg-quality",
        type=whole_number(1, 100),
        metavar="Q",
        default=90,
        help="quality of the images that are stored as JPEG, from 1 to 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="leave out up to N unusable image files; fail if there are more (default: %(default)s)",
    )
    help_upright = "rotate or mirror images as their EXIF orientation says (default: ignore it, as torchvision does)"
    parser.add_argument("--upright", action="store_true", help=help_upright)


def array_options(options: argparse.Namespace) -> ArrayOptions:
    """Read the options that ``add_array_options`` added."""
    from data_prep.arrays import ArrayOptions

    return ArrayOptions(
        num_workers=options.workers,
        chunk_size=options.chunk_size,
        subset=options.subset,
        seed=options.seed,
        hold_out=options.hold_out,
    )


def write_options(options: argparse.Namespace) -> WriteOptions:
    """Read the options that ``add_image_options`` added.

    Raises:
        ConfigError: two of them contradict each other.
    """
    if (options.write_mode == "smart") != (options.smart_threshold is not None):
        do = "pass both, for instance --write-mode smart --smart-threshold 206432"
        raise ConfigError(
            "--write-mode smart and --smart-threshold need each other (without a threshold ffcv stores everything raw)",
            do=do,
        )
    from data_prep.image_files import WriteOptions
    from data_prep.images import ImageOptions

    images = ImageOptions(
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        smart_threshold=options.smart_threshold,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
    )
    return WriteOptions(
        images,
        subset=options.subset,
        seed=options.seed,
        hold_out=options.hold_out,
        skip_bad=options.skip_bad,
        is_upright=options.upright,
        num_workers=options.workers,
        chunk_size=options.chunk_size,
    )
