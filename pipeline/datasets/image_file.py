"""Read one image as untrusted input: JPEG or PNG only, of limited size.

Metadata never decide over pixels: the decoder is given the file without them. Colour profiles,
comments and texts are dropped; of EXIF data only the orientation is read, and damaged data say
nothing. For the layouts see ITU-T T.81, annex B, and the PNG specification (W3C), section 5.
"""

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
HEAD_BYTES = 16 << 10  # the header of most images fits
# at most 8 bits per channel: converting these to RGB loses nothing visible
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PNG_BIT_DEPTH = 24  # offset of the bit depth; Pillow would silently cut 16-bit pixels to 8 bits
PNG_START, PNG_ANIMATION = b"\x89PNG\r\n\x1a\n", (b"acTL", b"fcTL", b"fdAT")
JPEG_START, EXIF_START = b"\xff\xd8", b"Exif\0\0"
JPEG_SCAN, JPEG_APP1, JPEG_COMMENT = 0xDA, 0xE1, 0xFE
JPEG_COLOUR = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe, which say how colours are coded; their smallest length in bytes
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """Raised for a file that cannot be used as an image; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageFile:
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
    is_turned: bool  # its EXIF data ask viewers to rotate or mirror it


def read_facts(source: ImageFile, max_resolution: int) -> ImageFacts:
    """Read and check the header of an image, without decoding the pixels.

    Raises:
        BadImage: the header is not acceptable.
    """
    content = read_content(source, HEAD_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, which are checked here
        try:
            pixels, exif = split_metadata(content)
            image = _open(pixels)
        except BadImage:
            if len(content) < HEAD_BYTES:
                raise
            pixels, exif = split_metadata(read_content(source))  # the header may be longer
            image = _open(pixels)
        is_turned = _orientation(exif) in TURNS
    width, height = image.size
    if min(width, height) * max_resolution < max(width, height):
        raise BadImage(
            f"has {width}×{height} pixels, and its shorter side would shrink to 0 at --max-resolution {max_resolution}"
        )
    return ImageFacts(width, height, is_turned)


def load_rgb(source: ImageFile, *, is_upright: bool = False) -> tuple[np.ndarray, bytes]:
    """Read and decode an image, as ``decode_rgb`` does.

    Returns:
        The pixels, uint8 [height, width, 3], and the sha256 of the file.

    Raises:
        BadImage: the file is not a usable image.
    """
    content = read_content(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_rgb(content, is_upright=is_upright), hashlib.sha256(content).digest()


def decode_rgb(content: bytes, *, is_upright: bool = False) -> np.ndarray:
    """Decode the bytes of an image to uint8 [height, width, 3]; grey, palette and CMYK images become RGB.

    Args:
        content: a whole JPEG or PNG file.
        is_upright: rotate and mirror the image as its EXIF orientation says; by default this is
            ignored, as torchvision does.

    Raises:
        BadImage: it is not a usable image.
    """
    pixels, exif = split_metadata(content)
    image = _open(pixels)
    try:
        turn = TURNS.get(_orientation(exif)) if is_upright else None
        # convert() decodes, and raises when the file is truncated
        return np.asarray((image if turn is None else image.transpose(turn)).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged input
        raise _not_decoded(error) from error


def split_metadata(content: bytes) -> tuple[bytes, bytes]:
    """Return an image file without what is not needed for its pixels, and its EXIF data, empty if it has none.

    What cannot be understood is left as it is, for the decoder to judge.
    """
    if content.startswith(PNG_START):
        return _split_png(content)
    return _split_jpeg(content) if content.startswith(JPEG_START) else (content, b"")


def _split_png(content: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [PNG_START], b"", len(PNG_START)
    while at + 8 <= len(content):
        kind, end = content[at + 4 : at + 8], at + 12 + int.from_bytes(content[at : at + 4], "big")
        is_ancillary = kind[0] & 0x20 and kind not in PNG_ANIMATION  # by the case of the first letter
        if end > len(content) or not is_ancillary:
            kept.append(content[at:end])
        elif kind == b"eXIf":
            exif = content[at + 8 : end - 4]
        at = end
        if kind == b"IEND":
            break
    return b"".join([*kept, content[at:]]), exif


def _split_jpeg(content: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [JPEG_START], b"", len(JPEG_START)
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + length
        if marker == JPEG_SCAN or length < 2 or end > len(content):
            break
        is_application = 0xE0 <= marker <= 0xEF and length < JPEG_COLOUR.get(marker, 1 << 16)
        if not (is_application or marker == JPEG_COMMENT):
            kept.append(content[at:end])
        elif marker == JPEG_APP1 and content.startswith(EXIF_START, at + 4):
            exif += content[at + 4 + len(EXIF_START) : end]
        at = end
    return b"".join([*kept, content[at:]]), exif


def _orientation(exif: bytes) -> int:
    """Return the orientation, 1 (upright) to 8; 1 if the data have none, or are damaged."""
    try:
        found = Image.Exif()
        found.load(exif)
        return int(found.get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _not_decoded(error: Exception) -> BadImage:
    return BadImage("is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}")


def read_content(source: ImageFile, num_bytes: int | None = None) -> bytes:
    """Read the first ``num_bytes`` of an image, by default all of it.

    Raises:
        BadImage: it cannot be read, is empty or too large, or is not a regular file.
    """
    try:
        status = source.path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("is a folder, expected an image directly in the class folder")
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
        if isinstance(error, FileNotFoundError) and source.path.is_symlink():
            raise BadImage("is a symbolic link to a missing file") from None
        raise BadImage(f"cannot be read: {error.strerror}") from error


def _open(content: bytes) -> Image.Image:
    """Open an image without metadata and check its header, without decoding the pixels."""
    try:
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
