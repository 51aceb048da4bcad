"""One rank of ``benchmarks.gradients``.

``python -m benchmarks.support.gradients_worker TASK.json OUTPUT.json``, with ``RANK`` etc. set.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.command_line import leave
from pipeline.config.schema import TrainConfig
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.engine.reduction import Reducer
from pipeline.sparse.distribution import erk, exact_counts, random_masks
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

Leg = Callable[[], object]
Times = dict[str, list[float]]


def in_turn(legs: Mapping[str, Leg], *, rounds: int) -> Times:
    """Time every leg in milliseconds, after one round that is not counted.

    All ranks start together; each round begins with another leg.
    """
    times: Times = {name: [] for name in legs}
    names = list(legs)
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            session.barrier()
            started = time.perf_counter()
            legs[name]()
            if index:
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def averaging(name: str, densities: list[float], *, rounds: int) -> dict[str, Any]:
    """Measure averaging the gradients of one network, whole and packed: milliseconds and bytes."""
    model = models.build(name)
    weights = sparse_weights(model)
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    parameters = dict(model.named_parameters())
    gradients = {parameter: torch.randn_like(parameter) for parameter in parameters.values()}
    reducers = {"dense": Reducer(parameters, reduction="dense", wire="fp32", bucket_mb=25)}
    for density in densities:
        counts = exact_counts(shapes, erk(shapes, density), density)
        for wire in ("fp32", "bf16"):
            reducer = Reducer(parameters, reduction="packed", wire=wire, bucket_mb=25)
            reducer.use_masks(random_masks(shapes, counts, seed=0))
            reducers[f"{density:g}" if wire == "fp32" else f"{density:g} bf16"] = reducer

    def average(reducer: Reducer) -> None:
        reducer.start(dense=False)
        for parameter in reversed(parameters.values()):  # the order of a backward pass
            parameter.grad = gradients[parameter]
            reducer.note(parameter)
        reducer.finish()

    legs: dict[str, Leg] = {key: partial(average, reducer) for key, reducer in reducers.items()}
    return {
        "ms": in_turn(legs, rounds=rounds),
        "bytes": {key: reducer.num_bytes(dense=False) for key, reducer in reducers.items()},
    }


def steps(density: float, *, rounds: int) -> Times:
    """Measure whole training steps: ResNet-18 at 64 px, 16 images per rank."""
    generator = torch.Generator().manual_seed(session.rank())
    images, labels = torch.randn(16, 3, 64, 64, generator=generator), torch.randint(0, 1000, (16,), generator=generator)
    legs: dict[str, Leg] = {
        "no communication": plain_step(network(), images, labels),
        "no communication, then a barrier": plain_step(network(), images, labels, then=session.barrier),
        "torch DDP": plain_step(DistributedDataParallel(network()), images, labels),
        "stock DeepSpeed stage 0": stock_deepspeed_step(0, images, labels),
        "stock DeepSpeed stage 1": stock_deepspeed_step(1, images, labels),
    }
    for engine in ("torch", "ddp", "deepspeed"):
        for reduction in ("dense", "packed"):
            legs[f"{engine} {reduction}"] = our_step(engine, reduction, density, images, labels)
    legs["deepspeed stage 1 packed"] = our_step("deepspeed", "packed", density, images, labels, zero_stage=1)
    return in_turn(legs, rounds=rounds)


def network() -> nn.Module:
    return models.build("resnet18")


def plain_step(model: nn.Module, images: Tensor, labels: Tensor, *, then: Leg = lambda: None) -> Leg:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        then()

    return step


def stock_deepspeed_step(stage: int, images: Tensor, labels: Tensor) -> Leg:
    import deepspeed

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": len(images),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step() -> None:
        engine.backward(cross_entropy(engine(images), labels))
        engine.step()

    return step


def our_step(
    engine_name: str, reduction: str, density: float, images: Tensor, labels: Tensor, *, zero_stage: int = 0
) -> Leg:
    """Return one step of the loop of launchers/train.py, including the agreement of the ranks."""
    batch = len(images) * session.world_size()
    settings: dict[str, Any] = {
        "engine": engine_name,
        "reduction": reduction,
        "zero_stage": zero_stage,
        "global_batch": batch,
    }
    config = TrainConfig(
        **settings, weight_decay=1e-4, channels_last=False
    )  # contiguous, like the networks that it is compared with
    engine = build_engine(network(), config)
    sparsifier = Sparsifier(
        engine.model,
        engine.optimizer,
        METHODS["rigl"],
        density=density,
        seed=0,
        fragments=engine.fragments,
        on_masks=engine.use_masks,
    )

    def step() -> None:
        loss, _, norm = engine.backward(images, labels, lr=0.01, dense=sparsifier.needs_dense_gradient())
        session.Session().agree_to_go_on(loss, norm, 0)
        sparsifier.before_step(is_finite=True, is_masked=engine.masks_gradients)
        engine.step()
        sparsifier.after_step()

    return step


def main() -> None:
    task = json.loads(sys.argv[1])
    with group.join(threads_per_rank=1):
        kinds: dict[str, Callable[..., object]] = {"averaging": averaging, "steps": steps}
        result = kinds[task.pop("kind")](**task)
        if session.is_main():
            Path(sys.argv[2]).write_text(json.dumps(result))
    leave(0)


if __name__ == "__main__":
    main()
