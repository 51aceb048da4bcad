"""What the study keeps of every run: the rows of its report, and what every network predicted for every image.

One cell, or one evaluation after training, is two files of benchmarks/results/study: ``NAME.json`` and ``NAME.npz``.
Predictions are small whole numbers, so that all of them fit into the repository: the class exactly; the negative
log-likelihood in 191 steps that grow with its value (3% of it); the confidence in steps of 1/255 where the prediction
is wrong (where it is right, it follows from the likelihood), and whether that puts the image into another bin of the
ECE than it was in. Of rows that only accuracy is asked of, the class alone is kept. What is computed from them again
agrees with the report exactly for top-1, and within ``TOLERANCES`` for the others.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.evaluation.predictions import FILE_NAME, Predictions, load_predictions
from pipeline.files import parse_json, read_capped, write_atomically

MAX_BYTES = 1 << 27
COSTS = ("density", "r_s", "training_flops_ratio", "inference_flops_ratio")
METRICS = ("top1", "nll", "ece")
MILLISECONDS = "ms"  # of one image: processor time of one thread, median
AUROC = "auroc"  # of telling the test images from others by the confidence
TOLERANCES = {"top1": 1e-9, "nll": 2e-3, "ece": 2e-3, AUROC: 2e-3}  # of what is computed from the stored predictions
LARGEST_NLL = 88.0  # nats: float32 probabilities are at least 2^-126
SCALE, STEPS = 200.0, 190  # of the codes of the NLL: steps are finest below 1/SCALE nats
GOLDEN = 0.618033988749895  # multiples of it are spread evenly over [0, 1)
NUM_BINS = 15  # of the calibration error, as in reports
OTHER = 255  # label of an image of none of the classes
TICKETS = ("ticket", "dense")  # kinds of rows that are one network of one run

Row = Mapping[str, Any]  # name, kind, COSTS, and the metrics that can be computed from what is kept


@dataclass(frozen=True)
class RunResult:
    """What is kept of one run."""

    rows: Sequence[Row]
    predictions: Predictions  # of an image of none of the classes, nll is −log of the confidence
    num_parts: int = 1  # see CellResult


@dataclass(frozen=True)
class CellResult:
    """All finished runs of one cell."""

    rows: Mapping[int, Sequence[Row]]  # by seed
    data_digest: str
    labels: NDArray[np.uint8]  # [images]
    top1: NDArray[np.uint8]  # [seeds, rows, images]
    nll: NDArray[np.uint8]  # codes, see decode_nll: [seeds, rows that are whole, images]
    confidence: NDArray[np.uint8]  # in steps of 1/255, 0 where top1 is the label: [seeds, rows that are whole, images]
    bin_shift: NDArray[np.int8]  # from the bin of the ECE that the codes tell to the image's own; 0 in older files
    num_parts: int = 1  # equal sets that the images are, one after the other; a metric is the mean over them

    @property
    def names(self) -> list[str]:
        """The names of the rows."""
        return [str(row["name"]) for row in next(iter(self.rows.values()))]

    def values(self, row: str, metric: str) -> dict[int, float]:
        """Return a metric of one row by seed, as reported. Raises KeyError if there is no such row or metric."""
        return {seed: self._of(seed, row)[metric] for seed in self.rows}

    def recomputed(self, row: str, metric: str) -> dict[int, float]:
        """Return the same, computed from the predictions for every image."""
        found, index = {}, self.names.index(row)
        first = next(iter(self.rows.values()))
        whole = [number for number, each in enumerate(first) if is_whole(each)]
        if metric != "top1" and index not in whole:
            raise KeyError(metric)
        for position, seed in enumerate(self.rows):
            arrays = [self.labels, self.top1[position, index]]
            if index in whole:
                arrays += [array[position, whole.index(index)] for array in (self.nll, self.confidence, self.bin_shift)]
            parts = zip(*(np.split(array, self.num_parts) for array in arrays), strict=True)
            found[seed] = float(np.mean([metric_of(metric, *part) for part in parts]))
        return found

    def disagreement(self) -> dict[int, float]:
        """Return by seed on which share of the images two tickets differ, mean over pairs; empty with one ticket."""
        tickets = [number for number, row in enumerate(next(iter(self.rows.values()))) if row["kind"] in TICKETS]
        pairs = list(combinations(tickets, 2))
        return {
            seed: float(np.mean([(classes[one] != classes[other]).mean() for one, other in pairs]))
            for seed, classes in zip(self.rows, self.top1, strict=True)
            if pairs
        }

    def _of(self, seed: int, row: str) -> Row:
        return next((each for each in self.rows[seed] if each["name"] == row), {})


def is_whole(row: Row) -> bool:
    """Return whether likelihoods and confidences of a row are kept, besides the classes."""
    return "nll" in row or AUROC in row


def metric_of(
    metric: str,
    labels: NDArray[np.uint8],
    top1: NDArray[np.uint8],
    nll: NDArray[np.uint8] | None = None,
    confidence: NDArray[np.uint8] | None = None,
    bin_shift: NDArray[np.int8] | int = 0,
) -> float:
    """Return top-1, NLL, ECE or AUROC of one network from its stored predictions, [images] each."""
    is_right = top1 == labels
    if metric == "top1":
        return float(is_right.mean())
    assert nll is not None and confidence is not None
    if metric == "nll":
        return float(decode_nll(nll).mean())
    if metric == AUROC:
        is_other = labels == OTHER
        scores = np.where(is_right | is_other, np.exp(-decode_nll(nll)), confidence / 255)
        known, other = scores[~is_other], np.sort(scores[is_other])
        below, not_above = (np.searchsorted(other, known, side=side) for side in ("left", "right"))
        return float((below + not_above).mean() / (2 * len(other)))
    probability = _probability(is_right, nll, confidence)
    gaps = np.bincount(_bins(probability) + bin_shift, weights=is_right - probability, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _probability(
    is_right: NDArray[np.bool_], nll: NDArray[np.uint8], confidence: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Return the confidence that the codes tell, [images].

    All images of one step would be a little off in the same direction: they are spread over the step, each
    always to the same place.
    """
    spread = np.arange(len(is_right)) * GOLDEN % 1 - 0.5
    likelihood = np.minimum(np.exp(-decode_nll(np.maximum(nll + spread, 0))), 1)
    return np.where(is_right, likelihood, (confidence + spread) / 255)


