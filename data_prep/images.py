"""How images are stored, and how one image file is read: distrustfully, with its size capped, as JPEG or PNG and nothing else."""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 100_000_000  # the largest photograph of ImageNet has 61 million
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel: converting these to RGB loses nothing seen


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


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels and content hash of a good image."""

    width: int
    height: int
    sha256: str


def load_rgb(path: Path) -> np.ndarray:
    """The pixels of an image, uint8 [height, width, 3]; grey, palette and CMYK are converted. Raises BadImage."""
    return np.asarray(_decode(_read(path)))


def check_image(path: Path, max_resolution: int) -> ImageFacts:
    """Decode the whole image as ``load_rgb`` does. Raises BadImage."""
    content = _read(path)
    width, height = _decode(content).size
    if min(width, height) * max_resolution < max(width, height):
        raise BadImage(f"{width}×{height} pixels leave nothing of the short side at {max_resolution}")
    return ImageFacts(width, height, hashlib.sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size == 0:
            raise BadImage("empty")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"{status.st_size >> 20} MiB, more than {MAX_FILE_BYTES >> 20}")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def _decode(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of harmless oddities in metadata, and of sizes that are judged here
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS}")
            if image.mode not in MODES:
                raise BadImage(f"mode {image.mode}, more than 8 bits per channel")
            return image.convert("RGB")  # decodes; raises when the file is cut short
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a JPEG or PNG image") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged input
        raise BadImage(f"cannot be decoded: {error}") from error
