"""The cells of the study: one configuration each, trained with several seeds. docs/study-plan.md says why these.

A cell is named DATA/DENSITY/WHAT, such as ``fashion_mnist/0.1/rigl_itop``. T is the length of a run: every
sparse cell spends T, in one phase or in several, so that cells of one density have one budget of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FASHION, EMOJI = "fashion_mnist", "emoji"
LENGTHS = {FASHION: 2.0, EMOJI: 12.0}  # T in epochs
MAIN_DENSITY, OTHER_DENSITIES = 0.1, (0.02,)
NUM_SEEDS = 8
LR, LOW = 0.1, 0.001  # cosine from LR to LOW over a run of one phase
DEFAULT_INTERVAL = 10  # ΔT in steps of the cells that do not say otherwise
INTERVALS = (2, 10, 50)  # of the sweep of ΔT against R_s


Group = dict[str, tuple[dict[str, str], int, str]]  # WHAT -> settings, number of seeds, what it is


@dataclass(frozen=True)
class Cell:
    """One configuration of the study."""

    name: str
    config: str  # name of a file in configs/
    settings: tuple[str, ...]  # key=value
    seeds: tuple[int, ...]
    about: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows, besides the last ticket, whose likelihoods are kept: those that a claim is about."""
        what = self.name.rsplit("/", 1)[1]
        return ("ensemble",) if what == "edst" else ("superposition",) if what.startswith("sup_") else ()


def seeds(count: int) -> tuple[int, ...]:
    """Return the seeds of the counted runs, from 0 on; the pilot had 9001 and 9002."""
    return tuple(range(count))


def data_settings(cell: Cell, data: Path) -> list[str]:
    """Return the settings of the data set of a cell, in the folder of the data sets by name."""
    folder = data / cell.config.removeprefix("study_")
    return [f"data.{split}={folder / split}.beton" for split in ("train", "val")]


def one_phase(data: str, *, share: float = 1.0, timetable: str = "itop") -> dict[str, str]:
    """Return the settings of a run of one phase that takes ``share`` of T."""
    return {"plan.timetable": timetable, "plan.exploration.length": f"{LENGTHS[data] * share:g} epochs"}


def updates(interval: int) -> dict[str, str]:
    """Return the setting of ΔT in steps."""
    return {"plan.exploration.update_interval": f"{interval} steps"}


def set_method(interval: int = 50) -> dict[str, str]:
    """Return SET: 30% replaced every time, nearest to zero of either sign, at random; ERK as in all other cells."""
    return {
        "sparsity.method": "set",
        "sparsity.distribution": "erk",
        "plan.exploration.drop_schedule": "constant",
        "plan.exploration.drop_fraction": "0.3",
        **updates(interval),
    }


def rigl_method(interval: int = 50) -> dict[str, str]:
    """Return RigL: 30% at first, falling to 0 at three quarters of the run."""
    return {
        "sparsity.method": "rigl",
        "plan.exploration.drop_schedule": "rigl_cosine",
        "plan.exploration.drop_fraction": "0.3",
        **updates(interval),
    }


def itop_method(method: str, interval: int = DEFAULT_INTERVAL) -> dict[str, str]:
    """Return SET-ITOP or RigL-ITOP: half of the weights at first, falling to 0.5%."""
    return {
        "sparsity.method": method,
        "plan.exploration.drop_schedule": "cosine",
        "plan.exploration.drop_fraction": "0.5",
        "plan.exploration.drop_end": "0.005",
        **updates(interval),
    }


def interval_cell(method: str, interval: int) -> str:
    """Return the name of a cell of the sweep of ΔT; ``rigl_itop`` is one of them, with the default ΔT."""
    return method if (method, interval) == ("rigl_itop", DEFAULT_INTERVAL) else f"{method}-{interval}"


