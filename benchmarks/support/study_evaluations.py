"""The evaluations after training, with the tickets of the cells: docs/study-plan.md says why these.

An evaluation is named CELL+HOW, such as ``fashion_mnist/0.1/dst_half+pairs``. Its results are kept in the form of a
cell's. Number k of an evaluation is of seed k, or of seeds 2k and 2k + 1 of ensembles of two runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.support.study_cells import CELLS, Cell

HOW = {
    "rules": "every superposition rule, with and without BatchNorm recalibration",
    "pairs": "ensembles of two runs, of seeds 2k and 2k + 1",
    "corrupted": "15 corruptions at severity 3, on 1,000 test images",
    "other": "telling test images from images of none of the classes, emoji in grey",
    "speed": "milliseconds of an image on one thread, sparse or by torch if dense; of the first seed",
}
WITHOUT = "-not_recalibrated"  # ends the names of rows
SUPERPOSED = ("sup_rigl", "sup_set", "sup_granet")  # at fashion_mnist/0.1
STRUCTURES = ("0.1/rigl_itop", "0.1/fan_in", "0.1/block_4x1", "0.5/rigl_itop", "0.5/2_of_4")
OF = {
    "rules": [f"0.1/{what}" for what in SUPERPOSED],
    "pairs": ["0.1/dst_half", "1/dense_half", *STRUCTURES],
    "corrupted": ["1/dense", "0.1/edst"],
    "other": ["1/dense", "0.1/edst"],
    "speed": ["1/dense", "0.1/rigl_itop", "0.1/edst", "0.1/sup_rigl"],
}


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated of the finished runs of a cell."""

    cell: Cell
    how: str  # a name of HOW

    @property
    def name(self) -> str:
        """The name of the evaluation, and of its results."""
        return f"{self.cell.name}+{self.how}"

    @property
    def seeds(self) -> dict[int, tuple[int, ...]]:
        """The seeds of the runs that each number of the evaluation is of."""
        size = 2 if self.how == "pairs" else 1
        count = 1 if self.how == "speed" else len(self.cell.seeds) // size
        return {k: self.cell.seeds[k * size : (k + 1) * size] for k in range(count)}


EVALUATIONS = {
    each.name: each
    for how, cells in OF.items()
    for each in (Evaluation(CELLS[f"fashion_mnist/{cell}"], how) for cell in cells)
}
