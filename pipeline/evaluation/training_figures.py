"""The figures of a run's training: its layers, its rates, and the accuracy of its tickets over the cycles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.evaluation.figure import (
    COLOURS,
    MARKERS,
    MEDIUM,
    SMALL,
    WIDTH,
    blank_figure,
    legend_above,
    shades,
    style_axes,
)
from pipeline.evaluation.history import History
from pipeline.evaluation.report import Report

NAMES = ("layers", "rates", "cycles")  # of all figures a history can have
MAX_NAMED_LAYERS = 12  # of more layers, the legend names every second, third, …
RATES = (
    ("train/lr", "learning rate"),
    ("mask/drop_fraction", "drop fraction"),
    ("mask/turnover", "mask turnover"),
)


def figures(history: History, report: Report, ticket_steps: Mapping[str, int]) -> dict[str, tuple[str, Any]]:
    """Draw every figure for which there are numbers: name -> (caption, matplotlib figure).

    Args:
        history: of the run.
        report: on its tickets.
        ticket_steps: after how many steps each ticket was taken, by the name of its row.
    """
    makers: dict[str, tuple[bool, str, Callable[[], Any]]] = {
        "layers": (
            bool(history.layers),
            "Density and R_s (weights that have been active so far) of each sparse layer after every topology update.",
            lambda: layers(history),
        ),
        "rates": (
            True,
            "Learning rate; drop fraction of each topology update; mask turnover: share of the active weights that an "
            "update replaced.",
            lambda: rates(history),
        ),
        "cycles": (
            any(row.kind == "ticket" for row in report.rows),
            "Accuracy during training, of the ticket at the end of each cycle, of the ensemble of all tickets so far, "
            "and of the superposition.",
            lambda: cycles(history, report, ticket_steps),
        ),
    }
    assert makers.keys() == set(NAMES)
    return {name: (caption, make()) for name, (is_there, caption, make) in makers.items() if is_there}


def layers(history: History) -> Any:
    """Draw two panels over epochs, density and R_s, with a line per layer."""
    names = list(history.layers)
    every = 1 + (len(names) - 1) // MAX_NAMED_LAYERS
    figure = blank_figure(9.6, 3.2)
    of_density, of_r_s = panels = figure.subplots(1, 2)
    for index, (name, colour) in enumerate(zip(names, shades(len(names)), strict=True)):
        epochs, density, r_s = history.of_layer(name)
        label = (
            name.removesuffix(".weight") if index % every == 0 or index == len(names) - 1 else "_"
        )  # matplotlib leaves out the rest
        look = {"color": colour, "linewidth": 1.2, "marker": ".", "markersize": 3, "label": label}
        of_density.plot(epochs, density, **look)
        of_r_s.plot(epochs, r_s, **look)
    for axes, label in zip(panels, ("density", "R_s"), strict=True):
        axes.set_xlabel("epoch", fontsize=MEDIUM)
        axes.set_ylabel(label, fontsize=MEDIUM)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        style_axes(axes)
    handles, labels = of_density.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=SMALL)
    return figure


def rates(history: History) -> Any:
    """Draw a panel over epochs for each rate that the run reported."""
    shown = [(label, *history.curve(key)) for key, label in RATES if history.curve(key)[0]]
    figure = blank_figure(WIDTH, 0.4 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, epochs, values) in zip(panels, shown, strict=True):
        is_of_updates = label != "learning rate"
        look = (
            {"marker": "o", "markersize": 3, "linestyle": "none", "clip_on": False}
            if is_of_updates
            else {"linewidth": 1.4}
        )
        axes.plot(epochs, values, color=COLOURS["ticket"], **look)
        axes.set_ylabel(label, fontsize=MEDIUM)
        axes.set_ylim(0, 1.1 * max(values) or 1)
        axes.set_xlim(left=0)
        style_axes(axes)
    panels[-1].set_xlabel("epoch", fontsize=MEDIUM)
    return figure


def cycles(history: History, report: Report, ticket_steps: Mapping[str, int]) -> Any:
    """Draw top-1 over epochs: the network during training, tickets, ensembles of the first ones, superposition."""
    tickets, ensembles, superpositions = (
        [row for row in report.rows if row.kind == kind] for kind in ("ticket", "ensemble", "superposition")
    )
    ends = [ticket_steps[row.name] / history.steps_per_epoch for row in tickets]
    figure = blank_figure(WIDTH, 3.0)
    axes = figure.subplots()
    epochs, accuracies = history.curve("val/top1")
    if epochs:
        axes.plot(epochs, [100 * each for each in accuracies], color="0.6", linewidth=1.2, label="during training")
    for rows, kind in ((tickets, "ticket"), (ensembles, "ensemble")):
        at = [ends[row.num_members - 1] for row in rows] if kind == "ensemble" else ends
        heights = [100 * row.top1 for row in rows]
        look = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 6}
        if rows:
            axes.plot(at, heights, linestyle="-" if kind == "ensemble" else "none", label=kind, **look)
    for row in superpositions:
        axes.axhline(100 * row.top1, color=COLOURS["superposition"], linestyle="--", linewidth=1.2, label=row.name)
    axes.set_xlabel("epoch", fontsize=MEDIUM)
    axes.set_ylabel("top-1 accuracy, %", fontsize=MEDIUM)
    axes.set_xlim(0, 1.03 * max([*ends, *epochs]))
    lowest = min(100 * row.top1 for row in report.rows)
    axes.set_ylim(bottom=max(0.0, lowest - 8))  # the first epochs would squeeze what is to be compared
    style_axes(axes)
    legend_above(figure)
    return figure
