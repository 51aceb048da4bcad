"""A damaged .beton file is refused with one line that says what is wrong; a good one is described."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.images import ImageOptions
from pipeline.datasets import beton_format
from pipeline.datasets.beton_format import ALLOCATION, HEADER, METADATA_START, SAMPLE, check_structure, read_tables
from pipeline.datasets.sidecar import BetonInfo, build_sidecar, compare_class_lists, save_sidecar, sidecar_path, verify
from pipeline.errors import DataError, PermissionDenied, WriteError

CLASSES = ["ant", "bee", "cat"]


class Noise:
    """Ten images of 40×50 random pixels; label = index mod 3."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8), index % 3


def write(path: Path, *, mode: str = "raw", classes: list[str] = CLASSES) -> BetonInfo:
    from data_prep.writer import write_beton

    return write_beton(
        path, Noise(), classes=classes, options=ImageOptions(mode), source={"kind": "noise"}, num_workers=1
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {mode: write(folder / f"{mode}.beton", mode=mode).path for mode in ("raw", "jpg")}


@pytest.fixture(params=["raw", "jpg"])
def file(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "noise.beton"
    path.write_bytes(originals[request.param].read_bytes())
    sidecar_path(path).write_bytes(sidecar_path(originals[request.param]).read_bytes())
    return path


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 0xFF]))


def one_line(error: pytest.ExceptionInfo[DataError]) -> bool:
    return "\n" not in str(error.value) and "; do: " in str(error.value)


def test_the_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    pairs = (
        (HEADER, types.HeaderType),
        (beton_format.FIELD, types.FieldDescType),
        (SAMPLE, types.get_metadata_type([RGBImageField(), IntField()])),
        (beton_format.IMAGE, RGBImageField().metadata_type),
        (ALLOCATION, types.ALLOC_TABLE_TYPE),
    )
    for ours, theirs in pairs:
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[name][1] for name in ours.names] == [
            theirs.fields[name][1] for name in theirs.names
        ]  # offsets
    assert types.CURRENT_VERSION == beton_format.VERSION
    assert [types.TYPE_ID_HANDLER[kind] for _, kind in beton_format.FIELDS] == [RGBImageField, IntField]


def test_a_whole_file_is_described(file: Path) -> None:
    for level in (0, 1, 2):
        info = verify(file, level=level, num_classes=3)
        assert (info.num_samples, info.classes, info.max_height, info.max_width) == (10, CLASSES, 40, 50)
    assert info.image_mode in ("raw", "jpg")
    assert verify(str(file), num_classes=1000).digest == info.digest


def test_missing_file_and_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as error:
        verify(tmp_path / "none.beton")
    assert one_line(error)
    os.mkfifo(tmp_path / "fifo.beton")
    for name in ("", "fifo.beton"):
        with pytest.raises(DataError, match="not a regular file"):
            verify(tmp_path / name)


def test_every_byte_of_a_fields_name_counts(file: Path) -> None:
    """FFCV's reader decodes all of them as ASCII, including those after the name."""
    flip_byte(file, HEADER.itemsize + beton_format.FIELD.fields["name"][1] + len("image") + 3)  # type: ignore[index]
    with pytest.raises(DataError, match="expected the fields"):
        read_tables(file)


def test_missing_and_damaged_sidecar(file: Path) -> None:
    sidecar = json.loads(sidecar_path(file).read_text())
    sidecar_path(file).write_text(json.dumps({**sidecar, "classes": ["ant", "bee", "dog"]}))
    with pytest.raises(DataError, match="the class list does not match its sha256"):
        verify(file, level=0)
    sidecar_path(file).write_text(json.dumps({**sidecar, "page_sha256": None}))
    with pytest.raises(DataError, match="'page_sha256': expected a list, got null"):
        verify(file, level=0)
    sidecar_path(file).write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        verify(file, level=0)
    sidecar_path(file).unlink()
    with pytest.raises(DataError, match=r"has no sidecar.*do: python -m data_prep verify --write-sidecar") as error:
        verify(file, level=0)
    assert one_line(error)


def test_truncated_file(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DataError, match="truncated or only partly copied") as error:
        verify(file, level=0)
    assert one_line(error)


def test_a_longer_file_is_not_called_truncated(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"more")
    with pytest.raises(DataError, match=r"says \d+, so bytes were added, or the sidecar belongs to another file"):
        verify(file, level=0)


