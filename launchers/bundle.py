"""Pack a run into one file to publish: ``python -m launchers.bundle RUN``. See docs/verification.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launchers.start import require_environment
from pipeline.command_line import ArgumentParser, add_version, leave, local_path, run_to_end, whole_number

EXAMPLES = """\
examples:
  python -m launchers.bundle runs/a                                    a.tar, in the current folder
  python -m launchers.bundle runs/a --output a.tar --checkpoints 4     with only four of its checkpoints
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = ArgumentParser(
        prog="python -m launchers.bundle",
        allow_abbrev=False,
        description="Pack a run into one file that others can verify: manifest with the hashes of all files, chain, "
        "log, configuration, tickets, report and checkpoints. The run is checked first; nothing is run again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("run", type=local_path, metavar="RUN", help="output_dir of the run")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="file to write (default: the name of RUN, with .tar)"
    )
    parser.add_argument(
        "--checkpoints",
        type=whole_number(0),
        metavar="N",
        help="put only N of the checkpoints into it, evenly spread: each is the start of a segment that others can "
        "run again (default: all)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and pack the run, and return the exit code."""
    require_environment()
    return run_to_end(lambda: _pack(parse(argv)))


def _pack(given: argparse.Namespace) -> int:
    from pipeline.errors import ConfigError, WriteError
    from pipeline.files import require_writable
    from pipeline.training import run_record
    from pipeline.verification.bundle import write_bundle
    from pipeline.verification.checks import check_all
    from pipeline.verification.claims import read_claims

    run: Path = given.run
    output: Path = given.output or Path(f"{run.resolve().name}.tar")
    if not (run / run_record.NAME).exists():
        raise ConfigError(f"{run}: is not the folder of a run: it has no {run_record.NAME}", do="pass its output_dir")
    require_writable(output.parent, setting="--output")
    if output.exists():
        raise WriteError(f"{output}: already exists", do="choose another --output, or remove the file")
    claims = read_claims(run, str(run))
    check_all(claims)
    chosen = spread(list(claims.checkpoints.values()), given.checkpoints)
    num_files, digest = write_bundle(run, output, chosen)
    size = output.stat().st_size
    print(f"{output}: {num_files} files, {len(chosen)} checkpoints, {size:,} bytes, sha256 {digest}")
    return 0


def spread(paths: Sequence[Path], number: int | None) -> list[Path]:
    """Return ``number`` of the paths, evenly spread, such that the gaps before, between and after them are alike."""
    if number is None or number >= len(paths):
        return list(paths)
    return [paths[(2 * k + 1) * len(paths) // (2 * number)] for k in range(number)]


if __name__ == "__main__":
    leave(main())
