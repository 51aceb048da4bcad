"""The figures of a report, as PNG and PDF.

They show all rows, calibration, the size of ensembles, pairs of tickets, FLOPs, and corruptions.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluation.metrics import EXTRA_CORRUPTIONS, Bin
from pipeline.evaluation.report import Report, ReportRow

# blue, vermilion, green and black of the Okabe–Ito palette, which colour-blind readers can tell apart
COLOURS = {"ticket": "#0072B2", "superposition": "#D55E00", "ensemble": "#009E73", "dense": "#000000"}
MARKERS = {"ticket": "o", "superposition": "D", "ensemble": "s", "dense": "*"}
SMALL, MEDIUM = 8, 9  # points
WIDTH = 7.2  # inches: the text width of a two-column page
NAMES = (
    "overview",
    "reliability",
    "ensemble_size",
    "pairs",
    "flops",
    "corruptions",
)  # of all figures a report can have


def figures(report: Report) -> dict[str, tuple[str, Any]]:
    """Draw every figure for which the report has numbers: name -> (caption, matplotlib figure)."""
    makers: dict[str, tuple[bool, str, Callable[[Report], Any]]] = {
        "overview": (
            True,
            "Accuracy of every row, ± one standard error, and accuracy against FLOPs per prediction.",
            overview,
        ),
        "reliability": (
            bool(report.reliability),
            "Reliability: accuracy in 15 equal intervals of confidence, ± one standard error. "
            "Grey bars: fraction of images in each interval.",
            reliability,
        ),
        "ensemble_size": (
            any(row.kind == "ensemble" for row in report.rows),
            "Accuracy and NLL against the number of tickets in the ensemble. "
            "For one ticket: the mean, with a bar from the lowest to the highest.",
            ensemble_size,
        ),
        "pairs": (
            bool(report.disagreements),
            "Pairs of tickets: mask overlap (weights active in both masks over weights active in either), "
            "and share of images on which the predictions differ.",
            pairs,
        ),
        "flops": (
            True,
            "Accuracy against FLOPs of inference and of all training up to the ticket, relative to the dense network.",
            flops,
        ),
        "corruptions": (
            bool(report.corrupted),
            "Accuracy on corrupted images: by severity (mean over corruptions), by corruption (mean over severities).",
            corruptions,
        ),
    }
    assert makers.keys() == set(NAMES)
    return {name: (caption, make(report)) for name, (is_there, caption, make) in makers.items() if is_there}


def png(figure: Any) -> bytes:
    """Encode a figure as PNG; the same figure always gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()


