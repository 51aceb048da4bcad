"""The sidecar of a .beton file and the verification of the file against it, at three levels of cost.

Why before every run: ffcv hangs or delivers another sample's pixels when a file is damaged. The
sidecar ``<file>.json`` holds size, hashes, class list and origin. Structure alone misses almost
every flipped pixel byte, hence the hash of each page.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.datasets.beton_format import (
    ALLOCATION,
    JPEG,
    MIN_PAGE_SIZE,
    Tables,
    check_structure,
    damaged,
    pages_start,
    read_tables,
)
from pipeline.datasets.beton_scan import OnProgress, scan
from pipeline.errors import DataError, PermissionDenied
from pipeline.files import parse_json, read_capped, write_atomically

FORMAT = "ticketworks-beton-1"
MAX_CLASSES = 1 << 20  # a larger label without class names is damage, not a data set
MAX_SIDECAR_BYTES = 64 << 20  # a million samples of ImageNet: 2 MiB

_SIDECAR_TYPES: dict[str, type] = {
    "format": str,
    "size_bytes": int,
    "page_size": int,
    "num_samples": int,
    "tables_sha256": str,
    "page_sha256": list,
    "content_sha256": str,
    "classes": list,
    "classes_sha256": str,
    "images": dict,
    "writer": dict,
    "source": dict,
}


@dataclass(frozen=True)
class BetonInfo:
    """What a verified file holds. ``image_mode`` is ``raw``, ``jpg`` or ``mixed``; sizes in pixels."""

    path: Path
    num_samples: int
    classes: list[str]
    image_mode: str
    max_height: int
    max_width: int
    digest: str  # of images, labels and class names in sample order: the same whatever the order of the pages
    sidecar: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def file_digest(self) -> str:
        """Of every byte of the file, and of the class names: the same images written anew may lie elsewhere in theirs."""
        return _json_sha256([self.sidecar[key] for key in ("tables_sha256", "page_sha256", "classes")])


def sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def verify(
    path: str | os.PathLike[str],
    *,
    level: int = 1,
    num_classes: int | None = None,
    on_progress: OnProgress | None = None,
) -> BetonInfo:
    """Check the file at ``path`` and return what it holds; raises DataError or PermissionDenied, in one line.

    Level 0: readable, size, hash of header and tables (0.14 s for the 61.5 MB of ImageNet), class list.
    Level 1 adds the structure of every sample, level 2 the hash of every page and a strict decode
    of every JPEG. ``num_classes`` is the number of outputs of the model.
    """
    path = Path(path)
    with _reading(path):
        size = path.stat().st_size
        sidecar = _load_sidecar(path)
        if size != sidecar["size_bytes"]:
            raise damaged(path, f"is {size} bytes, its sidecar says {sidecar['size_bytes']}: truncated, or half copied")
        if _tables_sha256(path, sidecar) != sidecar["tables_sha256"]:
            raise damaged(path, "header or tables are damaged: their sha256 is not the one in the sidecar")
        info = _info(path, sidecar)
        if num_classes is not None:
            check_num_classes(info, num_classes)
        if level >= 1:
            tables = read_tables(path)
            check_structure(tables, info.num_classes)
            if _layout(tables) != {key: sidecar[key] for key in _layout(tables)} or tables.num_pages != len(
                sidecar["page_sha256"]
            ):
                raise damaged(path, "number, mode or size of its images or pages are not those in the sidecar")
        if level >= 2:
            _, content = scan(tables, expected_pages=sidecar["page_sha256"], on_progress=on_progress)
            if content != sidecar["content_sha256"]:
                raise damaged(path, "its images and labels are not those that the sidecar was written for")
    return info


def build_sidecar(
    path: Path,
    *,
    classes: list[str] | None,
    writer: dict[str, Any],
    source: dict[str, Any],
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Check ``path`` in full (structure, strict decode of every JPEG) and return its sidecar.

    ``classes`` are the names of the labels, in order; None takes the numbers 0 to the largest label. Raises DataError.
    """
    with _reading(path):
        tables = read_tables(path)
        if classes is None:
            classes = [str(label) for label in range(min(max(0, int(tables.samples["label"].max())) + 1, MAX_CLASSES))]
        check_structure(tables, len(classes))
        pages, content = scan(tables, expected_pages=None, on_progress=on_progress)
        sidecar = {
            "format": FORMAT,
            "size_bytes": path.stat().st_size,
            **_layout(tables),
            "page_sha256": pages,
            "content_sha256": content,
            "classes": classes,
            "classes_sha256": _json_sha256(classes),
            "writer": writer,
            "source": source,
        }
        return {**sidecar, "tables_sha256": _tables_sha256(path, sidecar)}


def save_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    """Write the sidecar of the file at ``path``, atomically. Raises WriteError, PermissionDenied."""
    write_atomically(sidecar_path(path), json.dumps(sidecar, indent=1, ensure_ascii=False).encode())


