"""Train the demo's network from three kinds of files of the same images: ``python -m benchmarks.formats``.

Fashion-MNIST becomes folders of PNG files; from these ``data_prep image-folder`` writes raw ``.beton`` files and
some of JPEG quality 90. For each kind, one epoch is trained with every seed, on one rank and thread. All are
evaluated on the raw test set, the folders on their own, which has the same pixels. Printed are top-1 and NLL as
means over the seeds, and the differences to the folders, paired by seed, with 95% intervals.

Stopped, it goes on with the same command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_prep.doctor import FASHION_MNIST
from data_prep.fashion_mnist import SPLITS, read_split
from pipeline.command_line import ArgumentParser, local_path, run_to_end, whole_number
from pipeline.errors import RunError
from pipeline.evaluation.paired import mean_of, paired_difference
from pipeline.files import parse_json, read_capped

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "launchers" / "sweep.py"
QUALITY = 90
KINDS = {".beton, raw": "raw", f".beton, JPEG {QUALITY}": "jpeg", "folders of PNG": "folder"}
BASELINE = "folders of PNG"
MAX_BYTES = 100_000_000
METRICS = {"top1": ("top-1 %", 100, 2), "nll": ("NLL", 1, 4)}  # of a report's rows -> heading, factor, decimals
ONE_EPOCH = ("plan.timetable=itop", "plan.exploration.length=1 epochs")

Values = Mapping[int, Mapping[str, float]]  # seed -> metric -> value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.formats",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=local_path, required=True, metavar="FOLDER", help="files and runs")
    parser.add_argument("--seeds", type=whole_number(2), default=5, metavar="N", help="runs of each (default: 5)")
    parser.add_argument("--jobs", type=whole_number(1), default=1, metavar="N", help="runs at once (default: 1)")

    def run() -> int:
        given = parser.parse_args(arguments)
        write_files(given.output)
        for kind in KINDS.values():
            train(kind, given.output, seeds=given.seeds, jobs=given.jobs)
        print(table({name: values_of(given.output / "runs" / kind) for name, kind in KINDS.items()}))
        return 0

    return run_to_end(run)


def write_files(output: Path) -> None:
    """Write the images as folders and as both kinds of ``.beton`` files, as far as they are not there."""
    png = output / "folder"
    for split, prefix in SPLITS.items():
        if (png / split).is_dir():
            continue
        part = png / f"{split}.part"
        images = read_split(FASHION_MNIST, prefix)
        for index in range(len(images)):
            image, label = images[index]
            (part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(part / str(label) / f"{index:05d}.png", compress_level=1)
        part.rename(png / split)
    for kind, mode in (("raw", "raw"), ("jpeg", "jpg")):
        if not (output / kind / "val.beton.json").is_file():
            splits = [f"--{split}={png / split}" for split in SPLITS]
            options = [*splits, "--output", str(output / kind), "--write-mode", mode, "--jpeg-quality", str(QUALITY)]
            _run([sys.executable, "-m", "data_prep", "image-folder", *options])


def train(kind: str, output: Path, *, seeds: int, jobs: int) -> None:
    """Train one epoch from the files of a kind with every seed that is not done yet."""
    files = [f"data.train={output / kind / 'train.beton'}", f"data.val={output / 'raw' / 'val.beton'}"]
    if kind == "folder":
        files = ["data.loader=folder", *(f"data.{split}={output / kind / split}" for split in SPLITS)]
    options = ["--config", "fashion_mnist_s90", "--seeds", str(seeds), "--threads", "1", "--jobs", str(jobs)]
    _run([sys.executable, str(SWEEP), *options, "--output", str(output / "runs" / kind), *ONE_EPOCH, *files])


def values_of(runs: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of the last ticket of every run of a sweep, by seed."""
    found = {}
    for path in sorted(runs.glob("*seed=*/report/report.json")):
        row = parse_json(read_capped(path, MAX_BYTES))["rows"][0]
        found[int(path.parent.parent.name.rpartition("=")[2])] = {metric: float(row[metric]) for metric in METRICS}
    return found


def table(values: Mapping[str, Values]) -> str:
    """Return means over seeds and the paired differences to the folders, as a table of Markdown."""
    headings = [heading for heading, _, _ in METRICS.values()]
    rows = [["files", "seeds", *headings, *(f"{heading}, less that of folders" for heading in headings)]]
    rows.append(["---"] * len(rows[0]))
    for name, of in values.items():
        means, differences = [], []
        for metric, (_, factor, decimals) in METRICS.items():
            mine, base = ({seed: factor * row[metric] for seed, row in rows.items()} for rows in (of, values[BASELINE]))
            means.append(f"{mean_of(list(mine.values())).mean:.{decimals}f}")
            found = paired_difference(mine, base)
            if name == BASELINE or found is None or found.low is None or found.high is None:
                differences.append("")
                continue
            low, high = f"{found.low:+.{decimals}f}", f"{found.high:+.{decimals}f}"
            differences.append(f"{found.mean:+.{decimals}f} [{low}, {high}]")
        rows.append([name, str(len(of)), *means, *differences])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _run(command: list[str]) -> None:
    code = subprocess.call(command, cwd=ROOT)
    if code:
        raise RunError(f"{command[1]}: ended with exit code {code}", do="read the lines above")


if __name__ == "__main__":
    sys.exit(main())
