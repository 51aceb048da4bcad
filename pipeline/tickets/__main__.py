"""``python -m pipeline.tickets``: list, show, verify, export, compare and run tickets.

Slow imports wait until the arguments have been checked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.command_line import (
    ArgumentParser,
    add_version,
    commands_of,
    local_path,
    path_or_url,
    run_command,
    whole_number,
)
from pipeline.errors import ConfigError, DataError, IntegrityError, RunError, WriteError
from pipeline.parts import import_parts

if TYPE_CHECKING:
    from pipeline.tickets.format import Ticket

FORMATS = (".safetensors", ".pt", ".onnx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error that a user can cause is one line on stderr."""
    return run_command(build_parser, arguments)


def build_parser() -> ArgumentParser:
    """Build the parser of all commands."""
    parser = ArgumentParser(
        prog="python -m pipeline.tickets",
        description="List, show, verify, export, compare and run tickets: files that each hold one trained sparse "
        "network. A path may also be any URL that fsspec supports. Where one file is expected, a run or a folder of "
        "tickets stands for its last ticket.",
        allow_abbrev=False,
    )
    add_version(parser)
    command = commands_of(parser)
    listed = command("ls", _list, "list the intact tickets in folders, in the order of their index")
    listed.add_argument(
        "folders", type=path_or_url, nargs="+", metavar="PLACE", help="run, folder with tickets, or ticket file"
    )
    shown = command("show", _show, "print a ticket's provenance and layers")
    shown.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file to show")
    for each in (listed, shown):
        each.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verified = command("verify", _verify, "check every byte of ticket files; exit with code 78 if any is damaged")
    verified.add_argument(
        "paths",
        type=path_or_url,
        nargs="+",
        metavar="PATH",
        help="ticket file, or folder or run whose tickets are all checked",
    )
    exported = command("export", _export, "write a ticket as an ordinary dense network, with zeros outside the masks")
    exported.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file to export")
    help_output = (
        "file to write; its name decides the format: .safetensors or .pt (a state_dict) or .onnx (the network; needs "
        "the packages onnx and onnxscript); .safetensors and .onnx say classes, image size, mean and deviation, density"
    )
    exported.add_argument("--output", type=local_path, required=True, metavar="FILE", help=help_output)
    differing = command(
        "diff", _diff, "compare two tickets: the overlap of their masks and the distance between their weights"
    )
    differing.add_argument("files", type=path_or_url, nargs=2, metavar="FILE", help="the two ticket files to compare")
    differing.add_argument("--json", action="store_true", help="print JSON instead of a table")
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
    imported = command("import", _import, "make a ticket of a sparse network that another project trained")
    imported.add_argument("file", type=local_path, metavar="FILE", help="state_dict: .safetensors, or of torch.save")
    imported.add_argument(
        "--model", required=True, metavar="NAME", help="the network, as model.name of a configuration"
    )
    imported.add_argument(
        "--model-args", default="{}", metavar="JSON", help="its further arguments, as a JSON object (default: {})"
    )
    imported.add_argument(
        "--num-classes", type=whole_number(2), default=0, metavar="N", help="outputs (default: as --like, or 1000)"
    )
    imported.add_argument(
        "--layout",
        default="auto",
        metavar="NAME",
        help="how the file keeps its masks: torch-prune, str, masks, masks-apart, zeros (default: auto, recognise it)",
    )
    imported.add_argument(
        "--like",
        type=path_or_url,
        metavar="TICKET",
        help="ticket with the same classes and preparation of images, which are taken from it",
    )
    imported.add_argument(
        "--imagenet",
        action="store_true",
        help="images are prepared as torchvision's weights for ImageNet expect it",
    )
    imported.add_argument("--name", default="", help="what trained it, for reports (default: the name of the file)")
    imported.add_argument("--output", type=local_path, required=True, metavar="FILE", help=".safetensors file to write")
    for each in (exported, predicted, timed, imported):
        each.add_argument(
            "--imports",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="package of your own to import first, whose network it is; may be repeated",
        )
    for each in (predicted, timed):
        each.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _list(options: argparse.Namespace) -> int:
    from pipeline.tickets.remote import fetched
    from pipeline.tickets.store import TicketStore

    with fetched(options.folders) as folders:
        found = [
            (f"{place.rstrip('/')}/{ref.path.name}" if "://" in place else str(ref.path), ref.path.stat().st_size, ref)
            for place, folder in zip(options.folders, folders, strict=True)
            for ref in TicketStore(folder).list()
        ]
    if options.json:
        print(
            json.dumps(
                [{"path": path, "sha256": ref.content_digest, **asdict(ref.provenance)} for path, _, ref in found],
                indent=1,
            )
        )
        return 0
    heads = ["index", "phase", "method", "epochs", "density", "R_s", "bytes", "sha256", "file"]
    rows = [
        [
            *(
                str(ref.index),
                ref.provenance.phase,
                ref.provenance.method,
                f"{ref.provenance.epochs:g}",
                f"{ref.provenance.density:g}",
            ),
            *(f"{ref.provenance.r_s:.3f}", f"{num_bytes:,}", ref.content_digest[:12], path),
        ]
        for path, num_bytes, ref in found
    ]
    _print_table([heads, *rows], left=(1, 2, 7, 8))
    return 0


