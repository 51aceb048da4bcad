"""The commands that publish tickets and fetch them: ``push`` and ``pull``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import local_path, path_or_url
from pipeline.errors import ConfigError, DataError
from pipeline.tickets.cli import Add, require_new

if TYPE_CHECKING:
    from pipeline.tickets.card import Measured


def add_commands(command: Add) -> None:
    """Add the commands that publish tickets and fetch them."""
    pushed = command("push", _push, "publish a ticket with a card, its configuration and its dense network")
    pushed.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file to publish")
    pushed.add_argument(
        "place",
        type=path_or_url,
        metavar="PLACE",
        help="hf://owner/name for a model of the Hugging Face Hub, another URL that fsspec supports, or a folder",
    )
    pushed.add_argument(
        "--report",
        type=local_path,
        metavar="FILE",
        help="report.json with the metrics for the card (default: that of the run, if the ticket lies in one)",
    )
    pushed.add_argument(
        "--dataset", default="", metavar="NAME", help="name of the data set of the metrics, for the card"
    )
    pushed.add_argument(
        "--license", default="", metavar="NAME", help="licence of the weights, such as apache-2.0 (default: not stated)"
    )
    pushed.add_argument(
        "--public", action="store_true", help="a model that is made now can be read by everybody (default: private)"
    )
    pulled = command("pull", _pull, "copy a ticket from where it was published, after checking every byte")
    pulled.add_argument(
        "place", type=path_or_url, metavar="PLACE", help="hf://owner/name or hf://owner/name@revision, or another URL"
    )
    pulled.add_argument("--output", type=local_path, required=True, metavar="FILE", help=".safetensors file to write")


def _push(options: argparse.Namespace) -> int:
    from pipeline.tickets.hub import publish, require_place

    require_place(options.place)
    from pipeline.tickets.card import published_files
    from pipeline.tickets.place import ticket_file
    from pipeline.tickets.verify import read_verified

    with ticket_file(options.file) as path:
        content = read_verified(path).content
        of = _of_report(path, content, options.report)
    files = published_files(
        content, address=options.place, measured=of, dataset=options.dataset, license=options.license
    )
    publish(files, options.place, is_public=options.public)
    print(f"{options.place}: " + ", ".join(f"{name} ({len(each):,} bytes)" for name, each in files.items()))
    if of is None:
        print("note: the card has no metrics: pass --report FILE of an evaluation")
    return 0


def _of_report(path: Path, content: bytes, report: Path | None) -> Measured | None:
    """Return what a report says of a ticket; without ``report`` that of its run, if there is one that knows it."""
    from pipeline.tickets.card import measured_in
    from pipeline.tickets.format import decode

    ticket = decode(content)
    own = f"ticket-{ticket.provenance.index}"
    if report is not None:
        return measured_in(report, ticket, own)
    folder = path.resolve().parent
    near, name = (folder, path.stem) if folder.name == "report" else (folder.parent / "report", own)
    if not (near / "report.json").is_file():
        return None
    try:
        return measured_in(near / "report.json", ticket, name)
    except DataError as error:
        print(f"note: {error.what}")
        return None


def _pull(options: argparse.Namespace) -> int:
    output = options.output
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
    require_new(output)
    from pipeline.files import write_atomically
    from pipeline.tickets.place import ticket_file
    from pipeline.tickets.verify import read_verified

    with ticket_file(options.place) as path:
        ticket = read_verified(path)
    write_atomically(output, ticket.content)
    of = ticket.provenance
    print(f"{output}: ticket {of.index} of {of.parent_run}, {of.model}, {of.method}, sha256 {ticket.content_digest}")
    return 0