def pdf(figure: Any) -> bytes:
    """Encode a figure as PDF; the same figure always gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    content = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):  # TrueType fonts, which publishers require
        FigureCanvasPdf(figure).print_pdf(content, metadata={"Creator": None, "Producer": None, "CreationDate": None})
    return content.getvalue()


def overview(report: Report) -> Any:
    """Draw two panels: top-1 of every row, and top-1 against inference FLOPs."""
    figure = blank_figure(9.6, 1.9 + 0.28 * len(report.rows))
    by_row, by_cost = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _accuracy_by_row(by_row, report)
    accuracy_by_cost(by_cost, report.rows, lambda row: row.inference_flops_ratio)
    by_cost.set_xlabel("FLOPs per prediction, × dense", fontsize=MEDIUM)
    by_cost.legend(frameon=False, fontsize=MEDIUM, loc="lower right")
    for axes in (by_row, by_cost):
        style_axes(axes)
    title = (
        f"{report.run['model']}, {report.run['method']}, density {report.run['density']}: {report.num_images:,} images"
    )
    figure.suptitle(title, fontsize=11)
    return figure


def reliability(report: Report) -> Any:
    """Draw a reliability diagram for one row of each kind that the report has."""
    rows = _representatives(report)
    figure = blank_figure(1.15 + 1.85 * len(rows), 2.5)
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        _reliability_of(axes, report.reliability[row.name], COLOURS[row.kind])
        axes.set_title(f"{row.name}\nECE {100 * row.ece:.2f}%", fontsize=SMALL)
        axes.set_xlabel("confidence", fontsize=SMALL)
    panels[0].set_ylabel("accuracy", fontsize=SMALL)
    return figure


def ensemble_size(report: Report) -> Any:
    """Draw top-1 and NLL of ensembles, with a single ticket, superpositions and dense references for comparison."""
    figure = blank_figure(WIDTH, 2.8)
    for axes, (key, factor, label) in zip(
        figure.subplots(1, 2), (("top1", 100, "top-1 accuracy, %"), ("nll", 1, "NLL, nats")), strict=True
    ):
        tickets = [factor * getattr(row, key) for row in _of_kind(report, "ticket")]
        ensembles = _of_kind(report, "ensemble")
        mean = sum(tickets) / len(tickets)
        sizes, values = (
            [1] + [row.num_members for row in ensembles],
            [mean] + [factor * getattr(row, key) for row in ensembles],
        )
        axes.plot(sizes, values, "-", color=COLOURS["ensemble"], linewidth=1.4)
        axes.plot(sizes[1:], values[1:], "s", color=COLOURS["ensemble"], markersize=5, label="ensemble")
        spread = [[mean - min(tickets)], [max(tickets) - mean]]
        axes.errorbar(
            [1], [mean], yerr=spread, fmt="o", color=COLOURS["ticket"], capsize=3, markersize=5, label="one ticket"
        )
        for row in _of_kind(report, "superposition") + _of_kind(report, "dense"):
            line = "--" if row.kind == "superposition" else ":"
            axes.axhline(
                factor * getattr(row, key), color=COLOURS[row.kind], linestyle=line, linewidth=1.2, label=row.name
            )
        axes.set_xticks(sizes)
        axes.set_xlabel("tickets in the ensemble", fontsize=MEDIUM)
        axes.set_ylabel(label, fontsize=MEDIUM)
        axes.margins(y=0.15)
        style_axes(axes)
    legend_above(figure)
    return figure


def pairs(report: Report) -> Any:
    """Draw two matrices: the overlap of masks, and the disagreement of predictions."""
    num_tickets = len(report.tickets)
    side = max(2.4, 0.52 * num_tickets + 1.1)
    matrices: list[tuple[str, Sequence[Sequence[float | None]], str]] = []
    if report.mask_overlaps:
        chance = "" if report.mask_overlap_by_chance is None else f"\nby chance {report.mask_overlap_by_chance:.2f}"
        matrices.append((f"mask overlap{chance}", report.mask_overlaps, "Blues"))
    matrices.append(
        ("predictions that differ, %", [[100 * value for value in row] for row in report.disagreements], "Oranges")
    )
    figure = blank_figure(side * len(matrices), side)
    for axes, (title, matrix, colours) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices, strict=True
    ):
        _matrix(axes, matrix, colours, decimals=1 if "%" in title else 2, names=report.tickets)
        axes.set_title(title, fontsize=MEDIUM)
    return figure


def flops(report: Report) -> Any:
    """Draw top-1 against inference and training FLOPs.

    The cost of the dense network is 1; its accuracy is drawn if there is a dense run.
    """
    costs: list[tuple[str, Callable[[ReportRow], float | None]]] = [
        ("inference FLOPs, × dense", lambda row: row.inference_flops_ratio),
        ("training FLOPs, × dense", lambda row: row.training_flops_ratio),
    ]
    if any(row.training_flops_ratio is None for row in report.rows):
        costs = costs[:1]
    figure = blank_figure(3.6 * len(costs), 2.9)
    for axes, (label, cost) in zip(figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
        accuracy_by_cost(axes, report.rows, cost)
        axes.set_xlim(0, max(1.08, axes.get_xlim()[1]))
        axes.axvline(1, color=COLOURS["dense"], linewidth=1.2, linestyle=":")
        axes.annotate(
            "dense",
            (1, 0.03),
            (-3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
        )
        for row in _of_kind(report, "dense"):
            axes.axhline(100 * row.top1, color=COLOURS["dense"], linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlabel(label, fontsize=MEDIUM)
        style_axes(axes)
    for axes in figure.axes[1:]:
        axes.set_ylabel("")
    legend_above(figure)
    return figure


def corruptions(report: Report) -> Any:
    """Draw accuracy by severity, and bars by corruption, for one row of each kind."""
    rows = [row for row in _representatives(report) if row.name in report.corrupted]
    names = list(report.corrupted[rows[0].name])
    figure = blank_figure(WIDTH, 5.2 if len(names) > 4 else 2.8)
    by_severity, by_name = figure.subplots(*((2, 1) if len(names) > 4 else (1, 2)))
    width = 0.8 / len(rows)
    for position, row in enumerate(rows):
        found = report.corrupted[row.name]
        averaged = [of for name, of in found.items() if name not in EXTRA_CORRUPTIONS] or list(found.values())
        severities = sorted({severity for of in averaged for severity in of})
        means = [_mean([100 * of[severity]["top1"] for of in averaged if severity in of]) for severity in severities]
        clean = [100 * row.top1]
        by_severity.plot(
            [0, *severities],
            clean + means,
            MARKERS[row.kind] + "-",
            color=COLOURS[row.kind],
            markersize=5,
            label=row.name,
        )
        heights = [_mean([100 * each["top1"] for each in found[name].values()]) for name in names]
        by_name.bar(
            [i + (position - (len(rows) - 1) / 2) * width for i in range(len(names))],
            heights,
            0.92 * width,
            color=COLOURS[row.kind],
        )
    by_severity.set_xticks([0, *severities], ["clean", *map(str, severities)])
    by_severity.set_xlabel("severity, mean over corruptions", fontsize=MEDIUM)
    legend_above(figure)
    by_name.set_xticks(
        range(len(names)), [name.replace("_", " ") for name in names], rotation=35, ha="right", fontsize=SMALL
    )
    for axes in (by_severity, by_name):
        axes.set_ylabel("top-1 accuracy, %", fontsize=MEDIUM)
        style_axes(axes)
    by_name.tick_params(axis="x", labelsize=SMALL)
    by_name.grid(visible=False, axis="x")
    return figure


def blank_figure(width: float, height: float) -> Any:
    """Return an empty figure; ``width`` and ``height`` are in inches."""
    from matplotlib.figure import Figure  # here, because it takes a second
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    padded = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07)  # inches
    return Figure(figsize=(width, height), dpi=160, layout=padded)


def shades(num: int) -> list[Any]:
    """Return ``num`` colours from dark to light, for what has an order, such as layers."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * index / max(1, num - 1)) for index in range(num)]