def _show(options: argparse.Namespace) -> int:
    ticket = _read(options.file)
    layers: list[dict[str, Any]] = [
        {"name": name, "shape": list(mask.shape), "active": int(mask.sum()), "density": float(mask.double().mean())}
        for name, mask in ticket.masks.items()
    ]
    totals = {
        "num_active": ticket.num_active,
        "actual_density": ticket.density,
        "num_parameters": ticket.num_parameters,
    }
    if options.json:
        network = None if ticket.network is None else asdict(ticket.network)
        facts = {**asdict(ticket.provenance), **totals, "network": network, "sha256": ticket.content_digest}
        print(json.dumps({**facts, "layers": layers}, indent=1))
        return 0
    facts = {**asdict(ticket.provenance), **totals}
    if (of := ticket.network) is not None:
        shown = ", ".join(map(repr, of.classes[:3])) + ", …" * (len(of.classes) > 3)
        facts |= {
            "classes": f"{len(of.classes)}: {shown}",
            "network_density": of.density,
            "stays_dense": dict(of.dense),
        }
    facts |= {"sha256": ticket.content_digest}
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    cells = [
        [layer["name"], "×".join(map(str, layer["shape"])), f"{layer['active']:,}", f"{layer['density']:.4f}"]
        for layer in layers
    ]
    print()
    _print_table([["layer", "shape", "active", "density"], *cells], left=(0,))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from pipeline.tickets.remote import fetched
    from pipeline.tickets.verify import read_verified

    num_damaged = num_files = 0
    with fetched(options.paths) as paths:
        for path in _files(paths):
            num_files += 1
            try:
                ticket = read_verified(path)
            except RunError as error:
                num_damaged += 1
                print(f"BAD {error.what}")
            else:
                print(
                    f"ok  {path}: ticket {ticket.provenance.index} of {ticket.provenance.parent_run}, "
                    f"sha256 {ticket.content_digest}"
                )
    if num_damaged:
        raise IntegrityError(
            f"{num_damaged} of {num_files} files are not intact tickets", do="restore them from a copy"
        )
    return 0


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    from pipeline.tickets.store import tickets_in

    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(tickets_in(path).glob("*.safetensors"))
        if not found:
            raise DataError(
                f"{path}: contains no ticket files", do="pass a folder that contains ticket-….safetensors files"
            )
        yield from found


def _export(options: argparse.Namespace) -> int:
    output: Path = options.output
    if output.suffix not in FORMATS:
        raise ConfigError(f"--output {output}: expected a name that ends in one of {', '.join(FORMATS)}")
    if output.exists():
        raise WriteError(f"{output}: already exists", do="choose another name, or remove the file")
    import_parts(options.imports, setting="--imports")
    ticket = _read(options.file)
    from pipeline.files import write_atomically
    from pipeline.tickets.export import export

    write_atomically(output, export(ticket, output.suffix))
    print(f"{output}: {ticket.provenance.model}, {ticket.num_active:,} of its sparse weights not pruned, stored dense")
    return 0


