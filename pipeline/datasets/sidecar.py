"""The sidecar of a .beton file, and the verification of the file against it at three levels of cost.

Files are verified before every run because ffcv hangs, or delivers another sample's pixels, when a
file is damaged. The sidecar ``<file>.json`` holds size, hashes, class list and origin. Checking the
structure alone would miss almost every flipped byte in the pixels, so there is a hash of each page.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
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
    pages_start,
    read_tables,
)
from pipeline.datasets.beton_scan import OnProgress, scan
from pipeline.errors import DataError, PermissionDenied
from pipeline.files import JSON_TYPES, describe_json, parse_json, read_capped, write_atomically

FORMAT = "ticketworks-beton-1"
MAX_CLASSES = 1 << 20  # without class names, a larger label means that the file is damaged
MAX_SIDECAR_BYTES = 64 << 20  # ImageNet's sidecar has 2 MiB
TABLES_DIFFER = (
    "the sha256 of its header and tables differs from the one in the sidecar, so the file is damaged, or the sidecar "
    "belongs to another file"
)

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
    """What a verified file holds."""

    path: Path
    num_samples: int
    classes: list[str]
    image_mode: str  # ``raw``, ``jpg`` or ``mixed``
    max_height: int  # pixels
    max_width: int
    digest: str  # of images, labels and class names in sample order; independent of the order of the pages
    sidecar: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def file_digest(self) -> str:
        """Digest of every byte of the file and of the class names; changes when the same images are written again."""
        return _json_sha256([self.sidecar[key] for key in ("tables_sha256", "page_sha256", "classes")])


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar of ``path``."""
    return path.with_name(f"{path.name}.json")


def unlike_sidecar(path: Path, why: str) -> DataError:
    """Return the error for a file that differs from what its sidecar says."""
    both = f"copy the file and its sidecar {sidecar_path(path).name} again, or rebuild both from the original data"
    return DataError(f"{path}: {why}", do=f"{both} with python -m data_prep")


def verify(
    path: str | os.PathLike[str],
    *,
    level: int = 1,
    num_classes: int | None = None,
    on_progress: OnProgress | None = None,
) -> BetonInfo:
    """Check the file at ``path`` and return what it holds.

    Args:
        path: a .beton file with its sidecar.
        level: 0 checks that the file is readable, its size, the hash of header and tables (0.14 s
            for the 61.5 MB of ImageNet) and the class list. 1 also checks the structure of every
            sample, 2 also the hash of every page and a strict decode of every JPEG.
        num_classes: number of outputs of the model; the file may not have more classes.
        on_progress: called with the number of pages done and their total.

    Raises:
        DataError: the file is missing or damaged, or has too many classes.
        PermissionDenied: it may not be read.
    """
    path = Path(path)
    with _reading(path):
        size = path.stat().st_size
        sidecar = _load_sidecar(path)
        if size != sidecar["size_bytes"]:
            expected = sidecar["size_bytes"]
            is_short = size < expected
            reason = (
                "it is truncated or only partly copied"
                if is_short
                else "bytes were added, or the sidecar belongs to another file"
            )
            raise unlike_sidecar(path, f"has {size} bytes, but its sidecar says {expected}, so {reason}")
        if _tables_sha256(path, sidecar) != sidecar["tables_sha256"]:
            raise unlike_sidecar(path, TABLES_DIFFER)
        info = _info(path, sidecar)
        if num_classes is not None:
            check_num_classes(info, num_classes)
        if level >= 1:
            tables = read_tables(path)
            check_structure(tables, info.num_classes)
            if _layout(tables) != {key: sidecar[key] for key in _layout(tables)} or tables.num_pages != len(
                sidecar["page_sha256"]
            ):
                raise unlike_sidecar(
                    path, "number, mode or size of its images or pages differ from those in the sidecar"
                )
        if level >= 2:
            _, content = scan(tables, expected_pages=sidecar["page_sha256"], on_progress=on_progress)
            if content != sidecar["content_sha256"]:
                raise unlike_sidecar(path, "its images or labels differ from those that the sidecar was written for")
    return info


