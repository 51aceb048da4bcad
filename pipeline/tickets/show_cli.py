"""The commands that look at tickets: ``ls``, ``show``, ``verify`` and ``diff``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.command_line import path_or_url
from pipeline.errors import DataError, IntegrityError, RunError
from pipeline.tickets.cli import Add, print_table, read


def add_commands(command: Add) -> None:
    """Add the commands that look at tickets."""
    listed = command("ls", _list, "list the intact tickets in folders, in the order of their index")
    listed.add_argument(
        "folders", type=path_or_url, nargs="+", metavar="PLACE", help="run, folder with tickets, or ticket file"
    )
    shown = command("show", _show, "print a ticket's provenance and layers")
    shown.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file to show")
    verified = command("verify", _verify, "check every byte of ticket files; exit with code 78 if any is damaged")
    verified.add_argument(
        "paths",
        type=path_or_url,
        nargs="+",
        metavar="PATH",
        help="ticket file, or folder or run whose tickets are all checked",
    )
    differing = command(
        "diff", _diff, "compare two tickets: the overlap of their masks and the distance between their weights"
    )
    differing.add_argument("files", type=path_or_url, nargs=2, metavar="FILE", help="the two ticket files to compare")
    for each in (listed, shown, differing):
        each.add_argument("--json", action="store_true", help="print JSON instead of a table")


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
    print_table([heads, *rows], left=(1, 2, 7, 8))
    return 0


def _show(options: argparse.Namespace) -> int:
    ticket = read(options.file)
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
    print_table([["layer", "shape", "active", "density"], *cells], left=(0,))
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
    from pipeline.tickets.remote import ticket_names
    from pipeline.tickets.store import tickets_in

    for path in paths:
        if not path.is_dir():
            yield path
            continue
        folder = tickets_in(path)
        found = [folder / name for name in ticket_names(each.name for each in folder.iterdir())]
        if not found:
            raise DataError(
                f"{path}: contains no ticket files", do="pass a folder that contains ticket-….safetensors files"
            )
        yield from found


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
    print_table([["tensor", "distance", "relative", "only in first", "only in second"], *cells], left=(0,))
    return 0
