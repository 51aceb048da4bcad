"""Read one image as untrusted input: JPEG or PNG only, of limited size; and the options for storing it."""

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
HEAD_BYTES = 16 << 10  # the header of most images fits
# at most 8 bits per channel: converting these to RGB loses nothing visible
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PNG_BIT_DEPTH = 24  # offset of the bit depth; Pillow would silently cut 16-bit pixels to 8 bits
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageOptions:
    """How ffcv's RGBImageField stores an image; names and meanings are those of the field."""

    write_mode: str = "raw"
    max_resolution: int | None = None
    smart_threshold: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5


class BadImage(Exception):
    """Raised for a file that cannot be used as an image; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the bytes of one image lie: a whole file, or a range of an archive."""

    path: Path
    member: str = ""  # its name in the archive
    start: int = 0
    num_bytes: int | None = None  # None: to the end of the file

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the header of an image says."""

    width: int  # pixels
    height: int
    is_turned: bool  # its EXIF data tell viewers to rotate or mirror it


def read_facts(source: ImageSource, max_resolution: int) -> ImageFacts:
    """Read and check the header of an image, without decoding the pixels.

    Raises:
        BadImage: the header is not acceptable.
    """
    content = _read(source, HEAD_BYTES)
    try:
        image = _open(content)
    except BadImage:
        if len(content) < HEAD_BYTES:
            raise
        image = _open(_read(source))  # the header may be longer
    width, height = image.size
    if min(width, height) * max_resolution < max(width, height):
        raise BadImage(
            f"has {width}×{height} pixels, and its shorter side would shrink to 0 at --max-resolution {max_resolution}"
        )
    return ImageFacts(width, height, _is_turned(image))


def load_rgb(source: ImageSource, *, is_upright: bool = False) -> tuple[np.ndarray, bytes]:
    """Decode an image; grey, palette and CMYK images are converted to RGB.

    Args:
        source: where the image lies.
        is_upright: rotate and mirror the image as its EXIF orientation says; by default this is
            ignored, as torchvision does.

    Returns:
        The pixels, uint8 [height, width, 3], and the sha256 of the file.

    Raises:
        BadImage: the file is not a usable image.
    """
    content = _read(source)
    image = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = ImageOps.exif_transpose(image) if is_upright else image
            rgb = np.asarray(pixels.convert("RGB"))  # decodes; raises when the file is truncated
            return rgb, hashlib.sha256(content).digest()
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged input
        raise _not_decoded(error) from error


def _not_decoded(error: Exception) -> BadImage:
    return BadImage("is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}")


def _is_turned(image: Image.Image) -> bool:
    if "exif" not in image.info:  # getexif() would decode a PNG to find EXIF data behind the pixels
        return False
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    except Exception:  # an image with damaged metadata is still usable
        return False


def _read(source: ImageSource, num_bytes: int | None = None) -> bytes:
    try:
        status = source.path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("is a folder, expected an image; move its images into the class folder")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is not a regular file")
        size = status.st_size - source.start if source.num_bytes is None else source.num_bytes
        if size == 0:
            raise BadImage("is empty")
        if size > MAX_FILE_BYTES:
            raise BadImage(f"has {size >> 20} MiB, expected at most {MAX_FILE_BYTES >> 20}")
        with source.path.open("rb", buffering=0) as file:
            file.seek(source.start)
            return file.read(size if num_bytes is None else min(size, num_bytes))
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def _open(content: bytes) -> Image.Image:
    """Open an image and check its header, without decoding the pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about harmless oddities in metadata, and sizes that are checked below
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise BadImage("is not a JPEG or PNG image, or is damaged") from None
    except Image.DecompressionBombError:  # its message gives Pillow's own limit, which is higher than ours
        raise BadImage(f"is too large, expected at most {MAX_PIXELS} pixels") from None
    except Exception as error:
        raise _not_decoded(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"has {image.width}×{image.height} pixels, expected at most {MAX_PIXELS}")
    is_png = image.format == "PNG"
    has_16_bits = is_png and content[PNG_BIT_DEPTH] == 16
    if image.mode not in MODES or has_16_bits:
        raise BadImage(f"expected at most 8 bits per channel, got {16 if has_16_bits else f'mode {image.mode}'}")
    if is_png and getattr(image, "is_animated", False):  # of a JPEG with several pictures, the first is used
        raise BadImage("is animated, expected a still image")
    return image
