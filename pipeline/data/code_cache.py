"""Keep compiled functions that call functions of several files on disk, so that each process need not compile them.

numba's own cache notices only changes of the file that a function is in, and cannot tell two closures
apart that call different functions. Two processes that write it at once can exchange the code of two
signatures. Here a file of the cache is named by a digest of all that its code depends on: every source
file of this package, the values in closures, the signature, the processor, and the versions of numba,
llvmlite, numpy and Python. What numba cannot keep is compiled as before.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

OURS = "pipeline.data."  # the package whose files are part of the digest


def kept_on_disk(dispatcher: Any) -> Any:
    """Return ``dispatcher``, which now looks on disk before it compiles and keeps there what it compiles.

    Without a change if its code depends on something that the digest does not cover, such as a
    function of another package in its closure, or if no folder for the cache can be written.
    """
    try:
        dispatcher._cache = _Cache(dispatcher.py_func, repr(_described(dispatcher)))
    except (TypeError, RuntimeError, OSError) as error:
        logger.debug("%r is not kept on disk: %s", dispatcher, error)
    return dispatcher


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function, with a file for every digest; a file that cannot be read or written is ignored."""

    def __init__(self, function: Any, described: str) -> None:
        super().__init__(function)
        self._described = described

    def _index_key(self, sig: Any, codegen: Any) -> str:
        """Name the file of this signature; numba calls this before it reads and before it writes."""
        parts = (self._described, repr(sig), repr(codegen.magic_tuple()), _sources())
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        name = f"{self._impl.filename_base}-{digest[:32]}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, source_stamp=digest)
        return digest

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # pickle may raise anything for a damaged file
            logger.debug("compiled code is not used: %r", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.debug("compiled code is not kept: %r", error)


@functools.cache
def _sources() -> str:
    """Return a digest of the source files of this package and of the versions that compile them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    digest.update(repr([platform.python_version(), *map(version, ("numba", "llvmlite", "numpy"))]).encode())
    return digest.hexdigest()


def _described(value: Any) -> object:
    """Return all that the code of a compiled function depends on besides its source; TypeError if that is not known."""
    if isinstance(value, Dispatcher):
        function = value.py_func
        if not function.__module__.startswith(OURS):
            raise TypeError(f"{function.__module__}.{function.__qualname__} is not of this package")
        cells = [_described(cell.cell_contents) for cell in function.__closure__ or ()]
        flags = sorted(value.targetoptions.items())
        return function.__module__, function.__qualname__, function.__code__.co_firstlineno, flags, cells
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, bool | int | float | np.generic):
        return repr(value)
    raise TypeError(f"{value!r} in a closure")