def granet_method(data: str) -> dict[str, str]:
    """Return GraNet: from density 0.5 to the target over the first half of T."""
    return {
        "sparsity.method": "granet",
        "sparsity.initial_density": "0.5",
        "sparsity.density_until": f"{LENGTHS[data] / 2:g} epochs",
        "plan.exploration.drop_schedule": "cosine",
        "plan.exploration.drop_fraction": "0.5",
        "plan.exploration.drop_end": "0",
        **updates(DEFAULT_INTERVAL),
    }


def edst(data: str) -> dict[str, str]:
    """Return EDST: a third of T explores at a constant rate, then four refinements of T/6 that each give a ticket.

    The first M tickets are the ensemble of M, which ends after T/3 + M·T/6: M = 2 at two thirds of T, M = 4 at T.
    """
    length = LENGTHS[data]
    return {
        "plan.timetable": "edst",
        "sparsity.regrown": "zero",  # as FreeTickets' code
        "plan.exploration.length": f"{length / 3:g} epochs",
        "plan.exploration.ticket": "false",
        "plan.exploration.lr.schedule": "constant",
        "plan.num_refinements": "4",
        "plan.refinement.length": f"{length / 6:g} epochs",
        "plan.refinement.lr.schedule": "cosine",
        "plan.refinement.lr.value": "0.05",
        "plan.refinement.lr.low": f"{LOW:g}",
        "plan.refinement.opening_drop": "0.8",
        "plan.refinement.update_interval": f"{DEFAULT_INTERVAL} steps",
        "plan.refinement.drop_schedule": "cosine",
        "plan.refinement.drop_fraction": "0.5",
        "plan.refinement.drop_end": "0.005",
    }


def sup_tickets(data: str) -> dict[str, str]:
    """Return Sup-tickets: two thirds of T explore, then three cycles of T/9 with a triangular rate."""
    length = LENGTHS[data]
    return {
        "plan.timetable": "sup_tickets",
        "plan.exploration.length": f"{length * 2 / 3:g} epochs",
        "plan.exploration.lr.low": "0.005",
        "plan.num_refinements": "3",
        "plan.refinement.length": f"{length / 9:.4g} epochs",
        "plan.refinement.lr.schedule": "triangular",
        "plan.refinement.lr.value": "0.05",
        "plan.refinement.lr.low": "0.002",
        "plan.refinement.opening_drop": "0.5",
    }


DENSE = {"sparsity.method": "dense", "sparsity.density": "1"}
STATIC = {"sparsity.method": "static"}


def _claims(data: str) -> Group:
    """Return what runs at every density and on both data sets, most decisive first: (settings, seeds, about)."""
    rigl = itop_method("rigl_itop")
    return {
        "rigl_itop": (one_phase(data) | rigl, NUM_SEEDS, "RigL-ITOP in one run of T"),
        "edst": (rigl | edst(data), NUM_SEEDS, "EDST on RigL-ITOP: four tickets, ensembles of 2, 3 and 4"),
        "sup_rigl": (rigl | sup_tickets(data), NUM_SEEDS, "Sup-tickets on RigL-ITOP: four tickets, superposed"),
        "static": (one_phase(data, timetable="static") | STATIC, NUM_SEEDS, "a mask that never changes"),
        "set": (one_phase(data) | set_method(), NUM_SEEDS, "SET"),
        "rigl": (one_phase(data) | rigl_method(), NUM_SEEDS, "RigL"),
    }