def test_a_sidecar_that_is_a_fifo_is_not_called_bad_json(file: Path) -> None:
    sidecar = file.with_name(f"{file.name}.json")
    sidecar.unlink()
    os.mkfifo(sidecar)
    with pytest.raises(DataError, match=r"json: cannot be read: it is not a regular file"):
        verify(file, level=0)


@pytest.mark.parametrize("offset", [0, 4, 8, 16, 30, METADATA_START + 16, -1])
def test_damaged_header_and_tables_are_seen_at_level_0(file: Path, offset: int) -> None:
    flip_byte(file, offset % file.stat().st_size)
    with pytest.raises(DataError, match="differs from the one in the sidecar, so the file is damaged") as error:
        verify(file, level=0)
    assert one_line(error)


def test_a_flipped_pixel_is_seen_at_level_2_only(file: Path) -> None:
    tables = read_tables(file)
    flip_byte(file, int(tables.pointer[7] + tables.size[7] // 2))
    verify(file, level=1)
    with pytest.raises(DataError, match=r"page 0 \(samples 0 to 9\) is damaged") as error:
        verify(file, level=2)
    assert one_line(error)


def _header(**changes: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        header = np.frombuffer(content, HEADER, 1)[0].copy()
        for name, value in changes.items():
            header[name] = value
        content[: HEADER.itemsize] = header.tobytes()

    return change


def _sample(number: int, field: str, value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        samples = np.frombuffer(content, SAMPLE, 10, METADATA_START).copy()
        (samples if field == "label" else samples["image"])[field][number] = value
        content[METADATA_START : METADATA_START + samples.nbytes] = samples.tobytes()

    return change


def _allocation(number: int, field: str, value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        start = len(content) - 10 * ALLOCATION.itemsize
        allocations = np.frombuffer(content, ALLOCATION, 10, start).copy()
        allocations[field][number] = value
        content[start:] = allocations.tobytes()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_header(version=1), "expected FFCV format version 2, got 1"),
        (_header(num_fields=3), r"got 3 fields: image \(type 2\), label \(type 1\) and 1 more"),
        (_header(page_size=12345), "page size: expected a power of two of at least 2097152, got 12345"),
        (_header(num_samples=0), "contains no samples"),
        (_header(num_samples=1 << 60), "do not fit in a file of"),
        (_header(allocation_table=(1 << 64) - 1), "do not fit in a file of"),
        (lambda content: content.__setitem__(slice(24, 25), b"\x03"), r"got image \(type 3\) and label"),
        (_sample(4, "label", 3), "sample 4 has label 3, expected 0–2 for 3 classes"),
        (_sample(2, "label", -1), "sample 2 has label -1"),
        (_sample(5, "mode", 2), r"sample 5 has image mode 2, expected 0 \(JPEG\) or 1 \(raw\)"),
        (_sample(5, "height", 0), "sample 5 has an image without pixels"),
        (_sample(6, "pointer", 0), "sample 6 points to byte 0, but the allocation table says "),
        (_allocation(3, "sample", 4), "allocation table does not list every sample 0–9 exactly once"),
        (_allocation(3, "sample", 1 << 50), "allocation table does not list every sample 0–9 exactly once"),
        (_allocation(3, "size", (1 << 64) - 1), "sample 3 lies outside the file's pages"),
        (_allocation(3, "size", 0), "sample 3 has a size of 0 bytes"),
        (_allocation(3, "size", 1 << 20), "sample 4 overlaps another sample"),
    ],
)
def test_structure(file: Path, change: Callable[[bytearray], None], message: str) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        check_structure(read_tables(file), num_classes=3)
    assert one_line(error)
    sidecar_path(file).unlink()
    with pytest.raises(DataError):  # and it gets no sidecar
        build_sidecar(file, classes=CLASSES, writer={}, source={})


def test_raw_sizes_and_jpeg_markers(originals: dict[str, Path], tmp_path: Path) -> None:
    raw, jpg = (bytearray(originals[mode].read_bytes()) for mode in ("raw", "jpg"))
    _sample(8, "width", 51)(raw)
    (tmp_path / "raw").write_bytes(raw)
    with pytest.raises(DataError, match="sample 8 has a raw image of 6000 bytes, expected 6120"):
        check_structure(read_tables(tmp_path / "raw"), 3)
    _sample(8, "width", 51)(jpg)
    (tmp_path / "jpg").write_bytes(jpg)
    with pytest.raises(DataError, match=r"sample 8 is a JPEG of \(50, 40\) RGB, but the sample table says \(51, 40\)"):
        build_sidecar(tmp_path / "jpg", classes=CLASSES, writer={}, source={})
    tables = read_tables(tmp_path / "jpg")
    flip_byte(tmp_path / "jpg", int(tables.pointer[9] + tables.size[9] - 1))
    with pytest.raises(DataError, match="sample 9 is not a complete JPEG"):
        check_structure(tables, 3)


def test_a_jpeg_that_cannot_be_decoded_gets_no_sidecar(originals: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "broken.beton"
    path.write_bytes(originals["jpg"].read_bytes())
    tables = read_tables(path)
    with path.open("r+b") as file:
        file.seek(int(tables.pointer[1]) + 2)
        file.write(bytes(200))  # its tables of quantisation and sizes
    check_structure(tables, 3)
    with pytest.raises(DataError, match="sample 1 cannot be decoded"):
        build_sidecar(path, classes=CLASSES, writer={}, source={})


def test_a_sidecar_that_cannot_be_written_is_a_write_error(file: Path) -> None:
    sidecar_path(file).unlink()
    sidecar_path(file).mkdir()
    (sidecar_path(file) / "in the way").touch()
    with pytest.raises(WriteError, match=r"noise\.beton\.json: .*Is a directory"):
        save_sidecar(file, build_sidecar(file, classes=CLASSES, writer={}, source={}))
    assert not list(file.parent.glob(".*"))


def test_number_of_classes_and_class_lists(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 3 classes, but the model only 2") as error:
        verify(file, level=0, num_classes=2)
    assert one_line(error)
    train = verify(file)
    compare_class_lists(train, train)
    with pytest.raises(DataError, match=r"label 2 is 'cat' in .*noise.beton, but 'dog' in .*other.beton"):
        compare_class_lists(train, write(tmp_path / "other.beton", classes=["ant", "bee", "dog"]))
    with pytest.raises(DataError, match=r"has 3 classes, .* has 4"):
        compare_class_lists(train, write(tmp_path / "other.beton", classes=[*CLASSES, "dog"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_file_that_may_not_be_read(file: Path) -> None:
    def as_nobody() -> None:
        os.setuid(65534)
        try:
            verify(file, level=0)
        except PermissionDenied as error:
            os._exit(error.code if "user id 65534" in str(error) else 1)

    file.chmod(0o600)
    child = multiprocessing.get_context("fork").Process(target=as_nobody)
    child.start()
    child.join(20)
    assert child.exitcode == PermissionDenied.code


def test_level_1_of_a_million_samples_takes_seconds(tmp_path: Path) -> None:
    num_samples, page_size, size = 1_000_000, 1 << 21, 3 * 4 * 4
    per_page = page_size // size
    num_pages = -(-num_samples // per_page)
    index = np.arange(num_samples)
    start = beton_format.pages_start(num_samples, page_size)
    pointer = start + index // per_page * page_size + index % per_page * size

    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = 2, 2, page_size
    header["num_samples"], header["allocation_table"] = num_samples, start + num_pages * page_size
    fields = np.zeros(2, beton_format.FIELD)
    for row, (name, kind) in zip(fields, beton_format.FIELDS, strict=True):
        row["type_id"], row["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    samples = np.zeros(num_samples, SAMPLE)
    samples["label"] = index % 3
    samples["image"]["mode"], samples["image"]["width"], samples["image"]["height"] = beton_format.RAW, 4, 4
    samples["image"]["pointer"] = pointer
    allocations = np.zeros(num_samples, ALLOCATION)
    allocations["sample"], allocations["pointer"], allocations["size"] = index, pointer, size
    path = tmp_path / "million.beton"
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        file.seek(start + num_pages * page_size)
        file.write(allocations[np.random.default_rng(0).permutation(num_samples)].tobytes())
    save_sidecar(path, build_sidecar(path, classes=None, writer={}, source={}))

    started = time.monotonic()
    info = verify(path, level=1)
    assert time.monotonic() - started < 10
    assert (info.num_samples, info.classes) == (num_samples, ["0", "1", "2"])