def _import(options: argparse.Namespace) -> int:
    from pipeline.files import parse_json, write_atomically

    output: Path = options.output
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
    if output.exists():
        raise WriteError(f"{output}: already exists", do="choose another name, or remove the file")
    try:
        args = parse_json(options.model_args)
    except ValueError as error:
        raise ConfigError(
            f"--model-args: is not valid JSON: {error}", do='pass an object such as {"width": 8}'
        ) from None
    if not isinstance(args, dict):
        raise ConfigError("--model-args: expected a JSON object", do='pass an object such as {"width": 8}')
    import_parts(options.imports, setting="--imports")
    like = None if options.like is None else _read(options.like)
    from pipeline.tickets.foreign import IMAGENET, import_ticket
    from pipeline.tickets.format import encode

    ticket, said = import_ticket(
        options.file,
        options.model,
        args=args,
        num_classes=options.num_classes,
        layout=options.layout,
        like=like,
        preprocessing=IMAGENET if options.imagenet else None,
        run=options.name,
    )
    write_atomically(output, encode(ticket))
    total = sum(mask.numel() for mask in ticket.masks.values())
    print(
        f"{output}: {ticket.provenance.model}, layout {ticket.provenance.origin['layout']}, {ticket.num_active:,} of "
        f"{total:,} weights active in {len(ticket.masks)} layers, density {ticket.density:.4f}"
    )
    for text in said:
        print(f"note: {text}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from pipeline.tickets.compare import PackedMasks, differences, mask_overlap
    from pipeline.tickets.format import read_packed, unpack
    from pipeline.tickets.remote import fetched

    with fetched(options.files) as files:
        one, other = (read_packed(path) for path in files)
    shapes = [{name: item["shape"] for name, item in packed.layout.items()} for packed in (one, other)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{options.files[0]} and {options.files[1]} are tickets of different networks",
            do="compare tickets of the same network",
        )
    overlap = mask_overlap(PackedMasks.of(one), PackedMasks.of(other))
    found = differences(unpack(one), unpack(other))
    distance = math.sqrt(sum(each.distance**2 for each in found if one.layout[each.name]["kind"] != "buffer"))
    totals: dict[str, Any] = {"same_content": one.content_digest == other.content_digest, "weight_distance": distance}
    if overlap is not None:
        totals |= {
            "mask_overlap": overlap.share,
            "by_chance": overlap.share_by_chance,
            "in_both": overlap.both,
            "in_either": overlap.either,
        }
    if options.json:
        print(json.dumps({**totals, "tensors": [asdict(each) for each in found]}, indent=1))
        return 0
    for key, value in totals.items():
        print(f"{key:<15}  {value:.6g}" if isinstance(value, float) else f"{key:<15}  {value}")
    print()
    cells = [
        [each.name, f"{each.distance:.5g}", f"{each.relative:.4f}", f"{each.num_left:,}", f"{each.num_new:,}"]
        for each in found
    ]
    _print_table([["tensor", "distance", "relative", "only in first", "only in second"], *cells], left=(0,))
    return 0


def _predict(options: argparse.Namespace) -> int:
    import_parts(options.imports, setting="--imports")
    ticket = _read(options.file)
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
    _print_table([["image", "class", "probability %"], *rows], left=(0, 1))
    return 0


def _bench(options: argparse.Namespace) -> int:
    import_parts(options.imports, setting="--imports")
    ticket = _read(options.file)
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
    _print_table(cells(rows), left=(0, 1))
    print("\n" + "\n".join(notes(rows, left_out)))
    return 0


def _read(place: str) -> Ticket:
    from pipeline.tickets.place import read_ticket

    return read_ticket(place)


def _print_table(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
