"""One rank of tests/distributed/test_agreement.py.

It trains on its own data and writes its state after every update.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from pipeline import models
from pipeline.command_line import leave
from pipeline.config.load import load_config
from pipeline.config.schema import TrainConfig
from pipeline.datasets.sets import open_data_sets
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.errors import IntegrityError, NumericsError, WriteError
from pipeline.plan import build_plan
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, SCOPES
from pipeline.tracking.tracker import NullTracker
from pipeline.training import assembly
from pipeline.training.step_log import StepLog


def batch(step: int, num: int, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num, 3, 28, 28, generator=generator).to(dtype), torch.randint(0, 10, (num,), generator=generator)


def share(tensor: torch.Tensor) -> torch.Tensor:
    size = len(tensor) // session.world_size()
    return tensor[session.rank() * size : (session.rank() + 1) * size]


def train(
    ranks: session.Session,
    model: nn.Module,
    config: TrainConfig,
    method: str,
    scope: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[list[object]]:
    """Train for five updates; returns [mask digest, digest of all weights] after each."""
    engine = build_engine(model, config)
    sparsifier = Sparsifier(
        engine.model, engine.optimizer, dataclasses.replace(METHODS[method], scope=scope), density=0.1, seed=0
    )
    history: list[list[object]] = []
    for step in range(10):
        images, labels = batch(step, config.global_batch, dtype=dtype)
        loss, _, gradient_norm = engine.backward(share(images), share(labels), lr=0.05)
        assert ranks.agree_to_go_on(loss, gradient_norm, step)
        sparsifier.before_step(0.3 if step % 2 else None)
        engine.step()
        if sparsifier.after_step() is not None:
            weights = torch.cat([p.detach().contiguous().view(-1) for p in engine.model.parameters()])
            history.append([mask_digest(sparsifier.masks), session.digest(weights)])
    return history


def small_network() -> nn.Module:
    return models.build("cifar_resnet8", num_classes=10, args={"width": 16, "stem_stride": 2}, seed=1)


def network_without_batchnorm() -> nn.Module:
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)]
    return nn.Sequential(*layers).double()


def a_flipped_bit_is_named() -> str:
    """Flip one bit of one mask silently on rank 1; the next update must name the layer and the rank."""
    engine = build_engine(small_network(), TrainConfig(engine="torch", global_batch=8))
    sparsifier = Sparsifier(engine.model, engine.optimizer, METHODS["set"], density=0.1, seed=0)
    engine.backward(*(share(part) for part in batch(0, 8)), lr=0.05)
    if session.rank() == 1:
        sparsifier.masks["blocks.1.conv1.weight"][0, 0, 0, 0] ^= True
    sparsifier.before_step(0.3)
    engine.step()
    try:
        sparsifier.after_step()
    except IntegrityError as error:
        return str(error)
    return "nothing was noticed"


def an_error_of_rank_0_is_everybodys() -> list[object]:
    def fail() -> None:
        raise WriteError("the disk is full", do="make room")

    try:
        session.on_main(fail)
    except WriteError as error:
        return [str(error), error.is_reported_elsewhere]
    return []


def a_gradient_that_is_not_finite_on_one_rank() -> list[object]:
    loss = torch.tensor(float("nan") if session.rank() == 1 else 1.0)
    try:
        session.Session().agree_to_go_on(loss, torch.tensor(float("nan")), 7)
    except NumericsError as error:
        return [error.what, error.is_reported_elsewhere]
    return []


def means_of_two_steps() -> list[list[float]]:
    """Report four steps in windows of two, with the losses and top-1 of this rank."""
    records: list[list[float]] = []

    class Tracker(NullTracker):
        def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
            records.append([metrics["train/loss"], metrics["train/top1"]])

    model = small_network()
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), METHODS["set"], density=0.1, seed=0)
    plan = build_plan(load_config("fashion_mnist_s90"), steps_per_epoch=468)
    loader: Any = SimpleNamespace(seconds_waited=0.0)
    log = StepLog(Tracker(), plan, loader, session.Session(), every=2)
    of_rank = [[(1.0, 0.5), (2.0, 0.0), (5.0, 1.0), (6.0, 1.0)], [(3.0, 1.0), (4.0, 0.5), (7.0, 0.0), (8.0, 0.5)]]
    for step, numbers in enumerate(of_rank[session.rank()]):
        loss, top1 = (torch.tensor(number) for number in numbers)
        log.step(step, plan.at(step), loss, top1, torch.ones(()), sparsifier, None)
    return records


def ranks_with_other_data(folder: Path) -> dict[str, object]:
    """Open the loaders while data files or configuration of rank 1 differ from those of rank 0."""
    for name, num_images in (("common", 4), (f"of-rank-{session.rank()}", 4 + session.rank())):
        for index in range(num_images):
            path = folder / f"{session.rank()}" / name / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    common, own = (folder / f"{session.rank()}" / name for name in ("common", f"of-rank-{session.rank()}"))
    small = [
        "data.loader=folder",
        "model.num_classes=2",
        "train.global_batch=2",
        "data.train_resolution=8",
        "data.eval_resolution=8",
    ]
    cases = {
        "the same": [f"data.train={common}", f"data.val={common}"],
        "training set": [f"data.train={own}", f"data.val={common}"],
        "validation set": [f"data.train={common}", f"data.val={own}"],
        "seed": [f"data.train={common}", f"data.val={common}", f"seed={session.rank()}"],
    }
    results: dict[str, object] = {}
    for name, overrides in cases.items():
        try:
            config = load_config("fashion_mnist_s90", [*small, *overrides])
            assembly.open_loaders(config, open_data_sets(config))
            results[name] = "opened"
        except IntegrityError as error:
            results[name] = [error.what, error.do, error.is_reported_elsewhere]
    return results


def main(folder: Path) -> None:
    results: dict[str, object] = {}
    with group.join() as ranks:
        for method in ("set", "rigl"):
            for scope in SCOPES:
                config = TrainConfig(engine="torch", global_batch=32, accumulation=2)
                results[f"torch {method} {scope}"] = train(ranks, small_network(), config, method, scope)
                config = TrainConfig(engine="torch", global_batch=32, channels_last=False, momentum=0.9)
                model = network_without_batchnorm()
                results[f"float64 {method} {scope}"] = train(ranks, model, config, method, scope, dtype=torch.float64)
        if session.world_size() > 1:
            results["flipped bit"] = a_flipped_bit_is_named()
            results["rank 0 fails"] = an_error_of_rank_0_is_everybodys()
            results["not finite"] = a_gradient_that_is_not_finite_on_one_rank()
            results["other data"] = ranks_with_other_data(folder)
            results["means"] = means_of_two_steps()
            results["text"] = session.on_main(lambda: "möglich")
        config = TrainConfig(engine="deepspeed", global_batch=32, accumulation=2)
        results["deepspeed rigl layer"] = train(ranks, small_network(), config, "rigl", "layer")
    (folder / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