def check_num_classes(info: BetonInfo, num_classes: int) -> None:
    """Raise DataError when the set has more classes than the model has outputs."""
    if info.num_classes > num_classes:
        raise DataError(
            f"{info.path}: has {info.num_classes} classes, the model only {num_classes}",
            do=f"set model.num_classes={info.num_classes}, or name the data set that was meant",
        )


def compare_class_lists(train: BetonInfo, val: BetonInfo) -> None:
    """Raise DataError unless both files number the same classes in the same order."""
    if train.classes == val.classes:
        return
    do = "write both with one call of python -m data_prep"
    if train.num_classes != val.num_classes:
        raise DataError(f"{train.path} has {train.num_classes} classes, {val.path} has {val.num_classes}", do=do)
    label = next(i for i, (a, b) in enumerate(zip(train.classes, val.classes, strict=True)) if a != b)
    names = f"'{train.classes[label]}' in {train.path} and '{val.classes[label]}' in {val.path}"
    raise DataError(f"label {label} is {names}", do=do)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Refuse what is not a readable regular file, and turn what the system says while reading it into one line."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise DataError(f"{path}: is not a regular file", do="name a .beton file")
        with path.open("rb"):
            pass
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: does not exist", do="check the path, or write the data set with python -m data_prep"
        ) from None
    except PermissionError as error:
        where = f"{error.filename or path}: may not be read by user id {os.geteuid()}"
        raise PermissionDenied(where, do="make the file readable and its folders enterable (chmod a+r, a+x)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", do="check the disk or mount it lies on") from error


def _load_sidecar(path: Path) -> dict[str, Any]:
    name = sidecar_path(path)
    try:
        sidecar = parse_json(read_capped(name, MAX_SIDECAR_BYTES, follow=True))
    except FileNotFoundError:
        do = f"python -m data_prep verify --write-sidecar {path} (checks the whole file first)"
        raise DataError(
            f"{path}: has no sidecar {name.name}, so it cannot be told whether it is whole", do=do
        ) from None
    except ValueError as error:
        raise damaged(name, f"is not JSON that can be read: {error}") from None
    if not isinstance(sidecar, dict) or sidecar.get("format") != FORMAT:
        raise damaged(name, f"is not a sidecar of format {FORMAT}")
    for key, kind in _SIDECAR_TYPES.items():
        if type(sidecar.get(key)) is not kind:
            raise damaged(name, f"'{key}' is missing or not of type {kind.__name__}")
    if not all(isinstance(name, str) for name in sidecar["classes"]) or sidecar["classes_sha256"] != _json_sha256(
        sidecar["classes"]
    ):
        raise damaged(name, "class list and its sha256 do not agree")
    if sidecar["page_size"] < MIN_PAGE_SIZE or sidecar["num_samples"] < 1:
        raise damaged(
            name, f"page size {sidecar['page_size']} or number of samples {sidecar['num_samples']} is impossible"
        )
    if tables_bounds(sidecar)[1] + sidecar["num_samples"] * ALLOCATION.itemsize != sidecar["size_bytes"]:
        raise damaged(name, "its numbers of pages, samples and bytes do not agree")
    return sidecar


def _info(path: Path, sidecar: dict[str, Any]) -> BetonInfo:
    images = sidecar["images"]
    if not all(type(images.get(key)) is int and images[key] >= 0 for key in ("raw", "jpg", "max_height", "max_width")):
        raise damaged(sidecar_path(path), "'images' is incomplete")
    height, width = images["max_height"], images["max_width"]
    modes = [mode for mode in ("raw", "jpg") if images[mode]]
    mode = modes[0] if len(modes) == 1 else "mixed"
    digest = _json_sha256([sidecar["content_sha256"], sidecar["classes"]])
    return BetonInfo(path, sidecar["num_samples"], sidecar["classes"], mode, height, width, digest, sidecar)


def _layout(tables: Tables) -> dict[str, Any]:
    image = tables.samples["image"]
    num_jpeg = int((image["mode"] == JPEG).sum())
    sizes = {"max_height": int(image["height"].max()), "max_width": int(image["width"].max())}
    images = {"raw": len(image) - num_jpeg, "jpg": num_jpeg, **sizes}
    return {"page_size": tables.page_size, "num_samples": len(image), "images": images}


def _json_sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def tables_bounds(sidecar: dict[str, Any]) -> tuple[int, int]:
    """Offsets of the first page and of the end of the last, by the sidecar: those in the file may be what is damaged."""
    start = pages_start(sidecar["num_samples"], sidecar["page_size"])
    return start, start + len(sidecar["page_sha256"]) * sidecar["page_size"]


def _tables_sha256(path: Path, sidecar: dict[str, Any]) -> str:
    """Hash of everything that is not a page."""
    start, end = tables_bounds(sidecar)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
        file.seek(end)
        digest.update(file.read())
    return digest.hexdigest()


def classes_digest(classes: list[str]) -> str:
    """Hash of a class list, the same whatever holds the images."""
    return _json_sha256(classes)
