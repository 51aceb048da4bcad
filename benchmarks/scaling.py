"""Predict what gradient averaging costs, for docs/scaling.md: ``python -m benchmarks.scaling``.

This is arithmetic only. ``--measured FILE`` (the JSON of ``python -m benchmarks.gradients --json
FILE``) prints the measured times beside the predicted ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.command_line import local_path

# ResNet-50: all parameters, and the ones in its 54 sparse tensors
NUM_PARAMETERS, NUM_SPARSE = 25_557_032, 25_502_912
BYTES = 4
EFFICIENCY = 0.95  # the payload's share of a link, after Ethernet, IP and TCP headers
# One A100, bf16, channels-last, 224 px: eight of them reach 24,000 images/s (published FFCV runs).
# Two thirds of a step are the backward pass.
IMAGES_PER_SECOND, BATCH, BACKWARD = 3000.0, 256, 2 / 3
GPUS_PER_NODE = 8  # joined by NVLink at 300 GB/s
NVLINK_BYTES_PER_SECOND = 300e9
COPY_BYTES_PER_SECOND = 0.8e12  # packing and unpacking on the device: every gradient is read once and written once
MEMORY_BYTES_PER_SECOND, LAUNCH_SECONDS = 1.5e12, 7e-6  # of an A100; of one operation, asked for by the host
# Operations of the device that plain torch has not, counted on the emulated GPU; assumed bytes that sorting moves
NUM_AGREEMENT, NUM_CHECK, NUM_UPDATE, SORT_BYTES = 13, 25, 470, 200
LINKS_GBIT = (1.0, 10.0, 25.0, 100.0, 400.0)


def gradient_bytes(density: float, *, interval: int | None = None) -> float:
    """Return the bytes of one averaged gradient.

    With ``interval``, whole gradients travel every ``interval`` steps (growth by gradient), and the
    mean over all steps is returned.
    """
    packed = BYTES * (NUM_PARAMETERS - NUM_SPARSE + density * NUM_SPARSE)
    return packed if interval is None else packed + (BYTES * NUM_PARAMETERS - packed) / interval


def ring_seconds(num_bytes: float, num_ranks: int, bytes_per_second: float) -> float:
    """Return the seconds of a ring all-reduce: every rank sends 2·(n−1)/n of the buffer."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / bytes_per_second


@dataclass(frozen=True)
class Step:
    """One training step of a cluster."""

    compute: float  # seconds
    averaging: float  # s, partly hidden by the backward pass

    @property
    def seconds(self) -> float:
        """Duration: buckets travel from early in the backward pass; the step waits for the rest."""
        return self.compute + max(0.0, self.averaging - BACKWARD * self.compute)


