"""``python -m tools.zoo``: put a run into the zoo, and write ``zoo/README.md`` from its index."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.bundle import spread
from pipeline import zoo
from pipeline.command_line import ArgumentParser, commands_of, local_path, run_command, whole_number
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, WriteError
from pipeline.files import parse_json, sha256_of, write_atomically
from pipeline.tickets import read_verified
from pipeline.verification.bundle import files_of, unpacked, write_bundle
from pipeline.verification.checks import check_all
from pipeline.verification.claims import Claims, read_claims

MAX_TICKET_BYTES, MAX_ZOO_BYTES = 1_000_000, 20_000_000
LICENCE = "Apache-2.0, as the project"
EPILOG = """\
example:
  python -m tools.zoo add runs/fashion_mnist_s90 --name fashion_mnist_s90 --ticket superposition-mean --checkpoints 2 \\
      --data 'Fashion-MNIST, 60,000 training and 10,000 test images (MIT licence, arXiv 1708.07747)'
"""
PAGE = """\
# The zoo

Trained tickets to start from, each with the run that it comes from: configuration, log, chain of
digests, report, and checkpoints that a verification starts from. They come with a checkout of the
project, not with the package.

{entries}

A row is the network that `load_ticket("NAME")` loads; `load_ticket("NAME/TICKET")` loads another
one of its card. train × and test × are FLOPs relative to a dense network.

```python
from pipeline.inference import load_ticket

network = load_ticket("{first}")
probabilities = network.predict(["boot.png"])[0]
print(network.classes[int(probabilities.argmax())])
```

`python -m benchmarks.study zoo` trains all of these runs again and puts them in their places;
`python -m tools.zoo add RUN --name NAME …` adds a finished run: each ticket has at most 1 MB, the zoo
at most 20 MB. It writes this page, and so does `python -m tools.zoo page`.
{cards}"""
CARD = """
## {name}

| | |
| --- | --- |
| data | {data} |
| network | {network} |
| method | {method} |
| trained on | {trained_on} |
| licence | {licence} |
| load | `load_ticket("{name}")` |
| evaluate | `python launchers/evaluate.py --tickets {name} --data {val} --output judged` |
| verify | `python -m launchers.verify {name} --segments 1 data.train={train} data.val={val}` |

{networks}
"""
COLUMNS = {  # of a report's rows -> heading, factor, decimals
    "top1": ("top-1 %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE %", 100, 2),
    "density": ("density", 1, 4),
    "training_flops_ratio": ("train ×", 1, 3),
    "inference_flops_ratio": ("test ×", 1, 3),
    "num_parameters": ("parameters", 1, 0),
}


def add(
    run: Path,
    name: str,
    *,
    ticket: str,
    data: str,
    licence: str = LICENCE,
    num_checkpoints: int,
    folder: Path,
    replace: bool = False,
) -> Path:
    """Put a finished run into the zoo as an unpacked bundle, and return the folder of the entry.

    Args:
        run: output_dir of the run.
        name: name of the entry.
        ticket: the network that the entry's name loads: name of a file without its ending.
        data: what the network was trained on: name, number of images, licence, source.
        licence: of the tickets.
        num_checkpoints: number of the run's checkpoints that are published.
        folder: the zoo.
        replace: put the run in the place of an entry that has the name.

    Raises:
        ConfigError: the name is invalid, or taken and not to be replaced, or there is no such ticket or no report.
        IntegrityError: what the run claims does not agree.
        WriteError: a ticket or the zoo would be too large.
    """
    known = zoo.entries(folder)
    is_taken = name in known or (folder / name).exists()
    if not zoo.NAME.fullmatch(name) or (is_taken and not replace):
        why = "is in the zoo already" if zoo.NAME.fullmatch(name) else "is not a name of lower-case letters and digits"
        raise ConfigError(f"--name {name}: {why}", do="choose another name")
    claims = read_claims(run, str(run))
    check_all(claims)
    if not claims.is_ended:
        raise ConfigError(f"{run}: has no report", do="let the run end first")
    with tempfile.TemporaryDirectory() as temporary:
        packed, staged = Path(temporary) / "bundle.tar", Path(temporary) / "run"
        chosen = spread(list(claims.checkpoints.values()), num_checkpoints)
        _stage(run, staged, files_of(run, chosen), output_dir=claims.config.output_dir)
        write_bundle(staged, packed, [staged / path.relative_to(run) for path in chosen])
        with unpacked(packed) as content:
            networks = networks_of(content)
            if ticket not in networks:
                raise ConfigError(f"--ticket {ticket}: is not one of {', '.join(networks)}", do="choose one of them")
            _check_sizes(content, folder, replaced=folder / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(content, folder / name)
    entry: dict[str, Any] = {"bundle": name, "sha256": sha256_of(folder / name / zoo.MANIFEST), "ticket": ticket}
    entry |= {"data": data, "licence": licence, **facts_of(claims), "networks": networks}
    index = {"entries": dict(sorted({**known, name: entry}.items()))}
    write_atomically(folder / zoo.INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    return folder / name


def _stage(run: Path, staged: Path, names: Sequence[str], *, output_dir: str) -> None:
    """Copy files of a run, without the place of its folder on this machine, which MLflow's description has."""
    for name in names:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, staged / name)
    log = staged / "metrics.jsonl"
    if log.exists():
        log.write_text(log.read_text().replace(str(run.resolve()), output_dir))


