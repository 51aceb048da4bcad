"""The figure of the study: accuracy against FLOPs of training and inference and milliseconds, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.support.study_claims import LAST, values_of
from benchmarks.support.study_evaluations import EVALUATIONS
from benchmarks.support.study_results import MILLISECONDS
from benchmarks.support.study_tables import Load, mean_and_half
from pipeline.evaluation.figure import COLOURS, MARKERS, MEDIUM, SMALL, blank_figure, png, style_axes

HERE, DENSE = "fashion_mnist/0.1", "fashion_mnist/1/dense"
COSTS = {  # on the x axis -> its label, ticks and limits
    "training_flops_ratio": ("training FLOPs, × dense", (0.05, 0.1, 0.2, 0.5, 1, 2), (0.05, 2.5)),
    "inference_flops_ratio": ("inference FLOPs, × dense", (0.05, 0.1, 0.2, 0.5, 1, 2), (0.05, 2.5)),
    MILLISECONDS: ("milliseconds an image, one thread", (0.05, 0.1, 0.2, 0.5, 1, 2), (0.03, 3)),
}
APART = 1.025  # factor between networks of equal cost


@dataclass(frozen=True)
class Series:
    """Networks that are drawn alike."""

    label: str
    kind: str  # of COLOURS and MARKERS
    networks: Sequence[tuple[str, str]]  # cell or evaluation, and row
    is_line: bool = False  # the same thing at several lengths or sizes
    is_filled: bool = True
    size: float = 6  # points


def of_cells(what: Sequence[str], row: str = LAST) -> list[tuple[str, str]]:
    """Return the same row of several cells at the main place."""
    return [(f"{HERE}/{each}", row) for each in what]


SERIES = (
    Series(
        "dense, one run of 0.15, ½, 1 T", "dense", [(f"{DENSE}{end}", LAST) for end in ("_short", "_half", "")], True
    ),
    Series("dense, two runs of ½ T", "dense", [(f"{DENSE}_half+pairs", "ensemble-2")], is_filled=False),
    Series(
        "RigL-ITOP, one run of ½, 1, 2 T", "ticket", of_cells(["dst_half", "rigl_itop", "rigl_itop_2x"]), True, size=8
    ),
    Series(
        "static, SET, RigL, SET-ITOP, GraNet, moving average: one run of T",
        "ticket",
        of_cells(["static", "set", "rigl", "set_itop-10", "granet", "rigl_itop_ema"]),
        is_filled=False,
    ),
    Series(
        "tickets of EDST and of Sup-tickets",
        "ticket",
        [(f"{HERE}/{what}", f"ticket-{n}") for what in ("edst", "sup_rigl") for n in range(4)],
        size=3,
    ),
    Series(
        "EDST ensembles of 2, 3, 4 tickets", "ensemble", [(f"{HERE}/edst", f"ensemble-{n}") for n in (2, 3, 4)], True
    ),
    Series(
        "DST ensembles: two runs of ½ T, of T",
        "ensemble",
        of_cells(["dst_half+pairs", "rigl_itop+pairs"], "ensemble-2"),
        True,
        is_filled=False,
    ),
    Series(
        "superpositions: Sup-tickets on RigL-ITOP, SET-ITOP, GraNet",
        "superposition",
        of_cells(["sup_rigl", "sup_set", "sup_granet"], "superposition-mean"),
    ),
)


def draw(load: Load) -> bytes:
    """Return the figure as PNG; networks without a result are left out, and a line below says which."""
    figure = blank_figure(12.4, 5.6)
    missing = sorted({name for series in SERIES for name, _ in series.networks if load(name) is None})
    for axes, (cost, (label, ticks, limits)) in zip(figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True):
        taken: list[float] = []
        for series in SERIES:
            points = [point_of(load, name, row, cost) for name, row in series.networks]
            if not any(points):
                continue
            x, y, half = zip(*filter(None, points), strict=True)
            axes.errorbar(
                [set_apart(each, taken) for each in x],
                y,
                yerr=half,
                fmt=MARKERS["ensemble" if "two runs" in series.label else series.kind],
                linestyle="-" if series.is_line and cost == "training_flops_ratio" else "none",
                color=COLOURS[series.kind],
                markerfacecolor=COLOURS[series.kind] if series.is_filled else "white",
                markersize=series.size,
                linewidth=1,
                elinewidth=0.8,
                label=series.label,
            )
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(*limits)
        axes.set_xlabel(label, fontsize=MEDIUM)
        style_axes(axes)
    figure.axes[0].set_ylabel("top-1 accuracy, %", fontsize=MEDIUM)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=SMALL)
    if missing:
        shown = ", ".join(name.removeprefix("fashion_mnist/") for name in missing)
        figure.supxlabel(f"not yet run: {shown}", fontsize=SMALL, wrap=True)
    return png(figure)


def set_apart(cost: float, taken: list[float]) -> float:
    """Return where a network of a cost is drawn: networks of equal cost stand beside each other."""
    num_there = sum(abs(math.log(cost / other)) < 0.02 for other in taken)
    taken.append(cost)
    steps = (num_there + 1) // 2  # 0, −1, 1, −2, 2, …
    return float(cost * APART ** (-steps if num_there % 2 else steps))


def point_of(load: Load, name: str, row: str, cost: str) -> tuple[float, float, float] | None:
    """Return cost, mean top-1 in %, and the half width of its 95% interval (0 with one seed); None without a result."""
    where = f"{name}+speed" if cost == MILLISECONDS else name
    is_measured = where == name or where in EVALUATIONS
    if (result := load(name)) is None or (costs := load(where) if is_measured else None) is None:
        return None
    mean, half = mean_and_half([100 * value for value in values_of(result, row, "top1").values()])
    return fmean(values_of(costs, row, cost).values()), mean, half or 0.0
