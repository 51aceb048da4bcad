"""Publish a finished report: table, JSON, figures, HTML page, superposed networks, and tracked child runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import TrackingConfig
from pipeline.evaluation import figure, speed_figure, training_figures
from pipeline.evaluation.history import History
from pipeline.evaluation.page import page
from pipeline.evaluation.predictions import FILE_NAME, save_predictions
from pipeline.evaluation.report import Report, final_metrics, log_report, save_json
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.table import format_table
from pipeline.files import cannot_write, write_atomically
from pipeline.superposition.rules import RULES
from pipeline.tickets.format import encode
from pipeline.tracking.place import find_run, how_to_open, where
from pipeline.tracking.tracker import Tracker

OUTPUTS = ("table.txt", "report.json", "report.png", "report.html", FILE_NAME)


def publish(
    report: Report,
    folder: Path,
    tracker: Tracker,
    *,
    runs: Sequence[TicketRun],
    settings: Mapping[str, object],
    data_digest: str,
    history: History | None = None,
) -> None:
    """Write the report to ``folder``, log it to the tracker, and print the table; call this on one rank.

    The files of an earlier report in ``folder`` are deleted.

    Args:
        report: the report.
        folder: where its files are written; made if it is missing.
        tracker: gets a child run per row, the metrics that whole runs are compared by, and the files.
        runs: the tickets that were evaluated.
        settings: what was evaluated and how, for the HTML page.
        data_digest: digest of the evaluation set, stored with the predictions.
        history: of the training of the tickets, for its figures; None: it is not known.

    Raises:
        WriteError, PermissionDenied: the folder cannot be written.
    """
    table = format_table(report)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        evaluated = {ref.path.resolve() for run in runs for ref in run.refs}
        for path in _outputs(folder):  # of an earlier report, which may have had more files
            if path.resolve() not in evaluated:
                path.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_atomically(folder / "table.txt", (table + "\n").encode())
    save_json(report, folder / "report.json")
    if report.predictions is not None:
        save_predictions(report.predictions, folder / FILE_NAME, data_digest=data_digest)
    pictures = {}
    drawings = figure.figures(report) | speed_figure.figures(report)
    if history is not None:
        ticket_steps = {run.row_of(ref): ref.provenance.step for run in runs for ref in run.refs}
        drawings |= training_figures.figures(history, report, ticket_steps)
    for name, (caption, drawn) in drawings.items():
        pictures[name] = (caption, figure.png(drawn))
        write_atomically(folder / "figures" / f"{name}.pdf", figure.pdf(drawn))
        write_atomically(folder / "figures" / f"{name}.png", pictures[name][1])
    write_atomically(folder / "report.png", pictures["overview"][1])
    write_atomically(folder / "report.html", page(report, runs, pictures, settings=settings).encode())
    for name, superposed in report.superpositions.items():
        write_atomically(folder / f"{name}.safetensors", encode(superposed))
    log_report(report, tracker)
    last_step = max(ref.provenance.step for run in runs for ref in run.refs)
    tracker.log_metrics(final_metrics(report), step=last_step)
    digests = {run.row_of(ref): f"{ref.path} sha256 {ref.content_digest}" for run in runs for ref in run.refs}
    tracker.set_tags(digests)
    for name in (*OUTPUTS, "figures"):
        tracker.log_artifact(folder / name)
    print(f"\n{table}")
    folders = dict.fromkeys(str(ref.path.parent) for run in runs for ref in run.refs)
    print(f"tickets   {settings.get('tickets') or ', '.join(folders)}")
    print(f"report    {folder / 'report.html'}  (beside it: figures/, report.json)")


def _outputs(folder: Path) -> Iterator[Path]:
    """List the existing files in ``folder`` that `publish` can have written."""
    names = (*figure.NAMES, *speed_figure.NAMES, *training_figures.NAMES)
    known = [
        *OUTPUTS,
        *(f"figures/{name}.{ending}" for name in names for ending in ("pdf", "png")),
    ]
    known += [path.name for rule in RULES for path in folder.glob(f"*superposition-{rule}.safetensors")]
    return (folder / name for name in known if (folder / name).is_file())


def say_where_tracked(settings: TrackingConfig, output_dir: Path) -> None:
    """Print how to open the run in MLflow: our command, and an address or a command line that starts MLflow's own."""
    if settings.backend == "mlflow":
        print(f"open      python -m pipeline.tracking open {shlex.quote(str(output_dir))}")
        sent = find_run(output_dir)
        experiment_id = sent.experiment_id if sent else ""
        print(f"MLflow    {how_to_open(where(output_dir, settings).uri, experiment_id=experiment_id)}")