def _main_only(data: str) -> Group:
    """Return what runs at the main density on Fashion-MNIST only."""
    rigl, sets = itop_method("rigl_itop"), itop_method("set_itop")
    found: Group = {}
    for interval in INTERVALS:
        for method, name in (("set_itop", "SET-ITOP"), ("rigl_itop", "RigL-ITOP")):
            about = f"{name} with ΔT = {interval} steps"
            settings = one_phase(data) | itop_method(method, interval)
            found[interval_cell(method, interval)] = (settings, NUM_SEEDS, about)
    del found["rigl_itop"]  # is among the claims already
    structured = one_phase(data) | rigl
    return found | {
        "dst_half": (one_phase(data, share=0.5) | rigl, 2 * NUM_SEEDS, "half of T; two seeds are a DST ensemble of T"),
        "rigl_itop_2x": (one_phase(data, share=2) | rigl, NUM_SEEDS, "RigL-ITOP trained for 2 T"),
        "rigl_itop_ema": (
            one_phase(data) | rigl | {"train.ema_decay": "0.98", "tickets.weights": "average"},
            NUM_SEEDS,
            "the moving average of the weights of one run of T",
        ),
        "granet": (one_phase(data) | granet_method(data), NUM_SEEDS, "GraNet, from density 0.5"),
        "sup_set": (sets | sup_tickets(data), NUM_SEEDS, "Sup-tickets on SET-ITOP"),
        "sup_granet": (granet_method(data) | sup_tickets(data), NUM_SEEDS, "Sup-tickets on GraNet"),
        "uniform": (structured | {"sparsity.distribution": "uniform"}, NUM_SEEDS, "every layer at the same density"),
        "fan_in": (structured | {"sparsity.structure": "fan_in"}, NUM_SEEDS, "the same fan-in for every output"),
        "block_4x1": (
            structured | {"sparsity.structure": "block 4x1", "sparsity.dense_layers": "[fc.weight]"},
            NUM_SEEDS,
            "blocks of 4 outputs × 1 input, the last layer dense: its ten outputs are no multiple of four",
        ),
    }


def _half_dense(data: str) -> Group:
    # both with a dense first layer: its three inputs are no multiple of four
    settings = {"sparsity.distribution": "uniform", "sparsity.dense_layers": "[stem.weight]"}
    structured = one_phase(data) | itop_method("rigl_itop") | settings
    return {
        "rigl_itop": (
            structured,
            NUM_SEEDS,
            "RigL-ITOP without structure, uniform, the first layer dense",
        ),
        "2_of_4": (structured | {"sparsity.structure": "2:4"}, NUM_SEEDS, "2 of 4 inputs, the first layer dense"),
    }


def _dense(data: str) -> Group:
    full = one_phase(data, timetable="dense") | DENSE
    cells: Group = {"dense": (full, NUM_SEEDS, "dense for T")}
    if data == FASHION:
        half = one_phase(data, share=0.5, timetable="dense") | DENSE
        short = one_phase(data, share=0.15, timetable="dense") | DENSE
        cells["dense_half"] = (half, 2 * NUM_SEEDS, "dense for T/2; two seeds are a deep ensemble of T")
        cells["dense_short"] = (short, NUM_SEEDS, "dense for the training FLOPs of a sparse run of T")
    return cells


def _cells() -> dict[str, Cell]:
    main = (FASHION, MAIN_DENSITY)
    groups: list[tuple[str, float, Group]] = [
        (FASHION, 1, {"dense": _dense(FASHION)["dense"]}),
        (*main, _claims(FASHION)),
        (EMOJI, 1, _dense(EMOJI)),
        (EMOJI, MAIN_DENSITY, _claims(EMOJI)),
        (*main, _main_only(FASHION)),
        (FASHION, 1, _dense(FASHION)),
        (FASHION, 0.5, _half_dense(FASHION)),
        *((FASHION, density, _claims(FASHION)) for density in OTHER_DENSITIES),
    ]
    found: dict[str, Cell] = {}
    for data, density, cells in groups:
        for what, (settings, count, about) in cells.items():
            name = f"{data}/{density:g}/{what}"
            own = {"sparsity.density": f"{density:g}", "plan.dense_reference": f"{LENGTHS[data]:g} epochs"} | settings
            values = tuple(f"{key}={value}" for key, value in own.items())
            found.setdefault(name, Cell(name, f"study_{data}", values, seeds(count), about))
    return found


CELLS = _cells()  # by name, in the order in which they are run
