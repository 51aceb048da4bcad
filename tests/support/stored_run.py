"""The run of version 0.1 in ``tests/fixtures/version_0_1``, with the images that it was trained on."""

from __future__ import annotations

import lzma
import shutil
import struct
import zlib
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = FIXTURES / "version_0_1"
STORED_ADAMW = FIXTURES / "version_0_1_adamw"
SIDE = 8  # pixels


def restore(folder: Path) -> None:
    """Put the stored run and its images into ``folder``, which is to be the current one when the run resumes."""
    shutil.copytree(STORED / "run", folder / "run")
    make_images(folder / "data")


def unpack_beton(folder: Path) -> Path:
    """Write the .beton files of the second run with their sidecars, and return their folder."""
    beton = folder / "beton"
    shutil.copytree(STORED_ADAMW / "beton", beton)
    for packed in beton.glob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    return beton


def make_images(data: Path) -> None:
    """``data``/train with 32 images and ``data``/val with 8, of two classes."""
    for split, numbers in (("train", range(32)), ("val", range(32, 40))):
        for number in numbers:
            label = number % 2
            pixels = bytes(
                (17 * number + 31 * label * (index // 3 % 8 // 4) + 5 * index * (number % 5 + 1)) % 256
                for index in range(3 * SIDE * SIDE)
            )
            path = data / split / f"class-{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(pixels))


def _png(pixels: bytes) -> bytes:
    """A PNG file without compression, whose size does not depend on the version of zlib."""
    rows = b"".join(b"\0" + pixels[3 * SIDE * y : 3 * SIDE * (y + 1)] for y in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
