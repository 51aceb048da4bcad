"""``python -m data_prep``: write, verify and stage FFCV data sets.

Slow imports wait until the arguments have been checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from data_prep import doctor
from data_prep.options import (
    add_array_options,
    add_image_options,
    add_output,
    add_workers,
    array_options,
    write_options,
)
from pipeline.command_line import (
    ArgumentParser,
    add_version,
    commands_of,
    error_line,
    local_path,
    run_command,
    whole_number,
)
from pipeline.errors import ConfigError, DataError
from pipeline.terminal.live import line
from pipeline.terminal.streams import guard_output

if TYPE_CHECKING:
    from pipeline.datasets.sidecar import BetonInfo

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(BaseException):
    """Raised when a signal asks the command to stop."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error that a user can cause is one line on stderr."""
    guard_output()
    line.open(sys.stderr)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    before = {number: signal.signal(number, _stop) for number in STOPPING}  # so that partial files are removed
    try:
        return run_command(build_parser, arguments)
    except Stopped as stopped:
        code = 128 + stopped.signal
        print(error_line(code, f"stopped by {stopped.signal.name}", do="start it again"), file=sys.stderr)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
    raise Stopped(number)


def build_parser() -> ArgumentParser:
    """Build the parser of all commands."""
    parser = ArgumentParser(
        prog="python -m data_prep", description="Write, verify and stage FFCV data sets.", allow_abbrev=False
    )
    add_version(parser)
    command = commands_of(parser)
    both = "OUTPUT/train.beton and OUTPUT/val.beton"
    imagenet = command("imagenet", _imagenet, f"convert ImageNet (ILSVRC 2012), as archives or unpacked, to {both}")
    help_imagenet = (
        "folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or with the "
        "folders train (one folder per class) and val (the same, or all images in one folder)"
    )
    imagenet.add_argument("--source", type=local_path, required=True, metavar="FOLDER", help=help_imagenet)
    help_truth = (
        "labels of the val images: the devkit (archive or folder) or LOC_val_solution.csv; needed if --source contains "
        "neither of them and the val images are not in class folders"
    )
    imagenet.add_argument("--ground-truth", type=local_path, metavar="PATH", help=help_truth)
    add_image_options(imagenet)
    folder = command("image-folder", _image_folder, f"convert folders of images, one per class, to {both}")
    for name in ("train", "val"):
        help_split = f"folder of the {name} split, with one folder of images for each class"
        folder.add_argument(f"--{name}", type=local_path, required=True, metavar="FOLDER", help=help_split)
    add_image_options(folder)
    for num_classes in (10, 100):
        cifar = command(f"cifar{num_classes}", _cifar, f"convert CIFAR-{num_classes} to {both}")
        help_cifar = (
            f"cifar-{num_classes}-binary.tar.gz, cifar-{num_classes}-python.tar.gz, or the unpacked folder of either"
        )
        cifar.add_argument("--source", type=local_path, required=True, metavar="PATH", help=help_cifar)
        cifar.set_defaults(num_classes=num_classes)
        add_array_options(cifar)
    fashion = command("fashion-mnist", _fashion_mnist, f"convert Fashion-MNIST to {both}")
    help_source = "folder with the four IDX files, gzipped or not (default: %(default)s)"
    fashion.add_argument("--source", type=local_path, metavar="FOLDER", default=doctor.FASHION_MNIST, help=help_source)
    add_array_options(fashion)
    emoji = command("emoji", _emoji, f"convert the emoji of five npm packages to {both}")
    emoji.add_argument(
        "--source",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder with the five .tgz files that npm pack saves; the error about a missing one says how",
    )
    add_array_options(emoji)

    split = command(
        "split-folder",
        _split_folder,
        "split a folder of training images into OUTPUT/train and OUTPUT/held_out, which contain hard links to the "
        "images, or copies where hard links are not possible",
    )
    split.add_argument(
        "--train",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder of the train split, with one folder of images for each class",
    )
    add_output(split)
    split.add_argument(
        "--hold-out",
        type=whole_number(1),
        required=True,
        metavar="N",
        help="number of images to hold out, drawn at random, equally from all classes",
    )
    split.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of the random choices of this command (default: %(default)s)",
    )
    _add_corrupt(
        command("corrupt", _corrupt, "write corrupted copies of a .beton file to OUTPUT/<corruption>-<severity>.beton")
    )
    imagenet_c = command(
        "imagenet-c", _imagenet_c, "convert ImageNet-C, as published, to OUTPUT/<corruption>-<severity>.beton"
    )
    cifar_c = command(
        "cifar-c",
        _cifar_c,
        "convert CIFAR-10-C or CIFAR-100-C, as published, to OUTPUT/<corruption>-<severity>.beton",
    )
    for published, layout in (
        (imagenet_c, "the images, as <corruption>/<severity>/<class>/<image>"),
        (cifar_c, "one <corruption>.npy for each corruption, and labels.npy"),
    ):
        published.add_argument(
            "--source", type=local_path, required=True, metavar="FOLDER", help=f"folder with {layout}"
        )
        add_output(published)
        add_workers(published)
    cifar_c.add_argument(
        "--like",
        type=local_path,
        required=True,
        metavar="FILE",
        help=".beton file of the clean data set, whose class names are used",
    )

    verify = command(
        "verify",
        _verify,
        "check each .beton file against its sidecar (FILE.json, which holds sizes and hashes): size, hash of the "
        "tables, and layout of every sample",
    )
    verify.add_argument("files", type=local_path, nargs="+", metavar="FILE", help=".beton file to check")
    verify.add_argument(
        "--deep",
        action="store_true",
        help="also check the hash of every page (a block of image data, usually 8 MiB) and decode every JPEG strictly",
    )
    verify.add_argument(
        "--classes",
        type=whole_number(1),
        metavar="N",
        help="refuse a file with more than N classes (default: not checked)",
    )
    help_sidecar = "for a file without a sidecar: check all that can be checked without one, then write FILE.json"
    verify.add_argument("--write-sidecar", action="store_true", help=help_sidecar)
    stage = command(
        "stage",
        _stage,
        "copy .beton files with their sidecars (FILE.json) to a local disk of this node and check every byte; "
        "copies that already exist are kept",
    )
    stage.add_argument("files", type=local_path, nargs="+", metavar="FILE", help=".beton file to copy")
    add_output(stage)
    help_deep = "also check every page (a block of image data, usually 8 MiB) of copies that already exist"
    stage.add_argument("--deep", action="store_true", help=help_deep)
    info = command(
        "info",
        _info,
        "print what .beton files contain and how they were written, after a quick check of their size and tables",
    )
    info.add_argument("files", type=local_path, nargs="+", metavar="FILE", help=".beton file to describe")
    info.add_argument("--json", action="store_true", help="print one JSON object per file, each on its own line")
    command("doctor", lambda _: doctor.run(), "list missing system packages and print the command that installs them")
    return parser


