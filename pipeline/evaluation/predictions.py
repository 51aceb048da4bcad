"""``predictions.npz``: what every network of a report predicted for every image, for tests of one's own.

The file needs only numpy to be read; docs/evaluation.md lists its arrays.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.files import cannot_read, read_capped, write_atomically

FILE_NAME = "predictions.npz"
MAX_BYTES = 1 << 32
AGAIN = "evaluate the tickets again"


@dataclass(frozen=True)
class Predictions:
    """The prediction of every network or ensemble for every image, in the order of the images in the set."""

    names: tuple[str, ...]  # of the report's rows
    labels: NDArray[np.unsignedinteger]  # [images]
    top1: NDArray[np.unsignedinteger]  # most probable class, the lowest of a tie: [rows, images]
    nll: NDArray[np.float32]  # negative log-likelihood of the label in nats: [rows, images]
    confidence: NDArray[np.float32]  # probability of the most probable class: [rows, images]
    data_digest: str = ""  # of the evaluation set: all images, labels and class names


def save_predictions(predictions: Predictions, path: Path, *, data_digest: str) -> None:
    """Write the file; classes are uint16, or uint32 if there are more than 65,536.

    ``data_digest`` identifies the evaluation set.

    Raises:
        WriteError, PermissionDenied: it cannot be written.
    """
    largest = max(int(predictions.labels.max(initial=0)), int(predictions.top1.max(initial=0)))
    kind = np.uint16 if largest < 1 << 16 else np.uint32
    content = io.BytesIO()
    np.savez_compressed(
        content,
        data_digest=np.array(data_digest),
        names=np.array(predictions.names),
        labels=predictions.labels.astype(kind),
        top1=predictions.top1.astype(kind),
        nll=predictions.nll.astype(np.float32),
        confidence=predictions.confidence.astype(np.float32),
    )
    write_atomically(path, content.getvalue())


def predictions_digest(predictions: Predictions) -> str:
    """Return the sha256 (hex) of names, digest of the data, and the bytes of every array, little-endian."""
    sha = hashlib.sha256(json.dumps([predictions.data_digest, *predictions.names]).encode())
    for array, kind in (
        *((array, "<u4") for array in (predictions.labels, predictions.top1)),
        *((array, "<f4") for array in (predictions.nll, predictions.confidence)),
    ):
        sha.update(np.ascontiguousarray(array).astype(kind).tobytes())
    return sha.hexdigest()


def load_predictions(path: Path) -> Predictions:
    """Read the file.

    Raises:
        IntegrityError: it is missing, or is not what :func:`save_predictions` writes.
        PermissionDenied, WriteError: it cannot be read.
    """
    try:
        with np.load(io.BytesIO(read_capped(path, MAX_BYTES)), allow_pickle=False) as arrays:
            found = Predictions(
                tuple(map(str, arrays["names"])),
                labels=arrays["labels"],
                top1=arrays["top1"],
                nll=arrays["nll"],
                confidence=arrays["confidence"],
                data_digest=str(arrays["data_digest"]),
            )
    except FileNotFoundError:
        raise IntegrityError(f"{path}: does not exist", do=AGAIN) from None
    except OSError as error:
        raise cannot_read(path, error) from None
    except Exception as error:  # numpy and zipfile raise many kinds on damaged input
        raise IntegrityError(
            f"{path}: is not a file of predictions: {error}", do="evaluate the tickets again"
        ) from None
    shape = (len(found.names), *found.labels.shape)
    if found.labels.ndim != 1 or any(of.shape != shape for of in (found.top1, found.nll, found.confidence)):
        raise IntegrityError(f"{path}: its arrays have different lengths", do=AGAIN)
    return found
