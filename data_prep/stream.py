"""Images that can be read only once, such as those of a generator, as a data set that can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.files import cannot_write


class Stream:
    """The images of an iterable, as pixels in a temporary file that goes away with this object.

    Args:
        images: pairs of an image, uint8 [height, width, 3], and its label.
        folder: where the temporary file lies; None: where the system keeps temporary files.

    Raises:
        DataError: an item is not such a pair.
        WriteError: there is no space left.
    """

    def __init__(self, images: Iterable[tuple[Any, int]], *, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (as long as this object)
        self._rows: list[tuple[int, tuple[int, ...], int]] = []  # start, shape, label
        start = 0
        for number, (image, label) in enumerate(images):
            pixels = checked(image, f"image {number}")
            try:
                self._file.write(np.ascontiguousarray(pixels).data)
            except OSError as error:
                raise cannot_write(Path(folder or tempfile.gettempdir()), error, num_bytes=pixels.nbytes) from None
            self._rows.append((start, pixels.shape, int(label)))
            start += pixels.nbytes
        self._file.flush()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        start, shape, label = self._rows[index]
        content = os.pread(self._file.fileno(), int(np.prod(shape)), start)  # workers share the position in the file
        return np.frombuffer(content, np.uint8).reshape(shape), label


def checked(image: Any, which: str) -> np.ndarray:
    """Return an image of one's own data set.

    Raises:
        DataError: it is not an array uint8 [height, width, 3].
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise DataError(
        f"{which}: expected an array uint8 [height, width, 3], got {found}",
        do='pass np.asarray(picture.convert("RGB"))',
    )