def _add_corrupt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=local_path, required=True, metavar="FILE", help=".beton file to corrupt")
    add_output(parser)
    help_corruptions = "corruptions to apply, such as fog or motion_blur (default: all 15 of ImageNet-C)"
    parser.add_argument("--corruptions", nargs="+", metavar="NAME", help=help_corruptions)
    parser.add_argument(
        "--severities",
        nargs="+",
        type=whole_number(1, 5),
        default=[1, 2, 3, 4, 5],
        metavar="N",
        help="severities to write, from 1 (mild) to 5 (severe) (default: all five)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of the corruptions that are random, such as noise (default: %(default)s)",
    )
    parser.add_argument(
        "--subset",
        type=whole_number(1),
        metavar="N",
        help="corrupt only N images, evenly spaced over the file (default: all)",
    )
    help_crop = (
        "first scale and crop each image to a square with sides of this many pixels; ImageNet-C used 224 "
        "(default: use whole images)"
    )
    parser.add_argument("--crop", type=whole_number(8, 8192), metavar="PIXELS", help=help_crop)
    help_side = (
        "enlarge smaller images so that their shorter side has this many pixels while they are corrupted, which makes "
        "the corruption milder (default: %(default)s)"
    )
    parser.add_argument("--work-side", type=whole_number(32, 8192), default=32, metavar="PIXELS", help=help_side)
    add_workers(parser)


def _imagenet(options: argparse.Namespace) -> int:
    write = write_options(options)
    from data_prep.imagenet import write_imagenet

    return _print(
        write_imagenet(options.output, source=options.source, ground_truth=options.ground_truth, options=write)
    )