def _bins(probability: NDArray[Any]) -> NDArray[np.int64]:
    return np.clip((probability * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)


def encode_nll(nll: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the code of each negative log-likelihood, in nats."""
    codes = STEPS * np.log1p(SCALE * np.minimum(nll, LARGEST_NLL)) / np.log1p(SCALE * LARGEST_NLL)
    return np.asarray(np.rint(codes), dtype=np.uint8)


def decode_nll(codes: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the negative log-likelihood that a code stands for, in nats."""
    return np.asarray(np.expm1(codes / STEPS * np.log1p(SCALE * LARGEST_NLL)) / SCALE)


def collect(reports: Mapping[int, Path], *, kinds: Collection[str]) -> CellResult:
    """Read the reports of one cell.

    Args:
        reports: seed -> folder of its report.
        kinds: of rows that are kept whole, besides the last ticket; of the others only the classes are.

    Raises:
        IntegrityError: a report is damaged, or they were made on different images.
    """
    found = {}
    for seed, folder in sorted(reports.items()):
        rows = parse_json(read_capped(folder / "report.json", MAX_BYTES))["rows"]
        last = [row["name"] for row in rows if row["kind"] in TICKETS][-1]
        whole = [row["name"] for row in rows if row["name"] == last or row["kind"] in kinds]
        facts = [facts_of(row, METRICS if row["name"] in whole else METRICS[:1]) for row in rows]
        found[seed] = RunResult(facts, load_predictions(folder / FILE_NAME))
    return gather(found)


def facts_of(row: Row, metrics: Sequence[str]) -> Row:
    """Return what is kept of a row of a report."""
    return {key: row[key] for key in ("name", "kind", *metrics, *COSTS)}


def gather(found: Mapping[int, RunResult]) -> CellResult:
    """Put runs together, by seed. Raises IntegrityError if they were made on different images or have other rows."""
    digests = {each.predictions.data_digest for each in found.values()}
    names = {tuple((row["name"], is_whole(row)) for row in each.rows) for each in found.values()}
    if len(digests) != 1 or len(names) != 1:
        raise IntegrityError(
            "the runs of a cell were evaluated on different images or networks", do="run them again on one set"
        )
    whole = [index for index, (_, is_kept) in enumerate(names.pop()) if is_kept]
    predictions = [each.predictions for each in found.values()]
    labels = predictions[0].labels.astype(np.uint8)
    codes = [_codes(each.predictions, whole, each.num_parts) for each in found.values()]
    nll, confidence, bin_shift = (np.stack(arrays) for arrays in zip(*codes, strict=True))
    return CellResult(
        {seed: each.rows for seed, each in found.items()},
        digests.pop(),
        labels,
        np.stack([each.top1.astype(np.uint8) for each in predictions]),
        nll,
        confidence,
        bin_shift,
        next(iter(found.values())).num_parts,
    )


def _codes(
    of: Predictions, rows: Sequence[int], num_parts: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int8]]:
    """Return what is kept of some rows besides their classes, [rows, images] each; see :class:`CellResult`."""
    if not rows:
        shape = (0, len(of.labels))
        return np.empty(shape, np.uint8), np.empty(shape, np.uint8), np.empty(shape, np.int8)
    nll = encode_nll(of.nll[rows])
    is_right, is_other = of.top1[rows] == of.labels, of.labels == OTHER
    confidence = np.where(is_right | is_other, 0, np.rint(255 * of.confidence[rows])).astype(np.uint8)
    told = [
        np.concatenate([_probability(*part) for part in zip(*(np.split(each, num_parts) for each in row), strict=True)])
        for row in zip(is_right, nll, confidence, strict=True)
    ]
    shift = np.where(is_other, 0, _bins(of.confidence[rows]) - _bins(np.stack(told)))
    return nll, confidence, shift.astype(np.int8)


def merge(kept: CellResult | None, new: CellResult) -> CellResult:
    """Return the runs of both; a seed that both have is taken from ``new``.

    Raises:
        IntegrityError: they were evaluated on different images, or have different rows.
    """
    if kept is None:
        return new
    if kept.data_digest != new.data_digest or kept.names != new.names:
        raise IntegrityError("the kept results are of other images or networks", do="name another --results")
    parts = [(seed, each, index) for each in (kept, new) for index, seed in enumerate(each.rows)]
    by_seed = {seed: (each, index) for seed, each, index in sorted(parts, key=lambda part: part[0])}
    top1, nll, confidence, bin_shift = (
        np.stack([getattr(each, name)[index] for each, index in by_seed.values()])
        for name in ("top1", "nll", "confidence", "bin_shift")
    )
    rows = {seed: each.rows[seed] for seed, (each, _) in by_seed.items()}
    return CellResult(rows, new.data_digest, new.labels, top1, nll, confidence, bin_shift, new.num_parts)


def save(result: CellResult, name: str, folder: Path) -> None:
    """Write the two files of a cell. Raises WriteError and PermissionDenied."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "data_digest": result.data_digest,
        "num_parts": result.num_parts,
        "seeds": {str(seed): [dict(row) for row in rows] for seed, rows in result.rows.items()},
    }
    # classes differ little between networks: what is stored is 0 where the prediction is right
    arrays: dict[str, NDArray[Any]] = {"labels": result.labels, "top1": result.top1 - result.labels}
    arrays |= {"nll": result.nll, "confidence": result.confidence, "bin_shift": result.bin_shift}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:  # as numpy writes it, but a tenth smaller
        for key, array in arrays.items():
            one = io.BytesIO()
            np.save(one, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), one.getvalue(), zipfile.ZIP_LZMA)
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
            text["data_digest"],
            labels,
            arrays["top1"] + labels,
            arrays["nll"],
            arrays["confidence"],
            arrays["bin_shift"] if "bin_shift" in arrays else np.zeros(arrays["nll"].shape, np.int8),
            text["num_parts"],
        )
    if result.top1.shape != (len(rows), len(next(iter(rows.values()))), len(labels)):
        raise IntegrityError(f"{path}: does not belong to the .npz file beside it", do="collect the cell again")
    return result


def file_stem(name: str) -> str:
    """Return the name of a cell's files: ``emoji/0.05/set`` becomes ``emoji-0.05-set``."""
    return name.replace("/", "-")
