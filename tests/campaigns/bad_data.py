"""60 bad .beton files and sidecars, and 42 bad images, folders and archives of images."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.datasets.beton_format import ALLOCATION, HEADER, METADATA_START, SAMPLE, pages_start
from tests.campaigns.cases import CONFIG, DATA, Case, Good
from tests.campaigns.materials import NUM_IMAGES, PAGE, copy_beton

Edit = Callable[[bytearray], object]
START = pages_start(NUM_IMAGES, PAGE)


def _header(**changes: int) -> Edit:
    def edit(content: bytearray) -> None:
        header = np.frombuffer(bytes(content[: HEADER.itemsize]), HEADER)[0].copy()
        for name, value in changes.items():
            header[name] = value
        content[: HEADER.itemsize] = header.tobytes()

    return edit


def _row(dtype: np.dtype, start: int, number: int, path: tuple[str, ...], value: int) -> Edit:
    """Return an edit that sets one entry of one of the two tables; negative: from the end."""

    def edit(content: bytearray) -> None:
        first = start % len(content)
        rows = np.frombuffer(bytes(content[first : first + NUM_IMAGES * dtype.itemsize]), dtype).copy()
        column = rows
        for name in path:
            column = column[name]
        column[number] = value
        content[first : first + rows.nbytes] = rows.tobytes()

    return edit


def _image(number: int, name: str, value: int) -> Edit:
    return _row(SAMPLE, METADATA_START, number, ("image", name), value)


def _allocation(number: int, name: str, value: int) -> Edit:
    return _row(ALLOCATION, -NUM_IMAGES * ALLOCATION.itemsize, number, (name,), value)


def _set(offset: int, *values: int) -> Edit:
    return lambda content: content.__setitem__(
        slice(offset % len(content), offset % len(content) + len(values)), bytes(values)
    )


def _cut(size: int) -> Edit:
    return lambda content: content.__delitem__(slice(size, None))


# What is changed, what the error says, and whether the sidecar agrees with the change.
FILES: tuple[tuple[str, str, Edit, bool], ...] = (
    ("empty", "has 0 bytes", _cut(0), False),
    ("one byte short", "truncated or only partly copied", lambda content: content.pop(), False),
    ("half", "truncated or only partly copied", _cut(START + PAGE // 2), False),
    ("only its header", "truncated or only partly copied", _cut(24), False),
    (
        "longer",
        "so bytes were added, or the sidecar belongs to another file",
        lambda content: content.extend(b"more"),
        False,
    ),
    (
        "zeros",
        "differs from the one in the sidecar, so the file is damaged",
        lambda content: content.__setitem__(slice(None), bytes(len(content))),
        False,
    ),
    *(
        (
            f"byte {offset} flipped",
            "differs from the one in the sidecar, so the file is damaged",
            _set(offset, 0xA5),
            False,
        )
        for offset in (0, 5, 9, 17, 30, 1100, -1)
    ),
    ("version 1", "got 1", _header(version=1), True),
    ("three fields", "got 3 fields: image (type 2), label (type 1) and 1 more", _header(num_fields=3), True),
    ("odd pages", "page size: expected a power of two of at least 2097152, got 12345", _header(page_size=12345), True),
    ("no samples", "contains no samples", _header(num_samples=0), True),
    ("2^60 samples", "do not fit in a file", _header(num_samples=1 << 60), True),
    ("table beyond the end", "do not fit in a file", _header(allocation_table=(1 << 64) - 1), True),
    ("another field", "expected the fields", _set(24, 3), True),
    ("another name", "expected the fields", _set(25, *b"voice"), True),
    ("label 3 of 3", "has label 3, expected 0–2", _row(SAMPLE, METADATA_START, 4, ("label",), 3), True),
    ("label -1", "has label -1", _row(SAMPLE, METADATA_START, 2, ("label",), -1), True),
    ("label 2^62", "expected 0–2", _row(SAMPLE, METADATA_START, 2, ("label",), 1 << 62), True),
    ("unknown mode", "sample 5 has image mode 2, expected 0 (JPEG)", _image(5, "mode", 2), True),
    ("no height", "image without pixels", _image(5, "height", 0), True),
    ("raw image wider", "sample 8 has a raw image of 192 bytes, expected 216", _image(8, "width", 9), True),
    ("raw called JPEG", "is not a complete JPEG", _image(8, "mode", 0), True),
    ("pointer 0", "sample 6 points to byte 0, but the allocation table says", _image(6, "pointer", 0), True),
    ("pointer 2^63", "sample 6 points to byte 9223372036854775808, but", _image(6, "pointer", 1 << 63), True),
    ("a sample twice", "exactly once", _allocation(3, "sample", 4), True),
    ("sample 2^50", "exactly once", _allocation(3, "sample", 1 << 50), True),
    ("size 2^64-1", "outside the file's pages", _allocation(3, "size", (1 << 64) - 1), True),
    ("size 0", "sample 3 has a size of 0 bytes", _allocation(3, "size", 0), True),
    ("a size too large", "overlaps another sample", _allocation(3, "size", 1 << 16), True),
    ("JPEG without start", "is not a complete JPEG", _set(START, 0), True),
)


def _wrong(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda sidecar: sidecar | changes


SIDECARS: tuple[tuple[str, str, Callable[[dict[str, Any]], Any]], ...] = (
    ("not JSON", "is not valid JSON: expected a property name in double quotes at line 1, column 2", lambda _: b"{"),
    ("a list", "expected a JSON object, got a list", lambda _: []),
    ("binary", "is not valid JSON", lambda _: bytes(range(256))),
    ("nested 100,000 deep", "nested too deeply", lambda _: b"[" * 100_000),
    (
        "a name twice",
        "the name 'format' appears twice in one object",
        lambda sidecar: json.dumps(sidecar).encode()[:-1] + b', "format": "x"}',
    ),
    ("NaN", "NaN is not allowed", _wrong(size_bytes=float("nan"))),
    (
        "a number of 5000 digits",
        "a number has 5000 digits, expected at most 20",
        lambda sidecar: json.dumps(sidecar | {"size_bytes": 0}).replace(": 0,", f": {'9' * 5000},").encode(),
    ),
    ("half a character", "contains an unpaired surrogate", _wrong(classes=["\ud800", "b", "c"])),
    ("no classes", "'classes': expected a list, got null", _wrong(classes=None)),
    ("classes that are numbers", "the class list does not match", _wrong(classes=[1, 2, 3])),
    ("other classes", "the class list does not match", _wrong(classes=["../ant", "bee", "cat"])),
    ("true for a number", "'num_samples': expected a whole number, got true", _wrong(num_samples=True)),
    ("text for a number", 'expected a whole number, got "4096"', _wrong(size_bytes="4096")),
    ("no samples", "'num_samples': expected at least 1, got 0", _wrong(num_samples=0)),
    ("10^18 samples", "and 1000000000000000000 samples make a file of", _wrong(num_samples=10**18)),
    ("pages of 2^60", "1 page of 1152921504606846976 bytes and", _wrong(page_size=1 << 60)),
    ("images without sizes", "'images': 'raw' is missing", _wrong(images={})),
    (
        "infinite images",
        "is not a finite number",
        lambda sidecar: json.dumps(sidecar).replace('"max_height": 8', '"max_height": 1e999').encode(),
    ),
    (
        "of another format",
        "it was written by another version of ticketworks: expected format ticketworks-beton-1, got "
        '"ticketworks-beton-9"; do: use that version, or delete the sidecar',
        _wrong(format="ticketworks-beton-9"),
    ),
    (
        "of another file",
        "or the sidecar belongs to another file; do: copy the file and its sidecar bad.beton.json again",
        _wrong(tables_sha256="0" * 64),
    ),
)


def _beton(edit: Edit, is_signed: bool) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        path = copy_beton(good.beton, folder / "bad.beton")
        content = bytearray(path.read_bytes())
        edit(content)
        path.write_bytes(content)
        if is_signed:
            sidecar = json.loads(Path(f"{path}.json").read_text())
            tables = bytes(content[:START]) + bytes(content[START + PAGE :])
            Path(f"{path}.json").write_text(json.dumps(sidecar | {"tables_sha256": hashlib.sha256(tables).hexdigest()}))
        return good.train(f"data.train={path}")

    return make


def _sidecar(change: Callable[[dict[str, Any]], Any]) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        path = copy_beton(good.beton, folder / "bad.beton")
        changed = change(json.loads(Path(f"{path}.json").read_text()))
        Path(f"{path}.json").write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
        return good.evaluate(good.root / "tickets", data=path)

    return make


def _fifo(good: Good, folder: Path) -> list[str]:
    os.mkfifo(folder / "fifo.beton")
    return good.prepare("verify", folder / "fifo.beton")


def _fifo_sidecar(good: Good, folder: Path) -> list[str]:
    path = copy_beton(good.beton, folder / "bad.beton")
    Path(f"{path}.json").unlink()
    os.mkfifo(f"{path}.json")
    return good.train(f"data.val={path}")


def _other_classes(good: Good, folder: Path) -> list[str]:
    path = copy_beton(good.beton, folder / "bad.beton")
    sidecar = json.loads(Path(f"{path}.json").read_text())
    classes = ["ant", "bee", "\x1b[2Jdog"]
    digest = hashlib.sha256(json.dumps(classes, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()
    Path(f"{path}.json").write_text(json.dumps(sidecar | {"classes": classes, "classes_sha256": digest}))
    return good.train(f"data.val={path}")


def _flipped_pixel(good: Good, folder: Path) -> list[str]:
    _beton(_set(START + 6000, 0xA5), False)(good, folder)
    return good.prepare("verify", "--deep", folder / "bad.beton")


BETON = [
    *(Case("beton", name, DATA, says, _beton(edit, is_signed)) for name, says, edit, is_signed in FILES),
    *(Case("beton", f"sidecar: {name}", DATA, says, _sidecar(change)) for name, says, change in SIDECARS),
    Case("beton", "a FIFO", DATA, "is not a regular file", _fifo),
    Case("beton", "sidecar: a FIFO", DATA, "not a regular file", _fifo_sidecar),
    Case("beton", "other classes, with a terminal escape", DATA, "\\x1b[2Jdog", _other_classes),
    Case("beton", "a flipped pixel", DATA, "page 0 (samples 0 to ", _flipped_pixel),
]


# -- images


def _png(*, width: int, height: int, bit_depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def _good_jpeg(good: Good) -> bytes:
    return (good.root / "images" / "train" / "ant" / "0.jpg").read_bytes()


IMAGES: tuple[tuple[str, str, Callable[[Good], bytes]], ...] = (
    ("empty", "empty", lambda _: b""),
    ("text", "not a JPEG or PNG", lambda _: b"I am not an image\n"),
    ("a GIF", "not a JPEG or PNG", lambda _: b"GIF89a" + bytes(100)),
    ("a web page", "not a JPEG or PNG", lambda _: b"<!DOCTYPE html><html>404</html>"),
    ("one byte", "not a JPEG or PNG", lambda _: b"\xff"),
    ("a JPEG's start", "bad.jpg", lambda _: b"\xff\xd8\xff\xe0"),
    ("half a JPEG", "bad.jpg: is truncated", lambda good: _good_jpeg(good)[:-200]),
    (
        "a JPEG with its tables zeroed",
        "bad.jpg",
        lambda good: _good_jpeg(good)[:20] + bytes(200) + _good_jpeg(good)[220:],
    ),
    (
        "a PNG of 2 gigapixels",
        "too large, expected at most 100000000 pixels",
        lambda _: _png(width=65000, height=32000),
    ),
    ("a PNG of 2^31 pixels a side", "too large, expected at most", lambda _: _png(width=2**31 - 1, height=2**31 - 1)),
    ("a PNG without width", "bad.jpg", lambda _: _png(width=0, height=4)),
    (
        "a PNG of 16 bits",
        "at most 8 bits per channel, got 16",
        lambda _: _png(width=2, height=2, bit_depth=16, colour=0),
    ),
    ("a PNG that ends", "bad.jpg", lambda _: _png(width=100, height=100)[:30]),
    (
        "a PNG with a wrong checksum",
        "bad.jpg",
        lambda _: _png(width=2, height=2)[:30] + b"XX" + _png(width=2, height=2)[32:],
    ),
    ("an SVG bomb", "not a JPEG or PNG", lambda _: b'<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaa">]><svg/>'),
    ("a strip", "its shorter side would shrink to 0 at", lambda _: _strip()),
)


def _strip() -> bytes:
    import io

    content = io.BytesIO()
    Image.new("RGB", (20000, 1)).save(content, "PNG")
    return content.getvalue()


def _folder(good: Good, folder: Path) -> list[str]:
    """Copy the two good splits; returns the command line."""
    for path in (good.root / "images").rglob("*.jpg"):
        target = folder / path.relative_to(good.root / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return good.prepare(
        "image-folder",
        "--train",
        folder / "train",
        "--val",
        folder / "val",
        "--output",
        folder / "out",
        "--workers",
        "1",
    )


def _bad_image(content: Callable[[Good], bytes]) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        command = _folder(good, folder)
        (folder / "train" / "bee" / "bad.jpg").write_bytes(content(good))
        return command

    return make


def _changed(change: Callable[[Path], object]) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        command = _folder(good, folder)
        change(folder)
        return command

    return make


def _loaded(change: Callable[[Path], object]) -> Callable[[Good, Path], list[str]]:
    """Train on the changed folders instead of converting them."""

    def make(good: Good, folder: Path) -> list[str]:
        _changed(change)(good, folder)
        return good.train("data.loader=folder", f"data.train={folder / 'train'}", f"data.val={folder / 'val'}")

    return make


def _in_two_forms(folder: Path) -> None:
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        (folder / split / "bee").rename(folder / split / name)


def _emptied(folder: Path) -> None:
    for path in (folder / "val" / "bee").iterdir():
        path.unlink()


def _with_stale_held_out(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "held_out.beton").touch()


def _divided(folder: Path) -> Path:
    (folder / "held_out").mkdir()
    return folder


def _idx(change: Callable[[bytes], bytes]) -> Callable[[Good, Path], list[str]]:
    """Make Fashion-MNIST's four files with one image each, and change the training images."""

    def make(good: Good, folder: Path) -> list[str]:
        images, labels = struct.pack(">4i", 0x803, 1, 28, 28) + bytes(784), struct.pack(">2i", 0x801, 1) + bytes(1)
        for prefix in ("train", "t10k"):
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(change(images) if prefix == "train" else images)
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        return good.prepare("fashion-mnist", "--source", folder, "--output", folder / "out")

    return make