def build_sidecar(
    path: Path,
    *,
    classes: list[str] | None,
    writer: dict[str, Any],
    source: dict[str, Any],
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Check ``path`` completely (structure, strict decode of every JPEG) and return its sidecar.

    Args:
        path: a .beton file.
        classes: names of the labels, in order; None takes the numbers from 0 to the largest label.
        writer: how the file was written, for the sidecar.
        source: where its images come from, for the sidecar.
        on_progress: called with the number of pages done and their total.

    Raises:
        DataError: the file is missing or damaged.
        PermissionDenied: it may not be read.
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
    """Write the sidecar of the file at ``path`` atomically.

    Raises:
        WriteError: it cannot be written.
        PermissionDenied: this user may not write it.
    """
    write_atomically(sidecar_path(path), json.dumps(sidecar, indent=1, ensure_ascii=False).encode())


def check_num_classes(info: BetonInfo, num_classes: int) -> None:
    """Raise DataError when the data set has more classes than the model has outputs."""
    if info.num_classes > num_classes:
        raise DataError(
            f"{info.path}: has {info.num_classes} classes, but the model only {num_classes}",
            do=f"set model.num_classes={info.num_classes}, or choose another data set",
        )


def compare_class_lists(train: BetonInfo, val: BetonInfo) -> None:
    """Raise DataError unless both files number the same classes in the same order."""
    if train.classes == val.classes:
        return
    refuse_other_forms(train.classes, val.classes, train.path, val.path)
    do = (
        "give both folders the same class folders"
        if train.path.is_dir()
        else "write both files with one run of python -m data_prep, from train and val data with the same classes"
    )
    if train.num_classes != val.num_classes:
        raise DataError(f"{train.path} has {train.num_classes} classes, but {val.path} has {val.num_classes}", do=do)
    label = next(i for i, (a, b) in enumerate(zip(train.classes, val.classes, strict=True)) if a != b)
    names = f"'{train.classes[label]}' in {train.path}, but '{val.classes[label]}' in {val.path}"
    raise DataError(f"the classes of data.train and data.val differ: label {label} is {names}", do=do)


def refuse_other_forms(classes: list[str], others: list[str], path: Path, other_path: Path) -> None:
    """Raise DataError if a class has a name in two Unicode forms: "é" as one character, and as "e" with an accent.

    File systems and archives of macOS write the second form. Both look the same, which no list of
    missing classes would explain.
    """
    named = {unicodedata.normalize("NFC", name): name for name in others}
    for name in classes:
        other = named.get(unicodedata.normalize("NFC", name), name)
        if other != name and name not in others:
            raise DataError(
                f"a class is named {name!a} in {path}, but {other!a} in {other_path}: one name in two Unicode forms",
                do="rename the folder in one of the two splits, and rewrite any data set made from the renamed folder",
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Reject anything but a readable regular file, and turn system errors inside the block into one-line errors."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait forever
            raise DataError(f"{path}: is not a regular file", do="pass a .beton file")
        with path.open("rb"):
            pass
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: does not exist", do="check the path, or write the data set with python -m data_prep"
        ) from None
    except PermissionError as error:
        where = f"{error.filename or path}: may not be read by user id {os.geteuid()}"
        do = "make the file readable (chmod a+r) and its folders accessible (chmod a+x)"
        raise PermissionDenied(where, do=do) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", do="check the disk or mount it is on") from error


def _load_sidecar(path: Path) -> dict[str, Any]:
    name = sidecar_path(path)
    try:
        content = read_capped(name, MAX_SIDECAR_BYTES, follow=True)
    except FileNotFoundError:
        do = f"python -m data_prep verify --write-sidecar {path} (checks the whole file first)"
        raise DataError(f"{path}: has no sidecar {name.name}, without which it cannot be verified", do=do) from None
    except ValueError as error:
        raise _damaged_sidecar(path, f"cannot be read: {error}") from None
    try:
        sidecar = parse_json(content)
    except ValueError as error:
        raise _damaged_sidecar(path, f"is not valid JSON: {error}") from None
    if not isinstance(sidecar, dict):
        raise _damaged_sidecar(path, f"expected a JSON object, got {describe_json(sidecar)}")
    if sidecar.get("format") != FORMAT:
        got = describe_json(sidecar.get("format"))
        if got.startswith('"ticketworks-beton-'):
            why = f"it was written by another version of ticketworks: expected format {FORMAT}, got {got}"
            raise _damaged_sidecar(path, why, otherwise="use that version")
        raise _damaged_sidecar(path, f"expected format {FORMAT}, got {got}")
    for key, kind in _SIDECAR_TYPES.items():
        if key not in sidecar:
            raise _damaged_sidecar(path, f"'{key}' is missing")
        if type(sidecar[key]) is not kind:
            raise _damaged_sidecar(path, f"'{key}': expected {JSON_TYPES[kind]}, got {describe_json(sidecar[key])}")
    if not all(isinstance(name, str) for name in sidecar["classes"]) or sidecar["classes_sha256"] != _json_sha256(
        sidecar["classes"]
    ):
        raise _damaged_sidecar(path, "the class list does not match its sha256")
    for key, minimum in (("page_size", MIN_PAGE_SIZE), ("num_samples", 1)):
        if sidecar[key] < minimum:
            raise _damaged_sidecar(path, f"'{key}': expected at least {minimum}, got {sidecar[key]}")
    expected = tables_bounds(sidecar)[1] + sidecar["num_samples"] * ALLOCATION.itemsize
    if expected != sidecar["size_bytes"]:
        num_pages = len(sidecar["page_sha256"])
        pages = f"{num_pages} {'page' if num_pages == 1 else 'pages'} of {sidecar['page_size']} bytes"
        what = f"{pages} and {sidecar['num_samples']} samples make a file of {expected} bytes"
        raise _damaged_sidecar(path, f"{what}, but 'size_bytes' is {sidecar['size_bytes']}")
    return sidecar


def _damaged_sidecar(path: Path, why: str, *, otherwise: str = "copy the sidecar again") -> DataError:
    """Return the error for a damaged sidecar of the file at ``path``; ``otherwise`` is what to do but write it anew."""
    new = f"run python -m data_prep verify --write-sidecar {path} (the new sidecar will contain no class names)"
    return DataError(f"{sidecar_path(path)}: {why}", do=f"{otherwise}, or delete the sidecar and {new}")


def _info(path: Path, sidecar: dict[str, Any]) -> BetonInfo:
    images = sidecar["images"]
    for key in ("raw", "jpg", "max_height", "max_width"):
        if key not in images:
            raise _damaged_sidecar(path, f"'images': '{key}' is missing")
        if type(images[key]) is not int or images[key] < 0:
            got = describe_json(images[key])
            raise _damaged_sidecar(path, f"'images': '{key}': expected a whole number of at least 0, got {got}")
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
    """Return the offsets of the first page and of the end of the last, from the sidecar: the file may be damaged."""
    start = pages_start(sidecar["num_samples"], sidecar["page_size"])
    return start, start + len(sidecar["page_sha256"]) * sidecar["page_size"]


def _tables_sha256(path: Path, sidecar: dict[str, Any]) -> str:
    """Digest of everything in the file that is not a page."""
    start, end = tables_bounds(sidecar)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(start))
        file.seek(end)
        digest.update(file.read())
    return digest.hexdigest()


def classes_digest(classes: list[str]) -> str:
    """Digest of a class list, the same for files and folders of images."""
    return _json_sha256(classes)
