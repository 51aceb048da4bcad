"""Compile functions with numba, always with the same flags.

Without numba they run as they are, with the same results, a hundred times as slowly: enough to
prepare single images for a ticket.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

try:
    from numba import njit
except ImportError:
    njit = None
    logging.getLogger(__name__).warning(
        "numba is not installed: images are cropped and resized slowly; do: python -m pip install numba"
    )

F = TypeVar("F", bound=Callable[..., Any])

# Every flag that numba otherwise inherits from the function that is being compiled at the time, or
# takes from the environment. ffcv compiles with fastmath; a function without the flag that is compiled
# inside for the first time would inherit it, and the machine code would be cached on disk.
NUMBA_FLAGS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "forceinline": False,
    "parallel": False,
    "boundscheck": False,
    "debug": False,
    "_nrt": True,
}


def is_compiling() -> bool:
    """Return whether numba is there."""
    return njit is not None


def compiled(function: F) -> F:
    """Compile with numba, with the same flags whoever calls it first."""
    if njit is None:
        return function
    return cast(F, njit(**NUMBA_FLAGS)(function))


def compiled_once(function: F) -> F:
    """Compile like ``compiled``, and cache the result on disk if possible.

    Not for functions that call functions of other files, because numba would not notice changes.
    """
    if njit is None:
        return function
    try:
        return cast(F, njit(**NUMBA_FLAGS, cache=True)(function))
    except RuntimeError:  # no folder for the cache is writable
        return compiled(function)
