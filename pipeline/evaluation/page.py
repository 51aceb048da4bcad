"""The report as one self-contained HTML page: tables and embedded figures, without scripts or external requests."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from pipeline.evaluation import speed_figure, training_figures
from pipeline.evaluation.report import Report
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.table import SPEED_NOTE, calibration_cells, further_cells, main_cells, speed_cells

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th { font-weight: 600; border-bottom: 1.5px solid #222; } td, th { padding: 0.2rem 0.7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) td { background: #f5f5f5; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
"""


def page(
    report: Report,
    runs: Sequence[TicketRun],
    pictures: Mapping[str, tuple[str, bytes]],
    *,
    settings: Mapping[str, object],
) -> str:
    """Return the HTML page of a report.

    Args:
        report: the report.
        runs: the tickets that were evaluated, listed with their provenance.
        pictures: name -> (caption, PNG).
        settings: what was evaluated and how, shown as a table.
    """
    run = ", ".join(f"{escape(key)} {escape(str(value))}" for key, value in report.run.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Tickets: {run}</title><style>{STYLE}</style>",
        f"<h1>Tickets, superposition, ensembles</h1><p>{run}; {report.num_images:,} images.</p>",
        _table(main_cells(report)),
        _notes(report),
    ]
    parts += [_figure(*pictures[name]) for name in ("overview", "flops", "ensemble_size") if name in pictures]
    if cells := speed_cells(report):
        parts += ["<h2>Speed</h2>", _table(cells), f"<p class=note>{SPEED_NOTE}</p>"]
        parts += [_figure(*pictures[name]) for name in speed_figure.NAMES]
    parts += ["<h2>Calibration</h2>", _table(calibration_cells(report))]
    parts += [_figure(*pictures[name]) for name in ("reliability",) if name in pictures]
    if "pairs" in pictures:
        parts += ["<h2>Pairs of tickets</h2>", _figure(*pictures["pairs"])]
    training = [_figure(*pictures[name]) for name in training_figures.NAMES if name in pictures]
    parts += ["<h2>Training</h2>", *training] if training else []
    further = further_cells(report)
    if further:
        parts += ["<h2>Robustness</h2>", *map(_table, further)]
    parts += [_figure(*pictures[name]) for name in ("corruptions",) if name in pictures]
    parts += [
        "<h2>What was evaluated</h2>",
        _table([["", ""], *([key, str(value)] for key, value in settings.items())]),
    ]
    parts += [_table(_provenance(runs))]
    return "\n".join(parts) + "\n"


def _notes(report: Report) -> str:
    trained = "" if report.dense_reference_epochs is None else f", trained for {report.dense_reference_epochs:g} epochs"
    notes = [f"train ×, test ×: FLOPs relative to a dense network{trained}. NLL in nats. ECE over 15 bins."]
    if report.disagreement is not None and report.kl is not None:
        notes.append(
            f"Between tickets: {100 * report.disagreement:.2f}% of predictions differ, KL {report.kl:.4f} nats."
        )
    return "".join(f"<p class=note>{note}</p>" for note in notes)


def _provenance(runs: Sequence[TicketRun]) -> list[list[str]]:
    cells = [["ticket", "run", "phase", "epochs", "method", "density", "seed", "content sha256"]]
    for run in runs:
        for ref in run.refs:
            of = ref.provenance
            name = run.row_of(ref)
            cells.append(
                [
                    name,
                    of.parent_run,
                    of.phase,
                    f"{of.epochs:g}",
                    of.method,
                    f"{of.density:g}",
                    str(of.seed),
                    ref.content_digest[:16],
                ]
            )
    return cells


def _table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    lines = ["<table>"]
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}" for cell in head))
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return "\n".join([*lines, "</table>"])


def _figure(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
