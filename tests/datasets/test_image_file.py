"""Metadata never decide over pixels: sound pixels are taken whatever stands beside them, by every reader."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pipeline.data.augment import Augmentation, whole_box
from pipeline.data.folder import FolderSource
from pipeline.datasets.image_file import ImageFile, decode_rgb, load_rgb, read_facts, split_metadata

HEIGHT, WIDTH = 40, 64


def photograph() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((WIDTH, HEIGHT))


def saved(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    photograph().save(content, kind, **options)
    return content.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(*segments: bytes, plain: bytes | None = None) -> bytes:
    content = plain or saved("JPEG")
    return content[:2] + b"".join(segments) + content[2:]


def chunk(kind: bytes, body: bytes, *, is_right: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not is_right))


def with_chunk(*chunks: bytes, is_behind: bool = False) -> bytes:
    content = saved("PNG")
    at = len(content) - 12 if is_behind else 33  # before IEND, or behind IHDR
    return content[:at] + b"".join(chunks) + content[at:]


def tiff(*entries: bytes, data: bytes = b"") -> bytes:
    """EXIF data: entries (tag, type, count, value), then what they point to."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + data


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


SIDEWAYS = entry(0x0112, 3, 1, 6)
EXIF = b"Exif\0\0"
TEXT = b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)

# Name, file, and whether its orientation says that it lies on its side.
FILES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "a tag that cannot be written back": (
        lambda: with_segments(
            segment(0xE1, EXIF + tiff(SIDEWAYS, entry(0x013B, 10, 1, 38), data=struct.pack("<ii", -1, 0)))
        ),
        True,
    ),
    "EXIF twice": (lambda: with_segments(segment(0xE1, EXIF + EXIF + tiff(SIDEWAYS))), True),
    "EXIF of garbage": (
        lambda: with_segments(segment(0xE1, EXIF + b"II*\0\x08\0\0\0\xff\xff" + bytes(63))),
        False,
    ),
    "EXIF without its end": (lambda: with_segments(segment(0xE1, EXIF + tiff(SIDEWAYS)[:13])), False),
    "a resolution that divides by zero": (
        lambda: with_segments(
            segment(0xE1, EXIF + tiff(entry(0x011A, 5, 1, 26), entry(0x0128, 3, 1, 2), data=bytes(8))),
            plain=saved("JPEG")[:2] + saved("JPEG")[20:],  # without JFIF, whose resolution would be taken
        ),
        False,
    ),
    "an orientation in words": (lambda: with_segments(segment(0xE1, EXIF + tiff(entry(0x0112, 2, 4, 0x36)))), False),
    "an orientation of 9": (lambda: with_segments(segment(0xE1, EXIF + tiff(entry(0x0112, 3, 1, 9)))), False),
    "a list of pictures that is damaged": (lambda: with_segments(segment(0xE2, b"MPF\0" + tiff(SIDEWAYS))), False),
    "Photoshop's data, cut": (lambda: with_segments(segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0")), False),
    "a profile in 60 parts": (
        lambda: with_segments(*[segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 9]) + bytes(60_000)) for i in range(60)]),
        False,
    ),
    "JFIF, cut": (lambda: with_segments(segment(0xE0, b"JFIF\0")), False),
    "Adobe, cut": (lambda: with_segments(segment(0xEE, b"Adobe")), False),
    "a text of 3 MB": (lambda: with_chunk(chunk(b"zTXt", TEXT)), False),
    "a text of 3 MB behind the pixels": (lambda: with_chunk(chunk(b"zTXt", TEXT), is_behind=True), False),
    "texts of 80 MB": (lambda: with_chunk(*[chunk(b"tEXt", b"k\0" + bytes(1_000_000))] * 80), False),
    "a profile of 3 MB": (lambda: with_chunk(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000)))), False),
    "a profile that is not compressed": (lambda: with_chunk(chunk(b"iCCP", b"icc\0\0" + b"garbage")), False),
    "a comment with a wrong checksum": (lambda: with_chunk(chunk(b"tEXt", b"k\0v", is_right=False)), False),
    "a text without an end": (lambda: with_chunk(chunk(b"iTXt", b"k\0\1\0\0\0garbage")), False),
    "a resolution of no bytes": (lambda: with_chunk(chunk(b"pHYs", b"")), False),
    "transparency of no bytes": (lambda: with_chunk(chunk(b"tRNS", b"")), False),
    "EXIF in a PNG": (lambda: with_chunk(chunk(b"eXIf", tiff(SIDEWAYS))), True),
    "EXIF behind the pixels": (lambda: with_chunk(chunk(b"eXIf", tiff(SIDEWAYS)), is_behind=True), True),
    "EXIF of garbage in a PNG": (lambda: with_chunk(chunk(b"eXIf", b"II*\0garbage")), False),
}


@pytest.mark.parametrize("name", FILES)
def test_sound_pixels_are_taken(name: str, tmp_path: Path) -> None:
    make, is_sideways = FILES[name]
    content = make()
    plain = np.asarray(Image.open(io.BytesIO(saved("PNG" if content[:1] == b"\x89" else "JPEG"))))
    path = tmp_path / "class" / "image.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    facts = read_facts(ImageFile(path), 500)
    assert (facts.height, facts.width) == (HEIGHT, WIDTH)
    assert facts.is_turned == is_sideways
    assert np.array_equal(load_rgb(ImageFile(path))[0], plain)
    upright, _ = load_rgb(ImageFile(path), is_upright=True)
    assert np.array_equal(upright, np.rot90(plain, -1) if is_sideways else plain)
    source = FolderSource(tmp_path, Augmentation(whole_box), resolution=32, num_workers=1, timeout_seconds=60)
    ((images, _),) = source.batches(np.zeros(1, np.int64), batch=1, key=0, resolution=32)
    path.write_bytes(saved("PNG" if content[:1] == b"\x89" else "JPEG"))
    ((expected, _),) = source.batches(np.zeros(1, np.int64), batch=1, key=0, resolution=32)
    assert images.equal(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_orientation_is_turned_as_pillow_turns_it(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode_rgb(content, is_upright=True), np.asarray(expected))


def test_nothing_that_decides_over_pixels_is_left_out() -> None:
    """CMYK by Adobe's segment, palettes, interlacing, progressive scans, and bytes behind the end."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x")
    grey = photograph().convert("L")
    files = [saved("JPEG", progressive=True, comment=b"x" * 60_000) + b"garbage", saved("PNG", pnginfo=text) + b"more"]
    for image, kind, options in (
        (photograph().convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", {"restart_marker_blocks": 1}),
        (photograph().quantize(16), "PNG", {"transparency": bytes(range(16))}),
        (photograph().convert("RGBA"), "PNG", {}),
        (grey.convert("1"), "PNG", {}),
    ):
        content = io.BytesIO()
        image.save(content, kind, **options)
        files.append(content.getvalue())
    for content in files:
        assert np.array_equal(decode_rgb(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        assert len(split_metadata(content)[0]) <= len(content)
    for content in (b"", b"\xff", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1\0\0", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xff"):
        assert split_metadata(content) == (content, b"")  # too short to be understood: left to the decoder