def legend_above(figure: Any) -> None:
    """Put the legend above the panels, where it cannot cover a line or a marker."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=SMALL)


def style_axes(axes: Any) -> None:
    """Give axes the look that all figures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _of_kind(report: Report, kind: str) -> list[ReportRow]:
    return [row for row in report.rows if row.kind == kind and not row.is_apart]


def _representatives(report: Report) -> list[ReportRow]:
    """Return a row of each kind: last ticket, first superposition, largest ensemble, first dense reference."""
    of_kinds = {kind: _of_kind(report, kind) for kind in COLOURS}
    return [rows[0] if kind in ("superposition", "dense") else rows[-1] for kind, rows in of_kinds.items() if rows]


def _standard_error(accuracy: float, num_images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / num_images)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _accuracy_by_row(axes: Any, report: Report) -> None:
    tickets = _of_kind(report, "ticket")
    if tickets:
        axes.axvline(
            100 * max(row.top1 for row in tickets), color=COLOURS["ticket"], linewidth=0.9, linestyle=":", zorder=1
        )
    for position, row in enumerate(report.rows):
        error = 100 * _standard_error(row.top1, report.num_images)
        axes.errorbar(
            100 * row.top1,
            position,
            xerr=error,
            fmt=MARKERS[row.kind],
            color=COLOURS[row.kind],
            markersize=6,
            elinewidth=0.9,
        )
        label = axes.annotate(
            f"{100 * row.top1:.2f}",
            (100 * row.top1 + error, position),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
        label.set_bbox(
            {"facecolor": "white", "edgecolor": "none", "pad": 1}
        )  # so that the dotted line does not cross it
    axes.set_yticks(range(len(report.rows)), [row.name for row in report.rows], fontsize=MEDIUM)
    axes.set_ylim(len(report.rows) - 0.5, -0.5)
    axes.margins(x=0.18)
    axes.set_xlabel("top-1 accuracy, %  (dotted: best ticket)", fontsize=MEDIUM)


def accuracy_by_cost(axes: Any, rows: Sequence[ReportRow], cost: Callable[[ReportRow], float | None]) -> None:
    """Draw the top-1 of rows against what each costs."""
    for kind, colour in COLOURS.items():
        points = [(cost(row), 100 * row.top1) for row in rows if row.kind == kind]
        if points:
            x, y = zip(*points, strict=True)
            size = 10 if kind == "dense" else 6
            axes.plot(
                x,
                y,
                MARKERS[kind],
                color=colour,
                markersize=size,
                linestyle="-" if kind == "ensemble" else "none",
                label=kind,
            )
    axes.set_xlim(0, 1.12 * max(cost(row) or 0 for row in rows))
    axes.margins(y=0.15)
    axes.set_ylabel("top-1 accuracy, %", fontsize=MEDIUM)


def _reliability_of(axes: Any, bins: Sequence[Bin], colour: str) -> None:
    width, total = 1 / len(bins), sum(each.num_images for each in bins)
    centres = [(i + 0.5) * width for i in range(len(bins))]
    axes.bar(centres, [each.num_images / total for each in bins], width, color="0.85", linewidth=0)
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=0.9)
    known = [each for each in bins if each.num_images]
    confidence, accuracy = (
        [each.confidence / each.num_images for each in known],
        [each.num_right / each.num_images for each in known],
    )
    errors = [_standard_error(p, each.num_images) for p, each in zip(accuracy, known, strict=True)]
    axes.errorbar(confidence, accuracy, errors, fmt="o-", color=colour, markersize=3.5, linewidth=1.2, elinewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    style_axes(axes)


def _matrix(
    axes: Any, matrix: Sequence[Sequence[float | None]], colours: str, *, decimals: int, names: Sequence[str]
) -> None:
    shown = [[float("nan") if value is None else value for value in row] for row in matrix]
    others = [value for i, row in enumerate(shown) for j, value in enumerate(row) if i != j and value == value]
    low, high = (min(others), max(others)) if others else (0.0, 1.0)
    margin = max(high - low, 1e-9)  # so that numbers in the palest and the darkest cell can be read
    axes.imshow(
        [[v if i != j else float("nan") for j, v in enumerate(row)] for i, row in enumerate(shown)],
        cmap=colours,
        vmin=low - margin,
        vmax=high + margin,
    )
    for i, row in enumerate(shown):
        for j, value in enumerate(row):
            if i != j and value == value:
                axes.text(j, i, f"{value:.{decimals}f}", ha="center", va="center", fontsize=SMALL)
    short = [name.replace("ticket-", "") for name in names]
    axes.set_xticks(range(len(short)), short, fontsize=SMALL)
    axes.set_yticks(range(len(short)), short, fontsize=SMALL)
    axes.set_xlabel("ticket", fontsize=SMALL)
    axes.set_ylabel("ticket", fontsize=SMALL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
