"""The report as a figure: accuracy of every row, and accuracy against what a prediction costs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from pipeline.evaluation.report import Report
from pipeline.files import write_atomically

# Blue, orange, green of the Okabe–Ito palette, which colour-blind readers can tell apart.
COLOURS = {"ticket": "#0072B2", "superposition": "#D55E00", "ensemble": "#009E73"}
MARKERS = {"ticket": "o", "superposition": "D", "ensemble": "s"}


def save_figure(report: Report, path: Path) -> None:
    """A PNG, 2 panels: top-1 of every row; top-1 against inference FLOPs. Raises WriteError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second: not at the top
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 1.9 + 0.28 * len(report.rows)), dpi=160, layout="constrained")
    by_row, by_cost = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _accuracy_by_row(by_row, report)
    _accuracy_by_cost(by_cost, report)
    for axes in (by_row, by_cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"{report.run['model']}, {report.run['method']}, density {report.run['density']:g}: {report.num_images:,} images", fontsize=11
    )
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    write_atomically(path, content.getvalue())


def _accuracy_by_row(axes: Any, report: Report) -> None:
    best_ticket = max(row.top1 for row in report.rows if row.kind == "ticket")
    axes.axvline(100 * best_ticket, color=COLOURS["ticket"], linewidth=0.9, linestyle=":", zorder=1)
    for position, row in enumerate(report.rows):
        axes.plot(100 * row.top1, position, MARKERS[row.kind], color=COLOURS[row.kind], markersize=7)
        label = axes.annotate(
            f"{100 * row.top1:.2f}", (100 * row.top1, position), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # the dotted line would strike it through
    axes.set_yticks(range(len(report.rows)), [row.name for row in report.rows], fontsize=9)
    axes.set_ylim(len(report.rows) - 0.5, -0.5)
    axes.margins(x=0.18)
    axes.set_xlabel("top-1 accuracy, %  (dotted: best ticket)", fontsize=9)


def _accuracy_by_cost(axes: Any, report: Report) -> None:
    for kind, colour in COLOURS.items():
        rows = [row for row in report.rows if row.kind == kind]
        x, y = [row.inference_flops_ratio for row in rows], [100 * row.top1 for row in rows]
        if rows:
            axes.plot(x, y, MARKERS[kind], color=colour, markersize=7, linestyle="-" if kind == "ensemble" else "none", label=kind)
    axes.set_xlim(0, 1.12 * max(row.inference_flops_ratio for row in report.rows))
    axes.margins(y=0.15)
    axes.set_xlabel("FLOPs of a prediction, × dense", fontsize=9)
    axes.set_ylabel("top-1 accuracy, %", fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
