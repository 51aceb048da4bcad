"""What a finished report leaves: table, JSON, figures, a page, the superposed networks, and one child run per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import TrackingConfig
from pipeline.evaluation import figure
from pipeline.evaluation.page import page
from pipeline.evaluation.report import Report, log_report, save_json
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.table import format_table
from pipeline.files import cannot_write, write_atomically
from pipeline.redaction import redact
from pipeline.superposition.rules import RULES
from pipeline.tickets.format import encode
from pipeline.tracking.tracker import Tracker

LEFT = ("table.txt", "report.json", "report.png", "report.html")


def publish(
    report: Report, folder: Path, tracker: Tracker, *, runs: Sequence[TicketRun], settings: Mapping[str, object]
) -> None:
    """Write everything into ``folder``, log it, and print the table; on one rank.

    ``settings`` says what was evaluated how. Raises WriteError or PermissionDenied when the folder cannot be written.
    """
    table = format_table(report)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        judged = {ref.path.resolve() for run in runs for ref in run.refs}
        for path in _outputs(folder):  # of a report before: not all of them are written again
            if path.resolve() not in judged:
                path.unlink()
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
    for name, superposed in report.superpositions.items():
        write_atomically(folder / f"{name}.safetensors", encode(superposed))
    log_report(report, tracker)
    digests = {run.row_of(ref): f"{ref.path} sha256 {ref.content_digest}" for run in runs for ref in run.refs}
    tracker.set_tags(digests)
    for name in LEFT:
        tracker.log_artifact(folder / name)
    print(f"\n{table}\n")
    print(
        f"tickets   {settings.get('tickets') or ', '.join(dict.fromkeys(str(ref.path.parent) for run in runs for ref in run.refs))}"
    )
    print(f"report    {folder / 'report.html'}    figures {folder / 'figures'}    numbers {folder / 'report.json'}")


def _outputs(folder: Path) -> Iterator[Path]:
    """What a report has left there, and nothing else."""
    known = [*LEFT, *(f"figures/{name}.{ending}" for name in figure.NAMES for ending in ("pdf", "png"))]
    known += [path.name for rule in RULES for path in folder.glob(f"*superposition-{rule}.safetensors")]
    return (folder / name for name in known if (folder / name).is_file())


def say_where_tracked(settings: TrackingConfig, output_dir: Path) -> None:
    """One line: how to look at the record in MLflow."""
    if settings.backend == "mlflow":
        uri = settings.uri or f"sqlite:///{(output_dir / 'mlflow.db').resolve()}"
        local = f"mlflow ui --backend-store-uri {uri}    then open http://127.0.0.1:5000"
        print(f"MLflow    {redact(uri) if uri.startswith('http') else local}")
