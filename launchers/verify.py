"""Verify a run: ``python -m launchers.verify RUN|BUNDLE|ZOO-NAME``. See docs/verification.md."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Sequence

from launchers.environment import check_environment, require_one_process
from launchers.start import require_environment
from pipeline.command_line import ArgumentParser, add_version, leave, path_or_url, run_to_end, whole_number

ONCE = (
    "start it with plain python, or srun --ntasks 1 python -m launchers.verify …, and it starts as many as the run had"
)
EXAMPLES = """\
examples:
  python -m launchers.verify runs/a                                    run one segment again, drawn at random
  python -m launchers.verify runs/a --segments 4 --seed 20261130       four of them, with a seed that others can repeat
  python -m launchers.verify a.tar data.train=/data/train.beton data.val=/data/val.beton
  python -m launchers.verify a.tar --segments 0                        check everything without running anything
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = ArgumentParser(
        prog="python -m launchers.verify",
        allow_abbrev=False,
        description="Check that all that a run left agrees with its chain of digests; then draw segments of its "
        "training by a seed, run them again on as many ranks, and compare every bit. Exit code 0: verified, "
        "78: something does not agree.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    help_target = "output_dir of a run, a file of python -m launchers.bundle, or the name of an entry of the zoo"
    parser.add_argument("target", type=path_or_url, metavar="RUN|BUNDLE|ZOO-NAME", help=help_target)
    parser.add_argument(
        "--segments",
        type=whole_number(0, 10**6),
        default=1,
        metavar="K",
        help="number of segments to draw and run again; 0: none, only check what is there (default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        metavar="S",
        help="seed of the draw, chosen after the run was published (default: a random one, which is printed)",
    )
    parser.add_argument(
        "--imports",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package of your own that the run was trained with, to import first; may be repeated",
    )
    help_overrides = "setting of this machine: data.train, data.val, evaluation.held_out, data.num_workers, …"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help_overrides)
    return parser.parse_intermixed_args(None if argv is None else list(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, print the verdict, and return the exit code."""
    require_environment()

    def run() -> int:
        given = parse(argv)
        check_environment()
        require_one_process("verifications", ONCE)
        logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
        from pipeline.parts import import_parts
        from pipeline.verification.verdict import verify

        import_parts(given.imports, setting="--imports")

        seed = secrets.randbelow(2**32) if given.seed is None else given.seed
        print(verify(given.target, num_segments=given.segments, seed=seed, overrides=given.overrides))
        return 0

    return run_to_end(run)


if __name__ == "__main__":
    leave(main())
