"""What the study keeps of every run: the rows of its report, and what every network predicted for every image.

One cell is two files of benchmarks/results/study: ``NAME.json`` and ``NAME.npz``. Predictions are small whole numbers,
so that all of them fit into the repository: the class exactly; the negative log-likelihood in 96 steps that grow with
its value (6% of it); the confidence in steps of 1/255 where the prediction is wrong (where it is right, it follows
from the likelihood). What is computed from them again agrees with the report exactly for top-1, and within
``TOLERANCES`` for the others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.evaluation.predictions import FILE_NAME, load_predictions
from pipeline.files import parse_json, read_capped, write_atomically

MAX_BYTES = 1 << 27
FACTS = ("name", "kind", "top1", "nll", "ece", "density", "r_s", "training_flops_ratio", "inference_flops_ratio")
METRICS = ("top1", "nll", "ece")
TOLERANCES = {"top1": 1e-9, "nll": 2e-3, "ece": 2e-3}  # of what is computed from the stored predictions
LARGEST_NLL, SCALE, STEPS = (
    88.0,
    200.0,
    95,
)  # nats: float32 probabilities are at least 2^-126; steps are finest below 1/SCALE
GOLDEN = 0.618033988749895  # multiples of it are spread evenly over [0, 1)
NUM_BINS = 15  # of the calibration error, as in reports


@dataclass(frozen=True)
class CellResult:
    """All finished runs of one cell."""

    rows: Mapping[int, Sequence[Mapping[str, Any]]]  # seed -> the rows of its report, FACTS each
    disagreement: Mapping[int, float | None]  # seed -> mean share of images on which two tickets differ
    data_digest: str
    labels: NDArray[np.uint8]  # [images]
    top1: NDArray[np.uint8]  # [seeds, rows, images]
    nll: NDArray[np.uint8]  # codes, see decode_nll: [seeds, rows, images]
    confidence: NDArray[np.uint8]  # in steps of 1/255, 0 where top1 is the label: [seeds, rows, images]

    def values(self, row: str, metric: str) -> dict[int, float]:
        """Return a metric of one row by seed, as reported. Raises KeyError if there is no such row."""
        found = {seed: by_name[row][metric] for seed, by_name in self._by_name().items() if row in by_name}
        if not found:
            raise KeyError(row)
        return found

    def recomputed(self, row: str, metric: str) -> dict[int, float]:
        """Return the same, computed from the predictions for every image."""
        found = {}
        for position, (seed, rows) in enumerate(self.rows.items()):
            index = [each["name"] for each in rows].index(row)
            found[seed] = metric_of(
                metric,
                labels=self.labels,
                top1=self.top1[position, index],
                nll=self.nll[position, index],
                confidence=self.confidence[position, index],
            )
        return found

    def _by_name(self) -> dict[int, dict[str, Mapping[str, Any]]]:
        return {seed: {row["name"]: row for row in rows} for seed, rows in self.rows.items()}


def metric_of(
    metric: str,
    *,
    labels: NDArray[np.uint8],
    top1: NDArray[np.uint8],
    nll: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
) -> float:
    """Return top-1, NLL or ECE of one network from its stored predictions, [images] each."""
    if metric == "nll":
        return float(decode_nll(nll).mean())
    is_right = top1 == labels
    if metric == "top1":
        return float(is_right.mean())
    # all images of one step would change bins together: spread them over the step, each always to the same place
    spread = np.arange(len(labels)) * GOLDEN % 1 - 0.5
    likelihood = np.minimum(np.exp(-decode_nll(np.maximum(nll + spread, 0))), 1)
    probability = np.where(is_right, likelihood, (confidence + spread) / 255)
    bins = np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=is_right - probability, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def encode_nll(nll: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the code of each negative log-likelihood, in nats."""
    codes = STEPS * np.log1p(SCALE * np.minimum(nll, LARGEST_NLL)) / np.log1p(SCALE * LARGEST_NLL)
    return np.asarray(np.rint(codes), dtype=np.uint8)