def networks_of(content: Path) -> dict[str, dict[str, float]]:
    """Return the numbers of each ticket and superposed network of an unpacked bundle, from its report."""
    rows = {row["name"]: row for row in parse_json((content / "report" / "report.json").read_bytes())["rows"]}
    found = {path.stem: path.stem for path in (content / "report").glob("*.safetensors")}
    for path in (content / "tickets").glob("*.safetensors"):
        found[path.stem] = f"ticket-{read_verified(path).provenance.index}"
    return {name: {key: rows[found[name]][key] for key in COLUMNS} for name in sorted(found) if found[name] in rows}


def facts_of(claims: Claims) -> dict[str, Any]:
    """Return what a card says of the run: network, method, data files, and where it was trained."""
    config: Config = claims.config
    environment = claims.start["environment"]
    ranks, threads = claims.start["ranks"], environment["threads"]
    where = f"{environment['device']}, ranks: {ranks}, threads of each: {threads}"
    return {
        "network": " ".join([config.model.name, *(f"{key}={value}" for key, value in config.model.args.items())]),
        "method": f"{config.sparsity.method}, {config.plan.timetable}, density {config.sparsity.density:g}, "
        f"seed {config.seed}, {claims.last_step:,} steps of {config.train.global_batch} samples",
        "trained_on": f"{environment['cpu']} ({where}), torch {environment['torch']}",
        "train": config.data.train,
        "val": config.data.val,
    }


def page(folder: Path) -> str:
    """Return the text of ``zoo/README.md``."""
    known: Mapping[str, Any] = zoo.entries(folder)
    rows = [
        [f"[{name}](#{name})", entry["data"], *_cells(entry["networks"][entry["ticket"]])]
        for name, entry in known.items()
    ]
    header = ["name", "data", *(heading for heading, _, _ in COLUMNS.values())]
    cards = []
    for name, entry in known.items():
        first = entry["ticket"]
        names = [first, *(each for each in entry["networks"] if each != first)]
        networks = [[each, *_cells(entry["networks"][each])] for each in names]
        cards.append(CARD.format_map(entry | {"name": name, "networks": _table(["ticket", *header[2:]], networks)}))
    return PAGE.format(entries=_table(header, rows), first=next(iter(known), "NAME"), cards="".join(cards))


def _cells(row: Mapping[str, float]) -> list[str]:
    return [f"{factor * row[key]:,.{decimals}f}" for key, (_, factor, decimals) in COLUMNS.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _check_sizes(content: Path, folder: Path, *, replaced: Path) -> None:
    for part in ("report", "tickets"):
        for path in (content / part).glob("*.safetensors"):
            if path.stat().st_size > MAX_TICKET_BYTES:
                raise WriteError(
                    f"{path.name}: has {path.stat().st_size:,} bytes, expected at most {MAX_TICKET_BYTES:,} in the zoo",
                    do="train a smaller network, or set tickets.dtype=bf16",
                )
    total = size_of(content) + size_of(folder) - size_of(replaced)
    if total > MAX_ZOO_BYTES:
        raise WriteError(
            f"{folder}: would have {total:,} bytes, expected at most {MAX_ZOO_BYTES:,}",
            do="publish fewer checkpoints (--checkpoints), or remove an entry",
        )


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(
        prog="python -m tools.zoo",
        allow_abbrev=False,
        description="Put a finished run into the zoo, or write its page from its index.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = commands_of(parser)
    adding = command("add", _add, "add a run, and write zoo/README.md")
    adding.add_argument("source", type=local_path, metavar="RUN", help="output_dir of the run")
    adding.add_argument("--name", required=True, metavar="NAME", help="name of the entry")
    adding.add_argument("--ticket", required=True, metavar="TICKET", help="network that the name loads")
    adding.add_argument("--data", required=True, metavar="TEXT", help="data set: name, images, licence, source")
    adding.add_argument("--licence", default=LICENCE, metavar="TEXT", help="of the tickets (default: %(default)s)")
    help_checkpoints = "checkpoints of the run that are published, evenly spread (default: %(default)s)"
    adding.add_argument("--checkpoints", type=whole_number(0), default=2, metavar="N", help=help_checkpoints)
    adding.add_argument("--replace", action="store_true", help="put the run in the place of an entry of this name")
    command("page", _page, "write zoo/README.md")
    return parser


def _add(given: argparse.Namespace) -> int:
    zoo.FOLDER.mkdir(exist_ok=True)
    added = add(
        given.source,
        given.name,
        ticket=given.ticket,
        data=given.data,
        licence=given.licence,
        num_checkpoints=given.checkpoints,
        folder=zoo.FOLDER,
        replace=given.replace,
    )
    print(f"{added}: {size_of(added):,} bytes; the zoo has {size_of(zoo.FOLDER):,} of {MAX_ZOO_BYTES:,}")
    return _page(given)


def _page(given: argparse.Namespace) -> int:
    write_page(zoo.FOLDER)
    return 0


def write_page(folder: Path) -> None:
    """Write the zoo's README.md."""
    write_atomically(folder / "README.md", page(folder).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())
