"""What a finished report leaves: table, JSON, figures, a page, the superposed networks, and one child run per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.evaluation import figure
from pipeline.evaluation.page import page
from pipeline.evaluation.report import Report, log_report, save_json
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.table import format_table
from pipeline.files import cannot_write, write_atomically
from pipeline.tickets.format import encode
from pipeline.tracking.tracker import Tracker


def publish(report: Report, folder: Path, tracker: Tracker, *, runs: Sequence[TicketRun], settings: Mapping[str, object]) -> None:
    """Write everything into ``folder``, log it, and print the table; on one rank.

    ``settings`` says what was evaluated how. Raises WriteError or PermissionDenied when the folder cannot be written.
    """
    table = format_table(report)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_atomically(folder / "table.txt", (table + "\n").encode())
    save_json(report, folder / "report.json")
    pictures = {}
    for name, (caption, drawn) in figure.figures(report).items():
        pictures[name] = (caption, figure.png(drawn))
        write_atomically(folder / "figures" / f"{name}.pdf", figure.pdf(drawn))
        write_atomically(folder / "figures" / f"{name}.png", pictures[name][1])
    write_atomically(folder / "report.png", pictures["overview"][1])
    write_atomically(folder / "report.html", page(report, runs, pictures, settings=settings).encode())
    for superposed, run in zip(report.superpositions, [run for run in runs if len(run.refs) > 1 and not run.is_dense], strict=False):
        write_atomically(folder / f"{run.name(superposed.provenance.method)}.safetensors", encode(superposed))
    log_report(report, tracker)
    digests = {run.name(f"ticket-{ref.index}"): f"{ref.path} sha256 {ref.content_digest}" for run in runs for ref in run.refs}
    tracker.set_tags(digests)
    for name in ("table.txt", "report.json", "report.png", "report.html"):
        tracker.log_artifact(folder / name)
    print(f"\n{table}\n")
    print(f"tickets   {settings.get('tickets') or ', '.join(dict.fromkeys(str(ref.path.parent) for run in runs for ref in run.refs))}")
    print(f"report    {folder / 'report.html'}    figures {folder / 'figures'}    numbers {folder / 'report.json'}")
