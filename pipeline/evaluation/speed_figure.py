"""The figure of a report by sparse inference: accuracy against milliseconds of one image."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.figure import COLOURS, MEDIUM, SMALL, accuracy_by_cost, blank_figure, legend_above, style_axes
from pipeline.evaluation.report import Report

NAMES = ("milliseconds",)


def figures(report: Report) -> dict[str, tuple[str, Any]]:
    """Draw the figure if the report has times: name -> (caption, matplotlib figure)."""
    if not report.dense_ms:
        return {}
    caption = (
        "Accuracy against milliseconds of one image (batch 1, median) by sparse inference on this CPU. Dotted: the "
        "same network by torch, with dense arithmetic."
    )
    return {"milliseconds": (caption, milliseconds(report))}


def milliseconds(report: Report) -> Any:
    """Draw top-1 against milliseconds of one image."""
    figure = blank_figure(4.2, 2.9)
    axes = figure.subplots()
    accuracy_by_cost(axes, report.rows, lambda row: row.more["ms_p50"])
    dense = report.dense_ms["ms_p50"]
    axes.set_xlim(0, max(1.08 * dense, axes.get_xlim()[1]))
    axes.axvline(dense, color=COLOURS["dense"], linewidth=1.2, linestyle=":")
    axes.annotate(
        "dense",
        (dense, 0.03),
        (-3, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
    )
    axes.set_xlabel("milliseconds of one image", fontsize=MEDIUM)
    style_axes(axes)
    legend_above(figure)
    return figure
