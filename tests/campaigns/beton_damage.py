"""Damage a .beton file at random: which level of verification finds what, and what the loader does.

    python -m tests.campaigns.beton_damage [--num 500] [--seed 0] [--no-loader]

With its sidecar, every damaged file must be refused by level 0, 1 or 2. Without a sidecar, the file
alone is checked (``build_sidecar``), and files that pass are read by the evaluation loader in its
own process, which must neither die nor hang. Exits with 1 if a damaged file with a sidecar is
accepted, or if the loader dies or hangs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from pipeline.datasets.beton_format import ALLOCATION, METADATA_START, SAMPLE, Tables, read_tables
from pipeline.datasets.sidecar import build_sidecar, sidecar_path, verify
from pipeline.errors import DataError

NUM_IMAGES, SIDE, CLASSES = 80, 256, ["a", "b", "c"]  # 2 pages of 8 MiB
LOADER_SECONDS = 120.0  # for one file; includes compilation for the first
BLOCK = 4096  # bytes that a torn write loses


class Photographs:
    """Crops of a photograph; label = index mod 3."""

    def __init__(self) -> None:
        from sklearn.datasets import load_sample_image

        self.photograph = load_sample_image("china.jpg")

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        top, left = np.random.default_rng(index).integers(0, (427 - SIDE, 640 - SIDE))
        return np.ascontiguousarray(self.photograph[top : top + SIDE, left : left + SIDE]), index % 3


def make_file(folder: Path) -> Path:
    """Write a file with half of the images raw, half JPEG."""
    from data_prep.images import ImageOptions
    from data_prep.writer import write_beton

    path = folder / "whole.beton"
    write_beton(path, Photographs(), classes=CLASSES, options=ImageOptions("proportion"), source={}, num_workers=1)
    return path


@dataclass(frozen=True)
class Regions:
    """The regions of the file, each as (first byte, end)."""

    tables: Tables
    size: int

    def pick(self, kind: str, draw: random.Random) -> int:
        """Draw the position of a byte of this kind."""
        if kind in ("raw image", "JPEG image"):
            of_kind = np.flatnonzero((self.tables.samples["image"]["mode"] == 0) == (kind == "JPEG image"))
            sample = int(of_kind[draw.randrange(len(of_kind))])
            return int(self.tables.pointer[sample]) + draw.randrange(int(self.tables.size[sample]))
        start, end = {
            "header": (0, METADATA_START),
            "sample table": (METADATA_START, METADATA_START + NUM_IMAGES * SAMPLE.itemsize),
            "allocation table": (self.size - NUM_IMAGES * ALLOCATION.itemsize, self.size),
            "anywhere": (0, self.size),
        }[kind]
        return draw.randrange(start, end)


KINDS = (
    "header",
    "sample table",
    "allocation table",
    "raw image",
    "JPEG image",
    "anywhere",
    "lost block",
    "truncated",
    "appended",
)


def damage(content: bytearray, kind: str, regions: Regions, draw: random.Random) -> bytearray:
    """Return a damaged copy.

    1 to 8 bytes are changed, a block is set to zero, the end is cut off, or bytes are appended.
    """
    if kind == "truncated":
        return content[: draw.randrange(len(content))]
    if kind == "appended":
        return content + draw.randbytes(draw.randint(1, 64))
    damaged = bytearray(content)
    if kind == "lost block":
        start = regions.pick(draw.choice(KINDS[:6]), draw) // BLOCK * BLOCK
        damaged[start : start + BLOCK] = bytes(len(damaged[start : start + BLOCK]))
    else:
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[regions.pick(kind, draw)] ^= draw.randrange(1, 256)
    return damaged if damaged != content else damage(content, kind, regions, draw)


def refused_by(path: Path) -> str:
    """Return the first level that refuses the file: ``0``, ``1``, ``2`` or ``none``."""
    for level in (0, 1, 2):
        try:
            verify(path, level=level)
        except DataError:
            return str(level)
    return "none"


def passes_without_sidecar(path: Path) -> bool:
    try:
        build_sidecar(path, classes=CLASSES, writer={}, source={})
    except DataError:
        return False
    return True


def _load(jobs: Connection) -> None:
    """Run the loader's process: read each file that it is sent, and answer with a word."""
    import torch

    from pipeline.config.schema import DataConfig
    from pipeline.data.loaders import open_eval_loader

    data = DataConfig(train="", val="", eval_resolution=64, num_workers=1, batch_timeout_seconds=20.0)
    loader = None
    while (path := jobs.recv()) is not None:
        if loader is None:
            loader = open_eval_loader(path, data, batch=16, device=torch.device("cpu"), channels_last=True)
        else:
            loader.switch_to(path)
        try:
            jobs.send(f"{sum(len(ids) for ids, _, _ in loader.batches())} images")
        except DataError:
            jobs.send("refused")


@contextmanager
def loader_process() -> Iterator[Callable[[Path], str]]:
    """Yield a function that reads a file: ``… images``, ``refused``, ``died`` or ``hung``."""
    context = multiprocessing.get_context("spawn")
    running: list[tuple[Connection, BaseProcess]] = []

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=_load, args=(there,), daemon=True)
        process.start()
        there.close()
        running.append((here, process))

    def end() -> None:
        _, process = running.pop()
        process.kill()
        process.join()

    def read(path: Path) -> str:
        if not running:
            start()
        try:
            running[0][0].send(path)
            if running[0][0].poll(LOADER_SECONDS):
                return str(running[0][0].recv())
            outcome = "hung"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            outcome = "died"
        end()
        return outcome

    try:
        yield read
    finally:
        if running:
            end()


def run(*, num: int, seed: int, with_loader: bool) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Count (kind, level that refused) with a sidecar, and outcomes of the files without one."""
    draw = random.Random(seed)
    caught: Counter[tuple[str, str]] = Counter()
    alone: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary, loader_process() as read:
        whole = make_file(Path(temporary))
        content = bytearray(whole.read_bytes())
        regions = Regions(read_tables(whole), len(content))
        path = Path(temporary, "damaged.beton")
        shutil.copy(sidecar_path(whole), sidecar_path(path))
        for index in range(num):
            kind = KINDS[index % len(KINDS)]
            path.write_bytes(damage(content, kind, regions, draw))
            caught[kind, refused_by(path)] += 1
            passes = passes_without_sidecar(path)
            alone["refused" if not passes else f"passed; loader: {read(path)}" if with_loader else "passed"] += 1
            path.unlink()  # a new file each time, as the loader may have this one mapped
    return caught, alone


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num", type=int, default=500, metavar="N", help="number of damaged files (default: 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the damage (default: 0)")
    parser.add_argument(
        "--no-loader", action="store_true", help="do not load files that pass the checks without a sidecar"
    )
    given = parser.parse_args()
    caught, alone = run(num=given.num, seed=given.seed, with_loader=not given.no_loader)
    print(f"{'with sidecar':18}{'level 0':>9}{'level 1':>9}{'level 2':>9}{'accepted':>10}")
    for kind in KINDS:
        print(
            f"{kind:18}"
            + "".join(
                f"{caught[kind, level]:>{width}}" for level, width in (("0", 9), ("1", 9), ("2", 9), ("none", 10))
            )
        )
    num_caught = sum(count for (_, level), count in caught.items() if level != "none")
    print(
        f"refused {num_caught}/{given.num}\nwithout sidecar: "
        + ", ".join(f"{what} {count}" for what, count in sorted(alone.items()))
    )
    is_sound = num_caught == given.num and not any("died" in what or "hung" in what for what in alone)
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
