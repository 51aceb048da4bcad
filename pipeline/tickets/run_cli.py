"""The commands that run tickets: ``predict`` and ``bench``. They reach higher than their room."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from pipeline.command_line import local_path, path_or_url, whole_number
from pipeline.parts import import_parts
from pipeline.tickets.cli import Add, add_imports, print_table, read


def add_commands(command: Add) -> None:
    """Add the commands that run tickets."""
    predicted = command("predict", _predict, "print the classes of images by name, with their probabilities")
    predicted.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file, or an entry of the zoo")
    predicted.add_argument("images", type=local_path, nargs="+", metavar="IMAGE", help="JPEG or PNG")
    predicted.add_argument(
        "--top", type=whole_number(1), default=1, metavar="N", help="print the N most probable classes (default: 1)"
    )
    timed = command("bench", _bench, "compare sparse inference of a ticket with dense engines on this machine's CPU")
    timed.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file, or an entry of the zoo")
    timed.add_argument(
        "--threads", type=whole_number(1, 1024), default=1, metavar="N", help="threads of each engine (default: 1)"
    )
    timed.add_argument(
        "--batch", type=whole_number(1, 4096), default=1, metavar="N", help="images of one call (default: 1)"
    )
    timed.add_argument(
        "--rounds", type=whole_number(1, 10**6), default=50, metavar="N", help="calls that are timed (default: 50)"
    )
    timed.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    for each in (predicted, timed):
        add_imports(each)
        each.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _predict(options: argparse.Namespace) -> int:
    import_parts(options.imports, setting="--imports")
    ticket = read(options.file)
    from pipeline.inference import load_ticket, predict

    found = predict(load_ticket(ticket), options.images, top=options.top)
    named = list(zip(map(str, options.images), found, strict=True))
    if options.json:
        listed = [
            {"image": path, "classes": [{"name": name, "probability": value} for name, value in classes]}
            for path, classes in named
        ]
        print(json.dumps(listed, indent=1))
        return 0
    rows = [
        [path if number == 0 else "", name, f"{100 * value:.2f}"]
        for path, classes in named
        for number, (name, value) in enumerate(classes)
    ]
    print_table([["image", "class", "probability %"], *rows], left=(0, 1))
    return 0


def _bench(options: argparse.Namespace) -> int:
    import_parts(options.imports, setting="--imports")
    ticket = read(options.file)
    from pipeline.inference.bench import bench, cells, notes
    from pipeline.inference.timing import describe_load, describe_processor

    given = {"threads": options.threads, "batch": options.batch, "rounds": options.rounds}
    rows, left_out = bench(ticket, **given, with_compile=not options.no_compile)
    if options.json:
        facts = {"processor": describe_processor(), **given, "left_out": left_out}
        print(json.dumps(facts | {"engines": [asdict(row) for row in rows]}, indent=1))
        return 0
    of = ticket.provenance
    print(f"{of.model}, density {ticket.density:.4f}, sha256 {ticket.content_digest[:12]}")
    print(f"{describe_processor()}; " + ", ".join(f"{name} {number}" for name, number in given.items()))
    print(describe_load() + "\n")
    print_table(cells(rows), left=(0, 1))
    print("\n" + "\n".join(notes(rows, left_out)))
    return 0
