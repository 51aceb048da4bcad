"""Measure what ``train.wire: bf16`` does to masks and accuracy, beside what rounding alone does.

::

    python -m benchmarks.wire --data data/fashion_mnist --seeds 5

Each seed trains a shortened demo three times on two ranks: with fp32 and with bf16 on the wire, and
with fp32 and a learning rate that is larger by one millionth, so that its weights differ only in
their last bits. Training is chaotic, so that even this run ends with different masks; the effect of
bf16 is what it changes beyond that.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import local_path
from pipeline.tickets.compare import PackedMasks, mask_overlap
from pipeline.tickets.format import read_packed
from pipeline.tickets.store import TicketStore
from tests.support.ranks import RankServer

SHORT = [
    "model.args={width: 16, stem_stride: 2}",
    "plan.exploration.length=1 epochs",
    "plan.exploration.update_interval=25 steps",
    "plan.num_refinements=2",
    "plan.refinement.length=0.5 epochs",
    *("tracking.backend=jsonl", "checkpoint.every=10 epochs", "train.threads_per_rank=1", "train.channels_last=true"),
]
RUNS = {"fp32": [], "bf16": ["train.wire=bf16"], "last bits": ["plan.exploration.lr.value=0.1000001"]}


def masks_and_accuracy(output: Path) -> tuple[list[PackedMasks], dict[str, float]]:
    """Return the masks of every ticket, and the top-1 of every row of the report."""
    store = TicketStore(output / "tickets")
    masks = [PackedMasks.of(read_packed(ref.path)) for ref in store.list()]
    rows = json.loads((output / "report" / "report.json").read_text())["rows"]
    return masks, {row["name"]: row["top1"] for row in rows}


def mean_and_error(values: Sequence[float]) -> str:
    """Format the mean in per cent, with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):+.2f} ± {100 * error:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder with train.beton and val.beton, as python -m data_prep fashion-mnist writes them",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="number of seeds, each with one run per format (default: 5)"
    )
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="configuration settings to override"
    )
    given = parser.parse_args(argv)
    files = [f"data.train={given.data.resolve() / 'train.beton'}", f"data.val={given.data.resolve() / 'val.beton'}"]
    found: dict[str, list[tuple[list[PackedMasks], dict[str, float]]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory(prefix="wire-") as name:
        folder = Path(name)

        def arguments(output: Path, *more: str) -> list[str]:
            return ["--config", "fashion_mnist_s90", *files, f"output_dir={output}", *SHORT, *given.overrides, *more]

        with RankServer.running(arguments(folder / "none"), log=folder / "server.log") as server:
            for seed in range(given.seeds):
                for kind, overrides in RUNS.items():
                    output = folder / f"{seed}-{kind.replace(' ', '-')}"
                    job = server.start(arguments(output, f"seed={seed}", *overrides), log=output.with_suffix(".log"))
                    codes = job.wait(3600)
                    assert codes == [0, 0], job.text[-3000:]
                    found[kind].append(masks_and_accuracy(output))
                print(f"seed {seed}: { ({kind: runs[-1][1] for kind, runs in found.items()}) }", flush=True)
    for kind in ("bf16", "last bits"):
        pairs = list(zip(found["fp32"], found[kind], strict=True))
        for index in range(len(pairs[0][0][0])):
            overlaps = [overlap for one, other in pairs if (overlap := mask_overlap(one[0][index], other[0][index]))]
            print(
                f"{kind:9} against fp32, ticket {index}: of the weights in either mask "
                f"{mean_and_error([o.share for o in overlaps])} % are in both, "
                f"{100 * overlaps[0].share_by_chance:.1f} % by chance"
            )
        for row in pairs[0][0][1]:
            change = mean_and_error([other[1][row] - one[1][row] for one, other in pairs])
            print(f"{kind:9} against fp32, top-1 of {row:18} {change} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
