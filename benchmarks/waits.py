"""Count what a training step asks of a GPU, on a machine without one: waits of the host, and operations.

``python -m benchmarks.waits``

Trains ResNet-50 and ViT-B/16 for a few steps in the engine ``torch`` on the emulated GPU of
``tests/support/emulated_gpu.py`` and prints, for an ordinary step, a step with a check of masks and
weights, and one with a topology update: how often the host waits for the device, and how many operations
the device is asked for, each of which is at least one launch. ``tests/gpu`` holds the numbers of a small
network. Under ``torchrun --nproc-per-node 2 -m`` it counts those of rank 0 of two. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from pipeline import models
from pipeline.config.schema import TrainConfig
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from tests.support.emulated_gpu import Count, EmulatedGpu

SIDE = 64  # pixels; the counts do not depend on it
ARGUMENTS = {"vit_b_16": {"image_size": SIDE}}
CHECK_EVERY, UPDATE_AT, NUM_STEPS = 2, 4, 5
KINDS = {2: "step", 3: "check", UPDATE_AT: "update"}
DENSITY = 0.1


def count(model: str, method: str) -> dict[str, Count]:
    """Train and return what each kind of step asked of the device; every rank must call this."""
    ranks, counts = session.Session(), {}
    with EmulatedGpu() as gpu, session.entered("cuda"):
        network = models.build(model, num_classes=1000, args=ARGUMENTS.get(model, {}), seed=0)
        engine = build_engine(network, TrainConfig(engine="torch", global_batch=2 * session.world_size()))
        sparsifier = Sparsifier(
            *(engine.model, engine.optimizer, METHODS[method]),
            density=METHODS[method].initial_density or DENSITY,
            seed=0,
            on_masks=engine.use_masks,
            check_every=CHECK_EVERY,
        )
        for step in range(NUM_STEPS):
            update = 0.3 if step == UPDATE_AT else None
            images = torch.randn(2, 3, SIDE, SIDE).to("cuda").contiguous(memory_format=torch.channels_last)
            labels = torch.randint(0, 1000, (2,)).to("cuda")
            with gpu.counting() as counted:
                dense = sparsifier.needs_dense_gradient(update)
                loss, _, norm = engine.backward(images, labels, lr=0.01, dense=dense)
                ranks.agree_to_go_on(loss, norm, step, at_once=update is not None)
                if sparsifier.before_step(update, is_finite=True, is_masked=engine.masks_gradients):
                    engine.step(ranks.is_bad)
                else:
                    engine.skip_step()
                sparsifier.after_step()
            if step in KINDS:
                counts[KINDS[step]] = counted
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16"], metavar="NAME")
    parser.add_argument("--method", default="rigl_itop", choices=[name for name in METHODS if METHODS[name].grow])
    parser.add_argument("--places", action="store_true", help="print the line of every wait")
    given = parser.parse_args()
    with group.join(threads_per_rank=1, on="cpu"):
        for model in given.models:
            counts = count(model, given.method)
            if not session.is_main():
                continue
            for kind, counted in counts.items():
                ranks, waits = _num(session.world_size(), "rank"), _num(len(counted.waits), "wait")
                operations = _num(counted.num_operations, "operation")
                print(f"{model}, {given.method}, {ranks}, {kind}: {waits}, {operations}", flush=True)
                for wait, num in Counter(map(str, counted.waits)).items() if given.places else ():
                    print(f"    {num} × {wait}")


def _num(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    main()