def step(num_gpus: int, gbit: float, density: float, *, interval: int | None = None) -> Step:
    """Predict one step; ``density`` 1 is a dense reduction.

    Gradients travel over NVLink inside a node, and over one link of ``gbit`` Gbit/s per node between
    nodes.
    """
    num_nodes = max(1, num_gpus // GPUS_PER_NODE)
    num_bytes = gradient_bytes(density, interval=interval)
    inside = ring_seconds(num_bytes, min(num_gpus, GPUS_PER_NODE), NVLINK_BYTES_PER_SECOND)
    between = ring_seconds(num_bytes, num_nodes, EFFICIENCY * gbit * 1e9 / 8)
    packing = 0.0 if density == 1 else 4 * BYTES * NUM_PARAMETERS / COPY_BYTES_PER_SECOND
    return Step(BATCH / IMAGES_PER_SECOND, inside + between + packing)


def print_bytes() -> None:
    print("| density | bytes per step | dense / packed | with RigL, ΔT = 100 | ΔT = 1000 |\n|---|---|---|---|---|")
    for density in (0.05, 0.1, 0.2, 0.5):
        packed = gradient_bytes(density)
        ratios = [gradient_bytes(1) / gradient_bytes(density, interval=interval) for interval in (None, 100, 1000)]
        print(f"| {density:g} | {packed / 1e6:.1f} MB | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |")


def print_throughput() -> None:
    print(
        "| GPUs | link of a node | dense: averaging, images/s | packed at 0.1: averaging, images/s | gain |\n"
        "|---|---|---|---|---|"
    )
    for num_gpus in (8, 64, 512):
        for gbit in LINKS_GBIT if num_gpus > GPUS_PER_NODE else (0.0,):
            dense, packed = (
                step(num_gpus, gbit or 1.0, density, interval=100 if density < 1 else None) for density in (1.0, 0.1)
            )
            rates = [num_gpus * BATCH / each.seconds for each in (dense, packed)]
            link = f"{gbit:g} Gbit/s" if gbit else "NVLink only"
            cells = [
                f"{1000 * each.averaging:.1f} ms, {rate:,.0f}"
                for each, rate in zip((dense, packed), rates, strict=True)
            ]
            print(f"| {num_gpus} | {link} | {cells[0]} | {cells[1]} | {rates[1] / rates[0]:.2f} |")


def overheads(num_images: int) -> dict[str, float]:
    """Return what our loop adds to a step of plain torch on one GPU, in seconds, with RigL and ΔT = 100.

    Memory is passed over by each operation as often as its formula says; the operations of a check and
    an update are those that ``python -m benchmarks.waits`` counts beyond an ordinary step.
    """
    pixels, weights = num_images * 3 * 224**2, BYTES * NUM_SPARSE
    return {
        "bytes to normalised bf16": 3 * pixels / MEMORY_BYTES_PER_SECOND,
        "masked gradients": (2 * weights + NUM_SPARSE) / MEMORY_BYTES_PER_SECOND,
        "agreement": NUM_AGREEMENT * LAUNCH_SECONDS,
        "check, one step in 10": (NUM_CHECK * LAUNCH_SECONDS + 2 * (weights + NUM_SPARSE) / MEMORY_BYTES_PER_SECOND)
        / 10,
        "update, one step in 100": (NUM_UPDATE * LAUNCH_SECONDS + SORT_BYTES * NUM_SPARSE / MEMORY_BYTES_PER_SECOND)
        / 100,
    }


def print_overheads() -> None:
    compute = {num_images: num_images / IMAGES_PER_SECOND for num_images in (256, 64)}
    rows = {name: [overheads(num_images)[name] for num_images in compute] for name in overheads(1)}
    rows["together"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    print("| | " + " | ".join(f"{num} images, {1000 * s:.0f} ms" for num, s in compute.items()) + " |\n|---|---|---|")
    for name, row in rows.items():
        cells = [f"{1000 * each:.2f} ms, {each / whole:.1%}" for each, whole in zip(row, compute.values(), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


def print_comparison(path: Path) -> None:
    """Print the predicted wire time beside the measured time of averaging on two emulated hosts.

    The measured time includes packing and unpacking.
    """
    measured = json.loads(path.read_text())
    print("| link | density | predicted, wire only | measured |\n|---|---|---|---|")
    for link, gbit in (("1 Gbit/s", 1.0), ("200 Mbit/s", 0.2)):
        for density in (1.0, 0.05, 0.1, 0.2):
            key = f"C2 resnet50 {density if density < 1 else 0.1:g} {link}"
            if key in measured:
                ms = measured[key]["numerator_ms" if density == 1 else "denominator_ms"]
                predicted = 1000 * ring_seconds(gradient_bytes(density), 2, EFFICIENCY * gbit * 1e9 / 8)
                print(f"| {link} | {density:g} | {predicted:.0f} ms | {ms:.0f} ms |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measured",
        type=local_path,
        metavar="FILE",
        help="JSON of benchmarks.gradients, to print beside the predictions",
    )
    given = parser.parse_args()
    print_bytes()
    print()
    print_throughput()
    print()
    print_overheads()
    if given.measured is not None:
        print()
        print_comparison(given.measured)


if __name__ == "__main__":
    main()
