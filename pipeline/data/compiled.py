"""Compile functions with numba, always with the same flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

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


def compiled(function: F) -> F:
    """Compile with numba, with the same flags whoever calls it first."""
    return cast(F, njit(**NUMBA_FLAGS)(function))


def compiled_once(function: F) -> F:
    """Compile like ``compiled``, and cache the result on disk if possible.

    Not for functions that call functions of other files, because numba would not notice changes.
    """
    try:
        return cast(F, njit(**NUMBA_FLAGS, cache=True)(function))
    except RuntimeError:  # no folder for the cache is writable
        return compiled(function)
