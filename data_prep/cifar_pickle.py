"""Read the pickles of the Python version of CIFAR without running anything that they name.

They hold dictionaries, lists, numbers and text, and arrays of bytes as numpy 1 pickled them under
Python 2. The three names that such an array needs are mapped to small classes of this module; any
other name, and any other state, is rejected.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError


class _DType:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and alignment, which single bytes do not have."""


class _Array:
    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        _, shape, dtype, is_fortran, content = self.state
        if (
            not isinstance(dtype, _DType)
            or dtype.name not in ("u1", "|u1")
            or not isinstance(shape, tuple)
            or not isinstance(content, str)
        ):
            raise ValueError("holds an array of anything but bytes")
        array = np.frombuffer(content.encode("latin-1"), dtype=np.uint8)
        return array.reshape([int(length) for length in shape], order="F" if is_fortran else "C")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): None,  # only ever an argument of the above
            ("numpy", "dtype"): _DType,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to an object outside the file")


def unpickle(content: bytes, source: Path) -> dict[str, Any]:
    """Return the dictionary that ``content`` holds; its arrays are uint8.

    Args:
        content: a pickle.
        source: the file to name in an error.

    Raises:
        DataError: ``content`` is damaged or holds anything that CIFAR does not.
    """
    try:
        loaded = _Restricted(io.BytesIO(content), encoding="latin-1").load()
        if not isinstance(loaded, dict):
            raise ValueError("is not a dictionary")
        return {str(key): value.to_numpy() if isinstance(value, _Array) else value for key, value in loaded.items()}
    except Exception as error:  # damaged pickles raise almost anything
        raise DataError(
            f"{source}: is not a file of CIFAR's Python version: {error}",
            do="download the archive again, or use the binary version",
        ) from None
