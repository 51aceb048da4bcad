"""Compare sparse inference with torch on random networks: ``python -m tests.campaigns.sparse_layers``.

Each network has a few random layers: kernels, strides, dilations, groups, paddings, pooling, sums and
activations, on images of odd sizes, with weights of densities from 0 to 1. Vectors have 4, 8 and 16
floats in turn, and every second network runs on two threads. A logit that differs from torch's in float64 by more
than 1e-4 of the largest ends the campaign with the seed, which reproduces it.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch

from pipeline.inference.build import build_engine
from pipeline.inference.jit import host
from tests.inference.random_networks import in_float64, random_network

TOLERANCE = 1e-4
LANES = (4, 8, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3000, metavar="N", help="how many (default: 3000)")
    parser.add_argument("--seed", type=int, default=10**6, metavar="N", help="of the first (default: 1000000)")
    given = parser.parse_args()
    worst = 0.0
    for seed in range(given.seed, given.seed + given.networks):
        difference, description = compare(seed)
        worst = max(worst, difference)
        if not difference <= TOLERANCE:
            print(f"logits differ by {difference:.1e} of the largest: {description}")
            return 1
    print(f"{given.networks} networks; the largest difference is {worst:.1e} of the largest logit")
    return 0


def compare(seed: int) -> tuple[float, str]:
    """Return the largest difference from torch, relative to the largest logit, and what the network is."""
    model, images, description = random_network(seed)
    expected = in_float64(model, images)
    threads = 1 + seed % 2
    channels, height, width = images.shape[1:]
    engine = build_engine(
        copy.deepcopy(model).to("meta"),
        (channels, height, width),
        model.state_dict(),
        {},
        processor=host(LANES[seed % 3]),
        threads=threads,
    )
    found = torch.from_numpy(engine(images.numpy(), threads))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)), description


if __name__ == "__main__":
    sys.exit(main())