def _zipped(good: Good, folder: Path) -> list[str]:
    command = _idx(lambda content: content)(good, folder)
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1000))[:-20])
    return command


def _emoji(content: bytes | None) -> Callable[[Good, Path], list[str]]:
    """Write the first of the five packages, if there is content."""

    def make(good: Good, folder: Path) -> list[str]:
        if content is not None:
            (folder / "emoji-datasource-google-16.0.0.tgz").write_bytes(content)
        return good.prepare("emoji", "--source", folder, "--output", folder / "out")

    return make


IMAGE_CASES = [
    *(Case("image", name, DATA, says, _bad_image(content)) for name, says, content in IMAGES),
    Case(
        "image",
        "a FIFO",
        DATA,
        "not a regular file",
        _changed(lambda folder: os.mkfifo(folder / "train" / "ant" / "fifo.jpg")),
    ),
    Case(
        "image",
        "a folder",
        DATA,
        "a folder, expected an image",
        _changed(lambda folder: (folder / "train" / "ant" / "deeper.jpg").mkdir()),
    ),
    Case(
        "image",
        "a link to a device",
        DATA,
        "zero.jpg",
        _changed(lambda folder: (folder / "val" / "ant" / "zero.jpg").symlink_to("/dev/zero")),
    ),
    Case(
        "image",
        "a link to nothing",
        DATA,
        "gone.jpg: is a symbolic link to a missing file",
        _changed(lambda folder: (folder / "val" / "ant" / "gone.jpg").symlink_to("nowhere")),
    ),
    Case("image", "no images in a class", DATA, "contains no images", _changed(_emptied)),
    Case(
        "image",
        "a class more in train",
        DATA,
        "train is missing: cat",
        _changed(lambda folder: (folder / "train" / "cat").mkdir()),
    ),
    Case(
        "image",
        "a class that cannot be printed",
        DATA,
        "contains control characters",
        _changed(lambda folder: (folder / "train" / "a\x1b[2J").mkdir()),
    ),
    Case("image", "a class in two Unicode forms", DATA, "one name in two Unicode forms", _changed(_in_two_forms)),
    Case(
        "image", "loaded, a class in two Unicode forms", DATA, "one name in two Unicode forms", _loaded(_in_two_forms)
    ),
    Case("image", "loaded, no images in a class", DATA, "val/bee: contains no images", _loaded(_emptied)),
    Case(
        "image",
        "loaded, lost+found",
        DATA,
        "lost+found: contains no images",
        _loaded(lambda folder: [(folder / split / "lost+found").mkdir() for split in ("train", "val")]),
    ),
    Case(
        "image",
        "loaded, an empty file",
        DATA,
        "1.jpg: is empty",
        _loaded(lambda folder: (folder / "train" / "bee" / "1.jpg").write_bytes(b"")),
    ),
    Case(
        "image",
        "loaded, a link to nothing",
        DATA,
        "gone.jpg: is a symbolic link to a missing file",
        _loaded(lambda folder: (folder / "val" / "ant" / "gone.jpg").symlink_to("nowhere")),
    ),
    Case(
        "image",
        "two class folders of one name",
        DATA,
        "have one name in two Unicode forms",
        _loaded(lambda folder: [(folder / "train" / name).mkdir() for name in ("caf\u00e9", "cafe\u0301")]),
    ),
    Case(
        "image",
        "no such folder",
        DATA,
        "no: does not exist",
        lambda good, folder: good.prepare(
            "image-folder", "--train", folder / "no", "--val", folder, "--output", folder / "out"
        ),
    ),
    Case(
        "image",
        "a quality of 101",
        CONFIG,
        "'101' is not a whole number",
        lambda good, folder: [*_folder(good, folder), "--jpeg-quality", "101"],
    ),
    Case(
        "image",
        "all images held out",
        CONFIG,
        "--hold-out: expected at most 2 of the 4 training images",
        lambda good, folder: [*_folder(good, folder), "--hold-out", "4"],
    ),
    Case(
        "image",
        "a held-out set of another training set",
        CONFIG,
        "contains images held out of the train.beton that this command would replace; the new train.beton could",
        _changed(_with_stale_held_out),
    ),
    Case(
        "image",
        "a folder that is divided already",
        CONFIG,
        "held_out: already exists",
        lambda good, folder: good.prepare(
            "split-folder", "--train", good.root / "images" / "train", "--output", _divided(folder), "--hold-out", "1"
        ),
    ),
    Case(
        "image",
        "IDX cut short",
        DATA,
        "expected 784 bytes after its header, got 783",
        _idx(lambda content: content[:-1]),
    ),
    Case(
        "image",
        "IDX with more",
        DATA,
        "expected 784 bytes after its header, got more",
        _idx(lambda content: content + b"x"),
    ),
    Case(
        "image",
        "IDX of 2^31 images",
        DATA,
        "its header claims 2147483647 images",
        _idx(lambda content: content[:4] + b"\x7f\xff\xff\xff" + content[8:]),
    ),
    Case(
        "image",
        "IDX of another shape",
        DATA,
        "expected 28×28 images, got 29×28",
        _idx(lambda content: content[:8] + b"\0\0\0\x1d" + content[12:]),
    ),
    Case("image", "gzip cut short", DATA, "the gzip file is truncated", _zipped),
    Case("image", "no emoji", DATA, "google-16.0.0.tgz: is missing; do: run npm pack", _emoji(None)),
    Case("image", "another package", DATA, "is not the published package: expected sha256", _emoji(b"x")),
]
CASES = [*BETON, *IMAGE_CASES]
