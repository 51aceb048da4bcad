"""How images are stored, and how one image is read: distrustfully, with its size capped, as JPEG or PNG and nothing else."""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 100_000_000  # the largest photograph of ImageNet has 61 million
HEAD_BYTES = 16 << 10  # holds the header of most images
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
)  # 8 bits per channel: converting these to RGB loses nothing seen
PNG_BIT_DEPTH = 24  # offset of the byte that says 16; Pillow would cut such pixels to 8 bits in silence
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageOptions:
    """How ffcv's RGBImageField stores an image; names and meaning are the field's."""

    write_mode: str = "raw"
    max_resolution: int | None = None
    smart_threshold: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5


class BadImage(Exception):
    """Why a file cannot be used as an image."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of one image lie: a whole file, or a stretch of an archive."""

    path: Path
    member: str = ""  # its name in the archive
    start: int = 0
    num_bytes: int | None = None  # None: to the end of the file

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the header of an image says. ``is_turned``: its EXIF data asks viewers to turn or mirror it."""

    width: int
    height: int
    is_turned: bool


def look(source: Source, max_resolution: int) -> ImageFacts:
    """Judge an image by its header, without decoding it. Raises BadImage."""
    content = _read(source, HEAD_BYTES)
    try:
        image = _open(content)
    except BadImage:
        if len(content) < HEAD_BYTES:
            raise
        image = _open(_read(source))  # the header may be longer
    width, height = image.size
    if min(width, height) * max_resolution < max(width, height):
        raise BadImage(f"{width}×{height} pixels leave nothing of the short side at {max_resolution}")
    return ImageFacts(width, height, _is_turned(image))


def load_rgb(source: Source, *, is_upright: bool = False) -> tuple[np.ndarray, bytes]:
    """The pixels of an image, uint8 [height, width, 3], and the sha256 of its file; grey, palette and CMYK are converted. Raises BadImage.

    Stored as the file has it, like torchvision does; ``is_upright`` turns it as its EXIF data ask for.
    """
    content = _read(source)
    image = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = ImageOps.exif_transpose(image) if is_upright else image
            return np.asarray(pixels.convert("RGB")), hashlib.sha256(
                content
            ).digest()  # decodes; raises when the file is cut short
    except Exception as error:  # Pillow's decoders raise many kinds on damaged input
        raise BadImage(f"cannot be decoded: {error}") from error


def _is_turned(image: Image.Image) -> bool:
    if "exif" not in image.info:  # asked first: Pillow would decode a PNG to look behind its pixels
        return False
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    except Exception:  # damaged metadata are no reason to refuse an image
        return False


def _read(source: Source, num_bytes: int | None = None) -> bytes:
    try:
        status = source.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        size = status.st_size - source.start if source.num_bytes is None else source.num_bytes
        if size == 0:
            raise BadImage("empty")
        if size > MAX_FILE_BYTES:
            raise BadImage(f"{size >> 20} MiB, more than {MAX_FILE_BYTES >> 20}")
        with source.path.open("rb", buffering=0) as file:
            file.seek(source.start)
            return file.read(size if num_bytes is None else min(size, num_bytes))
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def _open(content: bytes) -> Image.Image:
    """An image whose header is acceptable, not decoded yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns of harmless oddities in metadata, and of sizes that are judged here
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise BadImage("not a JPEG or PNG image") from None
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS}")
    is_png = image.format == "PNG"
    if image.mode not in MODES or (is_png and content[PNG_BIT_DEPTH] == 16):
        raise BadImage(f"mode {image.mode}, more than 8 bits per channel")
    if is_png and getattr(
        image, "is_animated", False
    ):  # the further pictures that cameras put into a JPEG are left out
        raise BadImage("animated")
    return image
