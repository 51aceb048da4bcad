"""Pixels and boxes do not depend on what was compiled first, on a cache of compiled code, or on the processor."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from pipeline.data import code_cache
from pipeline.data.augment import Augmentation, centre_box
from pipeline.data.code_cache import kept_on_disk
from pipeline.data.compiled import compiled
from pipeline.data.decoder import KeyedDecoder
from pipeline.data.ffcv_source import _compile_reader
from tests.support.launch import ROOT

# numba takes the first from the function that it is compiling, the second from the environment
INHERITED = {"fastmath", "error_model", "forceinline", "_nrt"}
FROM_ENVIRONMENT = {"boundscheck", "debug"}

# Prints a hash of the boxes and pixels of photographs.
HASH = """
import hashlib, sys
import numba, numpy as np
from pipeline.data import augment

box = augment.random_crop_box(0.08)
if sys.argv[2] == "inside":  # the first call is compiled inside a function with other flags, as ffcv's are

    @numba.njit(fastmath=True, nogil=True, error_model="numpy")
    def outer(image, out, stream, is_flipped):
        augment.resize(image, box(image.shape[0], image.shape[1], stream), is_flipped, out)

    outer(np.zeros((9, 9, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.uint64(1), False)

files = np.load(sys.argv[1])
all_of = hashlib.sha256()
for name in sorted(files):
    image = files[name]
    height, width, _ = image.shape
    for sample, side in enumerate((224, 176, 97)):
        stream = np.uint64(augment.sample_stream(np.uint64(5), sample))
        crops = [box(height, width, stream), augment.centre_box(0.875)(height, width, stream)]
        for crop in crops:
            out = np.empty((side, side, 3), np.uint8)
            augment.resize(image, crop, sample == 1, out)
            all_of.update(np.array(crop).tobytes() + out.tobytes())
boxes = [box(375, 500, np.uint64(augment.sample_stream(np.uint64(7), sample))) for sample in range(20_000)]
all_of.update(np.array(boxes).tobytes())
print(all_of.hexdigest())
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    resized = np.asarray(Image.fromarray(china).resize((640, 427), Image.Resampling.LANCZOS))
    path = tmp_path_factory.mktemp("photographs") / "photographs.npz"
    np.savez(path, china=resized, flower=flower, chelsea=data.chelsea(), coffee=data.coffee())
    return path


def test_boxes_and_pixels_are_the_same_in_every_order_of_compilation_and_on_every_processor(
    photographs: Path, tmp_path: Path
) -> None:
    """Each process has an empty cache of compiled code."""
    running: dict[str, subprocess.Popen[str]] = {}
    for name, order, cpu in (("alone", "alone", ""), ("inside", "inside", ""), ("generic", "inside", "generic")):
        environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / name)} | ({"NUMBA_CPU_NAME": cpu} if cpu else {})
        command = [sys.executable, "-c", HASH, str(photographs), order]
        running[name] = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    hashes = {name: process.communicate(timeout=300)[0].strip() for name, process in running.items()}
    assert all(hashes.values()) and len(set(hashes.values())) == 1, hashes


def test_every_function_states_every_flag() -> None:
    import pipeline.data.folder  # noqa: F401
    from pipeline.data.augment import pad_crop, random_crop_box
    from pipeline.sparse import select

    made: list[Any] = [centre_box(1.0), pad_crop([0, 0, 0]), random_crop_box(0.08), select._kernels()]
    ours = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), Dispatcher)
        and each.py_func.__module__.startswith("pipeline.")
        and ".generate_code." not in each.py_func.__qualname__  # of a loader that is still open; ffcv compiles these
    ]
    assert len(ours) >= 15 and made
    for function in ours:
        given = function.targetoptions
        missing = (INHERITED | FROM_ENVIRONMENT | {"nogil", "parallel"}) - given.keys()
        assert not missing, f"{function.py_func.__qualname__}: {missing}"
        assert given["fastmath"] is False, function.py_func.__qualname__


def test_kept_code_is_used_only_for_equal_closures_signatures_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))

    def box_and_hits(ratio: float, height: Any = 100) -> tuple[tuple[int, ...], int]:
        box: Any = kept_on_disk(centre_box(ratio))
        return box(height, 200, np.uint64(0)), sum(box.stats.cache_hits.values())

    half = (25, 75, 50, 50)  # the centred square of half of 100 pixels
    assert [box_and_hits(0.5) for _ in range(2)] == [(half, 0), (half, 1)]
    assert box_and_hits(0.25) == ((37, 87, 25, 25), 0)  # other code, although it is the same line of the same file
    assert box_and_hits(0.5, np.uint8(100)) == (half, 0)
    assert box_and_hits(0.5) == (half, 1)
    with monkeypatch.context() as changed:
        changed.setattr(code_cache, "_sources", lambda: "of another version")
        assert box_and_hits(0.5) == (half, 0)
    kept = list(tmp_path.rglob("*.nbc"))
    assert len(kept) == 4
    for path in kept:
        path.write_bytes(b"damaged")
    assert box_and_hits(0.5) == (half, 0)
    assert box_and_hits(0.5) == (half, 1)  # compiled and written again


def test_code_of_another_package_is_not_kept() -> None:
    other = compiled(lambda number: number + 1)

    @compiled
    def ours(number: int) -> int:
        return other(number)

    assert ours(1) == 2
    kept: Any = kept_on_disk(ours)
    assert not isinstance(kept._cache, code_cache._Cache)


def test_the_decoder_and_the_reader_of_files_are_kept() -> None:
    read = _compile_reader()
    decoder = KeyedDecoder(8, Augmentation(centre_box(1.0)))
    decoder.accept_globals(None, read)
    (decode_one,) = (
        cell.cell_contents
        for cell in decoder.generate_code().__closure__ or ()
        if isinstance(cell.cell_contents, Dispatcher)
    )
    assert isinstance(decode_one._cache, code_cache._Cache)
    assert isinstance(read._cache, code_cache._Cache)