def _image_folder(options: argparse.Namespace) -> int:
    write = write_options(options)
    from data_prep.image_folder import write_image_folders

    return _print(write_image_folders(options.output, train=options.train, val=options.val, options=write))


def _cifar(options: argparse.Namespace) -> int:
    from data_prep.cifar import write_cifar

    return _print(
        write_cifar(
            options.output, source=options.source, num_classes=options.num_classes, options=array_options(options)
        )
    )


def _fashion_mnist(options: argparse.Namespace) -> int:
    from data_prep.fashion_mnist import write_fashion_mnist

    return _print(write_fashion_mnist(options.output, source=options.source, options=array_options(options)))


def _emoji(options: argparse.Namespace) -> int:
    from data_prep.emoji import write_emoji

    return _print(write_emoji(options.output, source=options.source, options=array_options(options)))


def _split_folder(options: argparse.Namespace) -> int:
    from data_prep.split_folder import split_folder

    folders = split_folder(options.output, train=options.train, number=options.hold_out, seed=options.seed)
    for info in folders:
        print(f"{info.path}: {info.num_samples} samples, {info.num_classes} classes, digest {info.digest[:16]}")
    return 0


def _corrupt(options: argparse.Namespace) -> int:
    from data_prep.corrupt import CORRUPTIONS, write_corrupted

    corruptions = options.corruptions or CORRUPTIONS
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise ConfigError(f"--corruptions: {name!r} is not one of {', '.join(CORRUPTIONS)}", do="choose from these")
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
    return _print(written)


def _imagenet_c(options: argparse.Namespace) -> int:
    from data_prep.corrupt import write_imagenet_c

    return _print(write_imagenet_c(options.source, options.output, num_workers=options.workers))


def _cifar_c(options: argparse.Namespace) -> int:
    from data_prep.corrupt import write_cifar_c

    return _print(write_cifar_c(options.source, options.output, like=options.like, num_workers=options.workers))


def _verify(options: argparse.Namespace) -> int:
    from pipeline.datasets.sidecar import build_sidecar, save_sidecar, sidecar_path, verify
    from pipeline.terminal.progress import show_progress

    for path in options.files:
        with show_progress(f"checking {path.name}", "pages") as report:
            if options.write_sidecar:
                if sidecar_path(path).exists():
                    raise DataError(
                        f"{path}: already has a sidecar",
                        do="verify the file with --deep, or remove the sidecar to write a new one",
                    )
                origin = {"kind": "unknown"}  # written elsewhere: sources and parameters are unknown
                classes = None if options.classes is None else [str(label) for label in range(options.classes)]
                save_sidecar(
                    path, build_sidecar(path, classes=classes, writer=origin, source=origin, on_progress=report)
                )
            level = 2 if options.deep and not options.write_sidecar else 1
            info = verify(path, level=level, num_classes=options.classes, on_progress=report)
        _print([info])
    return 0


def _stage(options: argparse.Namespace) -> int:
    from pipeline.datasets.stage import stage
    from pipeline.terminal.progress import show_progress

    for path in options.files:
        with show_progress(f"staging {path.name}", "pages") as report:
            info = stage(path, options.output, level=2 if options.deep else 0, on_progress=report)
        _print([info])
    return 0


def _info(options: argparse.Namespace) -> int:
    from pipeline.datasets.sidecar import verify

    for path in options.files:
        info = verify(path, level=0)
        known = {key: value for key, value in info.sidecar.items() if key not in ("page_sha256", "format")}
        if options.json:
            print(json.dumps({"path": str(path), "digest": info.digest, **known}, ensure_ascii=False))
            continue
        _print([info])
        shown = {
            "classes": ", ".join(info.classes[:5]) + (" …" if info.num_classes > 5 else ""),
            "size": f"{known['size_bytes']:,} bytes",
        }
        for name in ("images", "writer", "source"):
            shown[name] = ", ".join(f"{key} {value}" for key, value in known[name].items() if value is not None)
        for name, text in shown.items():
            print(f"  {name:8} {text}")
    return 0


def _print(infos: Iterable[BetonInfo]) -> int:
    """Print one line per file, as soon as the file is complete."""
    for info in infos:
        size = f"{info.image_mode} images of up to {info.max_width}×{info.max_height} pixels"
        print(
            f"{info.path}: {info.num_samples} samples, {info.num_classes} classes, {size}, digest {info.digest[:16]}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
