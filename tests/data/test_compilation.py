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
    from numba.core.dispatcher import Dispatcher

    import pipeline.data.ffcv_source
    import pipeline.data.folder  # noqa: F401
    from pipeline.data.augment import centre_box, pad_crop, random_crop_box
    from pipeline.sparse import select

    made: list[Any] = [centre_box(1.0), pad_crop([0, 0, 0]), random_crop_box(0.08), select._kernels()]
    ours = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), Dispatcher)
        and (each.py_func.__module__.startswith("pipeline.") or "imdecode" in str(each))
        and ".generate_code." not in each.py_func.__qualname__  # of a loader that is still open; ffcv compiles these
    ]
    assert len(ours) >= 15 and made
    for function in ours:
        given = function.targetoptions
        missing = (INHERITED | FROM_ENVIRONMENT | {"nogil", "parallel"}) - given.keys()
        assert not missing, f"{function.py_func.__qualname__}: {missing}"
        assert given["fastmath"] is False, function.py_func.__qualname__
