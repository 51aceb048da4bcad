"""One file with images, labels and configurations of the study's cells, for a machine with torch and numpy alone.

The file is compressed by numpy and holds no code. ``python -m benchmarks.study pack`` writes it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support import study_results
from benchmarks.support.study_cells import CELLS, FASHION, MAIN_DENSITY, data_settings
from pipeline.config.schema import Config
from pipeline.errors import DataError
from pipeline.files import write_atomically

MAX_BYTES = 40 * 10**6
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Pack:
    """What the file holds."""

    images: Mapping[str, NDArray[np.uint8]]  # by split: [n, height, width, 3]
    labels: Mapping[str, NDArray[np.int64]]  # by split: [n]
    configurations: Mapping[str, Config]  # by name of the cell
    top1: Mapping[str, list[float]]  # of the first ticket, on a CPU; by name of the cell, one per kept run


def write(path: Path, *, data: Path, results: Path) -> str:
    """Write the cells of Fashion-MNIST at the main density and its dense ones; return a line about the file.

    Args:
        path: the file.
        data: folder of the data sets, by name.
        results: folder of the results that are kept.

    Raises:
        DataError: the data set is missing, or the file would be larger than 40 MB.
    """
    from pipeline.config.load import load_config

    cells = [cell for cell in CELLS.values() if cell.name.startswith((f"{FASHION}/{MAIN_DENSITY}/", f"{FASHION}/1/"))]
    configs = {cell.name: load_config(cell.config, [*data_settings(cell, data), *cell.settings]) for cell in cells}
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        images, labels = _read(next(iter(configs.values())), split)
        is_grey = bool((images == images[..., :1]).all())
        arrays |= {f"{split}_images": images[..., 0] if is_grey else images, f"{split}_labels": labels}
    top1 = {}
    for cell in cells:
        if (kept := study_results.load(cell.name, results)) is not None:
            top1[cell.name] = list(kept.values(kept.names[0], "top1").values())
    described = {
        "configurations": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "top1": top1,
    }
    arrays["described"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    size = len(content.getvalue())
    if size > MAX_BYTES:
        raise DataError(f"{path}: expected at most {MAX_BYTES / 1e6:.0f} MB, got {size / 1e6:.1f} MB")
    write_atomically(path, content.getvalue())
    num = sum(len(arrays[f"{split}_labels"]) for split in SPLITS)
    use = f"python -m benchmarks.gpu --study 120 --pack {path.name}"
    return f"{path}: {num} images, {len(cells)} cells, {size / 1e6:.1f} MB; {use}"


def _read(config: Config, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images of a split as they are stored, and their labels."""
    from pipeline.data.augment import evaluation_augmentation
    from pipeline.data.loaders import open_source

    path, side = Path(getattr(config.data, split)), config.data.eval_resolution
    source = open_source(path, config.data, evaluation_augmentation(config.data), resolution=side)
    parts = [
        (images.permute(0, 2, 3, 1).numpy().copy(), labels.view(-1).numpy().astype(np.int64))
        for images, labels in source.batches(np.arange(source.num_samples), batch=500, key=0, resolution=side)
    ]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images, labels


def read(path: Path) -> Pack:
    """Read the file.

    Raises:
        DataError: it is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = {split: arrays[f"{split}_images"] for split in SPLITS}
            labels = {split: arrays[f"{split}_labels"] for split in SPLITS}
            described = json.loads(arrays["described"].tobytes())
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is not a file of python -m benchmarks.study pack: {error}") from error
    return Pack(
        {s: np.repeat(each[..., None], 3, axis=3) if each.ndim == 3 else each for s, each in images.items()},
        labels,
        {name: _rebuilt(Config, values) for name, values in described["configurations"].items()},
        described["top1"],
    )


def _rebuilt(kind: Any, values: Any) -> Any:
    """Return what ``dataclasses.asdict`` was given."""
    if not dataclasses.is_dataclass(kind) or not isinstance(values, dict):
        return values
    hints = typing.get_type_hints(kind)
    return kind(**{name: _rebuilt(_section(hints[name]), value) for name, value in values.items()})  # type: ignore[operator]


def _section(hint: Any) -> Any:
    """Return the dataclass in an annotation such as ``Section | None``, or the annotation itself."""
    return next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), hint)


def mean(values: list[float]) -> float:
    """Return the mean in percent."""
    return 100 * statistics.fmean(values)
