"""Memory for large arrays, in huge pages where the kernel has them."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

HUGE_PAGE = 2**21  # bytes


def private_memory(num_bytes: int) -> mmap.mmap:
    """Map memory of zeros, which is given back when nothing refers to it, and which a fork does not share."""
    return mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def in_huge_pages(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return ``num_bytes`` zeros that start at a huge page.

    The first access to a page costs the kernel about as much whether it has 4 KiB or 2 MiB, and
    small pages that lie far apart miss in the processor's table of pages.
    """
    size = -(-(num_bytes + HUGE_PAGE) // HUGE_PAGE) * HUGE_PAGE
    memory = private_memory(size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(memory, np.uint8)
    start = -everything.ctypes.data % HUGE_PAGE
    return everything[start : start + num_bytes]