def decode_nll(codes: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the negative log-likelihood that a code stands for, in nats."""
    return np.asarray(np.expm1(codes / STEPS * np.log1p(SCALE * LARGEST_NLL)) / SCALE)


def collect(reports: Mapping[int, Path]) -> CellResult:
    """Read the reports of one cell.

    Args:
        reports: seed -> folder of its report.

    Raises:
        IntegrityError: a report is damaged, or they were made on different images.
    """
    rows, disagreement, found = {}, {}, []
    for seed, folder in sorted(reports.items()):
        report = parse_json(read_capped(folder / "report.json", MAX_BYTES))
        rows[seed] = [{fact: row[fact] for fact in FACTS} for row in report["rows"]]
        disagreement[seed] = report["disagreement"]
        found.append(load_predictions(folder / FILE_NAME))
    digests = {each.data_digest for each in found}
    if len(digests) != 1:
        raise IntegrityError("the runs of a cell were evaluated on different images", do="run them again on one set")
    return CellResult(
        rows,
        disagreement,
        digests.pop(),
        found[0].labels.astype(np.uint8),
        np.stack([each.top1.astype(np.uint8) for each in found]),
        np.stack([encode_nll(each.nll) for each in found]),
        np.stack(
            [np.where(each.top1 == each.labels, 0, np.rint(255 * each.confidence)).astype(np.uint8) for each in found]
        ),
    )


def merge(kept: CellResult | None, new: CellResult) -> CellResult:
    """Return the runs of both; a seed that both have is taken from ``new``.

    Raises:
        IntegrityError: they were evaluated on different images, or have different rows.
    """
    if kept is None:
        return new
    names = [{tuple(str(row["name"]) for row in rows) for rows in each.rows.values()} for each in (kept, new)]
    if kept.data_digest != new.data_digest or names[0] != names[1]:
        raise IntegrityError("the kept results are of other images or networks", do="name another --results")
    parts = [(seed, each, index) for each in (kept, new) for index, seed in enumerate(each.rows)]
    by_seed = {seed: (each, index) for seed, each, index in sorted(parts, key=lambda part: part[0])}
    top1, nll, confidence = (
        np.stack([getattr(each, name)[index] for each, index in by_seed.values()])
        for name in ("top1", "nll", "confidence")
    )
    rows = {seed: each.rows[seed] for seed, (each, _) in by_seed.items()}
    disagreement = {seed: each.disagreement[seed] for seed, (each, _) in by_seed.items()}
    return CellResult(rows, disagreement, new.data_digest, new.labels, top1, nll, confidence)


def save(result: CellResult, name: str, folder: Path) -> None:
    """Write the two files of a cell. Raises WriteError and PermissionDenied."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "data_digest": result.data_digest,
        "disagreement": {str(seed): value for seed, value in result.disagreement.items()},
        "seeds": {str(seed): [dict(row) for row in rows] for seed, rows in result.rows.items()},
    }
    content = io.BytesIO()
    # classes differ little between networks: what is stored is 0 where the prediction is right
    np.savez_compressed(
        content,
        labels=result.labels,
        top1=result.top1 - result.labels,
        nll=result.nll,
        confidence=result.confidence,
    )
    write_atomically(folder / f"{file_stem(name)}.npz", content.getvalue())
    write_atomically(folder / f"{file_stem(name)}.json", (json.dumps(text, indent=1) + "\n").encode())


def load(name: str, folder: Path) -> CellResult | None:
    """Read the two files of a cell; None if it has no result yet.

    Raises:
        IntegrityError: they do not belong together.
    """
    path = folder / f"{file_stem(name)}.json"
    if not path.is_file():
        return None
    text = parse_json(read_capped(path, MAX_BYTES))
    rows = {int(seed): found for seed, found in text["seeds"].items()}
    content = read_capped(path.with_suffix(".npz"), MAX_BYTES)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        labels = arrays["labels"]
        result = CellResult(
            rows,
            {int(seed): value for seed, value in text["disagreement"].items()},
            text["data_digest"],
            labels,
            arrays["top1"] + labels,
            arrays["nll"],
            arrays["confidence"],
        )
    if result.top1.shape != (len(rows), len(next(iter(rows.values()))), len(labels)):
        raise IntegrityError(f"{path}: does not belong to the .npz file beside it", do="collect the cell again")
    return result


def file_stem(name: str) -> str:
    """Return the name of a cell's files: ``emoji/0.05/set`` becomes ``emoji-0.05-set``."""
    return name.replace("/", "-")
