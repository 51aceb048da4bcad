"""One rank of tests/distributed/test_presets.py.

It trains every method on Fashion-MNIST, with its own part of every batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.doctor import FASHION_MNIST
from data_prep.fashion_mnist import read_split
from pipeline import models
from pipeline.command_line import leave
from pipeline.config.load import load_config
from pipeline.config.schema import Config, strategy_of
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.errors import IntegrityError
from pipeline.plan import build_plan
from pipeline.sparse.initial import masks_at_start
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

BATCH, STEPS_PER_EPOCH = 64, 70
NUM_IMAGES = BATCH * STEPS_PER_EPOCH


def config_of(method: str, *overrides: str, steps_per_epoch: int = STEPS_PER_EPOCH) -> Config:
    """Return a configuration of three epochs, with five updates in each."""
    is_fixed = not METHODS[method].changes_masks
    options = {
        "data.train": "none",
        "data.val": "none",
        "train.engine": "torch",
        "train.global_batch": BATCH,
        "sparsity.method": method,
        "sparsity.density": 1 if method == "dense" else 0.1,
        "plan.timetable": "dense" if method == "dense" else "static" if is_fixed else "itop",
        "plan.reference_batch": BATCH,
        "plan.num_refinements": 0,
        "plan.exploration.length": "3 epochs",
        "plan.exploration.update_interval": "null" if is_fixed else f"{steps_per_epoch // 5} steps",
        "plan.exploration.drop_schedule": "null",
        "plan.exploration.drop_fraction": "null",
        "plan.exploration.drop_end": "null",
        "sparsity.distribution": "null",
        "sparsity.density_from": "0 epochs",
        "sparsity.density_until": "2 epochs",
    }
    return load_config(
        "fashion_mnist_s90", [*(f"{key}={value}" for key, value in options.items()), "plan.refinement=null", *overrides]
    )


def images_and_labels() -> tuple[Tensor, Tensor]:
    split = read_split(FASHION_MNIST, "train")
    samples = [split[index] for index in range(NUM_IMAGES)]
    images = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image, _ in samples]).float()
    return (images - 72.94) / 90.02, torch.tensor([label for _, label in samples])


def digest_of(engine: Engine) -> int:
    return session.digest(torch.cat([p.detach().contiguous().view(-1) for p in engine.model.parameters()]))


def train(
    config: Config, images: Tensor, labels: Tensor, *, num_steps: int, steps_per_epoch: int = STEPS_PER_EPOCH
) -> dict[str, Any]:
    """Train, and record the state after every update and at the end.

    Returns:
        [step, mask digest, weights' digest, active weights] for each, and the first and last loss; the
        number of all weights, and of those that are active at the start.
    """
    plan = build_plan(config, steps_per_epoch=steps_per_epoch)
    strategy = strategy_of(config.sparsity)
    engine = build_engine(
        models.build("cifar_resnet8", num_classes=10, args={"width": 8, "stem_stride": 2}, seed=1), config.train
    )
    density = config.sparsity.density if strategy.initial_density is None else strategy.initial_density
    hooks: dict[str, Any] = {"fragments": engine.fragments, "on_masks": engine.use_masks}
    share = BATCH // session.world_size()
    if strategy.initial != "random":  # every rank scores with its own images
        mine = slice(session.rank() * share, (session.rank() + 1) * share)
        halves = zip(images[mine].split(share // 2), labels[mine].split(share // 2), strict=True)
        hooks["masks"] = masks_at_start(engine.model, strategy, list(halves), density=density)
    sparsifier = Sparsifier(engine.model, engine.optimizer, strategy, density=density, seed=0, **hooks)
    initial = sum(int(mask.sum()) for mask in sparsifier.masks.values())
    history: list[list[Any]] = []
    losses: list[float] = []
    for step in range(num_steps):
        phase = plan.at(step)
        start = step % steps_per_epoch * BATCH + session.rank() * share
        update = phase.update_at(step)
        batch = images[start : start + share], labels[start : start + share]
        loss, _, norm = engine.backward(*batch, lr=phase.lr(step), dense=sparsifier.needs_dense_gradient(update))
        assert session.Session().agree_to_go_on(loss, norm, step)
        if sparsifier.before_step(update):
            engine.step()
        else:
            engine.skip_step()
        losses.append(loss.item())
        if sparsifier.after_step() is not None or step == num_steps - 1:
            active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
            history.append([step, mask_digest(sparsifier.masks), digest_of(engine), active])
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    ends = [sum(part) / len(part) for part in (losses[:20], losses[-20:])]
    return {"history": history, "losses": ends, "weights": total, "initial": initial, "r_s": sparsifier.r_s}


def a_flipped_bit(config: Config, images: Tensor, labels: Tensor) -> list[Any]:
    """Flip one bit of one mask of the last rank between two updates.

    Returns:
        The message, its exit code, and the steps until it came.
    """
    engine = build_engine(
        models.build("cifar_resnet8", num_classes=10, args={"width": 8, "stem_stride": 2}, seed=1), config.train
    )
    sparsifier = Sparsifier(engine.model, engine.optimizer, METHODS["rigl"], density=0.1, seed=0, check_every=10)
    for step in range(30):
        engine.backward(images[:8], labels[:8], lr=0.01)
        sparsifier.before_step()
        engine.step()
        try:
            sparsifier.after_step()
        except IntegrityError as error:
            return [str(error), error.code, step - 13]
        if step == 13 and session.rank() == session.world_size() - 1:
            sparsifier.masks["blocks.1.conv2.weight"][0, 0, 1, 1] ^= True
    return []


def main(folder: Path, cases: list[str]) -> None:
    images, labels = images_and_labels()
    results: dict[str, Any] = {}
    with group.join():
        for case in cases:
            kind, method = case.split()
            if kind == "torch":
                steps = 210 if METHODS[method].initial == "random" else 42  # chosen masks never change
                results[case] = train(config_of(method), images, labels, num_steps=steps)
            elif kind == "flip":
                results[case] = a_flipped_bit(config_of(method), images, labels)
            else:  # stage0, stage1: eleven updates
                stage = ("train.engine=deepspeed", f"train.zero_stage={kind[-1]}")
                config = config_of(method, *stage, steps_per_epoch=STEPS_PER_EPOCH)
                results[case] = train(
                    config, images, labels, num_steps=11 * STEPS_PER_EPOCH // 5, steps_per_epoch=STEPS_PER_EPOCH
                )
    (folder / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
