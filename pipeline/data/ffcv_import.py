"""What importing ffcv changes and costs, undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from numba import typed


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block.

    ffcv sets it to one when it is imported, and to its number of workers when a loader is made.
    """
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Import ffcv inside this block: torch keeps its number of threads, and nothing is compiled.

    ffcv has a table of two entries, the forms in which an image is stored, that only Python reads. As a
    ``numba.typed.Dict`` numba would compile its methods anew in every process: 6 seconds of processor
    where importing all of ffcv else takes one. Inside the block it is a dict.
    """
    with keep_torch_threads(), patch.object(typed, "Dict", dict):
        yield
