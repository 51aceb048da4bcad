"""Run the whole demo on one host, and on three emulated hosts by every launcher.

::

    python -m tests.campaigns.several_hosts --data data/fashion_mnist
    python -m tests.campaigns.several_hosts --data data/fashion_mnist --launchers torchrun deepspeed \\
        --overrides "plan.exploration.length=1 epochs"

Both use three ranks and must write the same tickets. Needs root, and ten minutes per run on two free
cores. The hosts are network namespaces with real TCP between them, one rank on each. In every run
all ranks compare their masks after every update, and end with code 78 if they differ.
``tests/end_to_end/test_several_hosts.py`` is the short version.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pipeline.command_line import local_path
from pipeline.tickets.store import TicketStore
from tests.support.launch import command
from tests.support.several_hosts import SSHD, TRAIN, launched, reachable_by_ssh, running
from tools.hosts import hosts, unsupported_reason

RANKS = 3
# The batch must be divisible by three. The number of threads, by default a share of the host's cores,
# changes the last bits.
THREE = [
    "train.global_batch=126",
    "plan.reference_batch=126",
    "train.threads_per_rank=1",
    "tracking.backend=jsonl",
    "checkpoint.every=10 epochs",
]


def digests(output: Path) -> dict[int, str]:
    """Return the digest of every ticket's tensors, by index.

    It covers masks and every bit of weights and statistics, but not the header, which names the run.
    """
    files = {ref.index: ref.path.read_bytes() for ref in TicketStore(output / "tickets").list()}
    return {
        index: hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        for index, content in files.items()
    }


def codes_of(where: str, output: Path, options: Sequence[str]) -> list[int]:
    """Run the demo on ``one host``, or on three by the launcher ``where``; returns the exit codes."""
    folder = output.with_suffix(".logs")
    folder.mkdir()
    if where == "one host":
        with running([command("torchrun", TRAIN, options, ranks=RANKS)], folder) as processes:
            return [process.wait() for process in processes]
    with (
        hosts(RANKS) as at,
        reachable_by_ssh(at, folder) if where == "pdsh" else nullcontext(),
        running(launched(where, at, folder, options), folder) as processes,
    ):
        return [process.wait() for process in processes]


def compare(data: Path, folder: Path, launchers: Sequence[str], overrides: Sequence[str]) -> bool:
    """Run everything and print a line each; returns whether all tickets are as on one host."""
    files = [f"data.train={data.resolve() / 'train.beton'}", f"data.val={data.resolve() / 'val.beton'}"]
    expected: dict[int, str] = {}
    is_well = True
    for where in ("one host", *launchers):
        output, started = folder / where.replace(" ", "-"), time.monotonic()
        codes = codes_of(
            where, output, ["--config", "fashion_mnist_s90", *files, f"output_dir={output}", *THREE, *overrides]
        )
        found = digests(output)
        expected = expected or found
        num_same = sum(found.get(index) == digest for index, digest in expected.items())
        is_well &= not any(codes) and bool(found) and num_same == len(expected) == len(found)
        seconds = time.monotonic() - started
        print(
            f"{where:10} codes {codes}, {num_same}/{len(expected)} tickets as on one host, {seconds:.0f} s", flush=True
        )
        if any(codes):
            print(
                "\n".join(
                    log.read_text(errors="replace")[-2000:]
                    for log in sorted(output.with_suffix(".logs").glob("host-*.log"))
                )
            )
    print("\n".join(f"ticket {index}: {digest}" for index, digest in sorted(expected.items())))
    return is_well


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder with train.beton and val.beton, as python -m data_prep fashion-mnist writes them",
    )
    present = ["torchrun", "deepspeed", *(["pdsh"] if shutil.which("pdsh") and shutil.which(SSHD) else [])]
    parser.add_argument(
        "--launchers",
        nargs="+",
        choices=["torchrun", "deepspeed", "pdsh"],
        default=present,
        metavar="NAME",
        help=f"launchers to test (default: those that are installed here: {', '.join(present)})",
    )
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="configuration settings to override, for example to shorten the runs",
    )
    given = parser.parse_args(argv)
    if reason := unsupported_reason():
        raise SystemExit(f"cannot emulate hosts: {reason}")
    with tempfile.TemporaryDirectory(prefix="several-hosts-") as folder:
        is_well = compare(given.data, Path(folder), given.launchers, given.overrides)
    print("all well" if is_well else "NOT WELL")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
