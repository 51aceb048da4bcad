"""One rank of tests/engine/test_reduction.py: averages gradients in every way and writes its state."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.command_line import leave
from pipeline.config.schema import TrainConfig
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.engine.reduction import Reducer
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from tests.engine.engine_worker import digests, flat, network

BATCH = 24
BUCKET_MB = 0.001  # 1 KiB: several buckets
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "ddp": {"engine": "ddp"},
    "deepspeed, stage 0": {"engine": "deepspeed", "zero_stage": 0},
    "deepspeed, stage 1": {"engine": "deepspeed", "zero_stage": 1},
}
PRECISIONS = ("fp32", "bf16")
ACCUMULATIONS = (1, 3)
CLIP_NORMS = (None, 0.05)
METHODS_TRAINED = ("set_itop", "rigl")
REDUCTIONS = ("packed", "dense")
COMPILED = ("torch", "deepspeed, stage 1")


def config_of(engine: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"global_batch": BATCH, "bucket_mb": BUCKET_MB, **ENGINES[engine], **changes})


def share(step: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return this rank's share of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator).to(dtype)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    size = BATCH // session.world_size()
    return images[session.rank() * size :][:size], labels[session.rank() * size :][:size]


class Trainer:
    """An engine and a method; an update replaces half of the active weights."""

    def __init__(
        self,
        engine: str,
        method: str,
        *,
        dtype: torch.dtype = torch.float32,
        is_compiled: bool = False,
        **changes: Any,
    ) -> None:
        model: nn.Module = network(has_batchnorm=False).to(dtype)
        if is_compiled:  # which puts _orig_mod. before the names of all parameters
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        self.engine: Engine = build_engine(model, config_of(engine, **changes))
        self.sparsifier = Sparsifier(
            self.engine.model,
            self.engine.optimizer,
            METHODS[method],
            density=0.2,
            seed=0,
            fragments=self.engine.fragments,
            on_masks=self.engine.use_masks,
            check_every=10,
        )
        self.dtype = dtype
        self.gradient_norm = torch.zeros(())

    def step(self, step: int, *, every: int = 10) -> None:
        drop_fraction = 0.5 if step % every == every - 1 else None
        dense = self.sparsifier.needs_dense_gradient(drop_fraction)
        *_, self.gradient_norm = self.engine.backward(*share(step, dtype=self.dtype), lr=0.01, dense=dense)
        if self.sparsifier.before_step(drop_fraction, is_masked=self.engine.masks_gradients):
            self.engine.step()
        self.sparsifier.after_step()

    def state(self) -> dict[str, Any]:
        return {**digests(self.engine), "masks": mask_digest(self.sparsifier.masks)}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Collect the bytes of each asynchronous all-reduce."""
    real, sizes = dist.all_reduce, []

    def counted(tensor: Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        if async_op:
            sizes.append(tensor.nbytes)
        return real(tensor, *arguments, async_op=async_op, **options)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = real


# -- training


def train(engine: str, method: str, *, num_steps: int = 200, every: int = 10, **changes: Any) -> dict[str, Any]:
    """Train; returns states after every update, the bytes that travelled, and the last gradient norm."""
    trainer = Trainer(engine, method, **changes)
    history = []
    with counting() as sizes:
        for step in range(num_steps):
            trainer.step(step, every=every)
            if step % every == every - 1:
                history.append(trainer.state())
    return {"history": history, "bytes": sum(sizes), "norm": trainer.gradient_norm.item()}


def cells() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, engine and settings of each cell of the support table."""
    for engine, precision, accumulation, clip_norm in itertools.product(ENGINES, PRECISIONS, ACCUMULATIONS, CLIP_NORMS):
        name = f"{engine} | {precision} | {accumulation} | {clip_norm}"
        yield name, engine, {"precision": precision, "accumulation": accumulation, "clip_norm": clip_norm}


def table() -> dict[str, Any]:
    """Train eight steps with two updates in each cell of the support table, packed and dense."""
    return {
        f"{cell} | {reduction}": train(engine, "rigl", num_steps=8, every=4, reduction=reduction, **options)
        for (cell, engine, options), reduction in itertools.product(cells(), REDUCTIONS)
    }


def long_runs() -> dict[str, Any]:
    """Train 200 steps, packed in every engine and dense in one.

    The cells of the table show that dense training is equal in all engines.
    """
    ways = [*((engine, "packed") for engine in ENGINES), ("torch", "dense")]
    return {
        f"{engine} | {method} | {reduction}": train(engine, method, reduction=reduction)
        for (engine, reduction), method in itertools.product(ways, METHODS_TRAINED)
    }


def on_several_ranks() -> dict[str, Any]:
    """Train 40 steps in float64 and in fp32; returns how much packed and dense training differ."""
    results: dict[str, Any] = {}
    for method, dtype in itertools.product(METHODS_TRAINED, (torch.float64, torch.float32)):
        trainers = {reduction: Trainer("torch", method, dtype=dtype, reduction=reduction) for reduction in REDUCTIONS}
        first = [_gradients(trainer) for trainer in trainers.values()]
        for trainer in trainers.values():
            for step in range(40):
                trainer.step(step)
        packed, dense = trainers["packed"], trainers["dense"]
        results[f"{method} {dtype}"] = {
            "states": [trainer.state() for trainer in (packed, dense)],
            "history": [trainer.sparsifier.history_digest for trainer in (packed, dense)],
            "gradient": _deviation(*first),
            "weights": _deviation(*(flat(trainer.engine.model.parameters()) for trainer in (packed, dense))),
            "mask bits": sum(
                int((packed.sparsifier.masks[name] ^ mask).sum()) for name, mask in dense.sparsifier.masks.items()
            ),
        }
    return results


def _gradients(trainer: Trainer) -> Tensor:
    """Return the gradient of step 0 at the active weights."""
    trainer.engine.backward(*share(0, dtype=trainer.dtype), lr=0.0, dense=False)
    trainer.sparsifier.before_step()
    found = flat(parameter.grad for parameter in trainer.engine.model.parameters())
    trainer.engine.skip_step()
    return found


def _deviation(one: Tensor, other: Tensor) -> dict[str, float]:
    """Return the share of values that differ, and the largest difference / the largest value."""
    share_of_values = (one != other).double().sum() / (other != 0).double().sum()
    return {"share": share_of_values.item(), "largest": ((one - other).abs().max() / other.abs().max()).item()}


def resumed() -> list[dict[str, Any]]:
    """Take thirty steps in fp32, and repeat the last fifteen from the saved state in a fresh engine."""
    straight, again = Trainer("torch", "rigl"), Trainer("torch", "rigl")
    for step in range(30):
        if step == 15:
            for old, new in zip(straight.engine.model.parameters(), again.engine.model.parameters(), strict=True):
                again.engine.set_state(
                    new, old.detach().clone(), {k: v.clone() for k, v in straight.engine.state_of(old).items()}
                )
            again.sparsifier.load_state_dict(straight.sparsifier.state_dict())
        straight.step(step)
        if step >= 15:
            again.step(step)
    return [straight.state(), again.state()]


# -- single steps


def micro_batches(engine: str) -> dict[str, Any]:
    """Take a step with three micro-batches.

    Returns:
        The number of all-reduces, how many of them started before backward ended, and the norm.
    """
    trainer = Trainer(engine, "rigl", accumulation=3)
    reducer = trainer.engine._reducer
    finish, before = reducer.finish, []

    def watched() -> Tensor:
        before.append(len(sizes))
        return finish()

    reducer.finish = watched
    with counting() as sizes:
        trainer.step(0)
    return {
        "bytes": sizes,
        "before the end": before,
        "planned": reducer.num_bytes(dense=False),
        "buckets": len(reducer._buckets),
    }


class Branches(nn.Module):
    """Layers that take part in the loss by a plan, ``uses``, with one entry per forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(768, 10)
        self.extra = nn.ModuleDict({name: nn.Linear(10, 10, bias=False) for name in ("both", "one", "early", "none")})
        self.uses: list[tuple[str, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images.flatten(1))
        return features + sum(self.extra[name](features) for name in self.uses.pop(0))


def own_gradients(engine: str) -> dict[str, Any]:
    """Report whether the gradient is masked, and whether the engine's reducer says so.

    After a packed, an uncleared packed, a whole and a packed backward pass.
    """
    trainer = Trainer(engine, "rigl")
    found = []
    for index, dense in enumerate((False, False, True, False)):
        trainer.engine.backward(*share(index), lr=0.0, dense=dense)
        masks = trainer.sparsifier.masks
        is_masked = not any(weight.grad[~masks[name]].any() for name, weight in trainer.sparsifier.weights.items())
        found.append([trainer.engine._reducer.is_masked, is_masked])
        if index != 0:
            trainer.engine.skip_step()
    return {"masked": found}


def exchanged() -> dict[str, Any]:
    """Count the weights that each rank exchanges after a step of stage 1, packed and dense."""
    sizes: dict[str, list[int]] = {}
    for reduction in REDUCTIONS:
        trainer, real = Trainer("deepspeed, stage 1", "rigl", reduction=reduction), dist.all_gather
        trainer.step(0)  # the first step is always checked, which takes a gather of its own
        sizes[reduction] = []

        def counted(
            everywhere: list[Tensor], here: Tensor, *, real: Any = real, seen: list[int] = sizes[reduction]
        ) -> Any:
            seen.append(here.numel())
            return real(everywhere, here)

        dist.all_gather = counted
        try:
            trainer.step(1)
        finally:
            dist.all_gather = real
    return sizes


def unused_parameters(engine: str) -> dict[str, Any]:
    """Compare the averaged gradients of two micro-batches with a plain loop.

    ``one`` is used by rank 0 only, ``early`` in rank 1's first micro-batch only, ``none`` nowhere; a
    rank without a gradient counts as 0. ``both`` is sparse: its diagonal is active.
    """
    uses = [("both", "one")] * 2 if session.rank() == 0 else [("both", "early"), ("both",)]
    built = build_engine(Branches(), config_of(engine, accumulation=2))
    built.use_masks({"extra.both.weight": torch.eye(10, dtype=torch.bool)})
    plain = Branches()
    plain.uses = list(uses)
    for images, labels in zip(*(part.split(BATCH // 4) for part in share(0)), strict=True):
        (cross_entropy(plain(images), labels) / 2).backward()
    expected = {}
    for name, parameter in plain.named_parameters():
        mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(mean)
        expected[name] = mean / 2
    results: dict[str, Any] = {}
    for dense in (True, False):
        built.model.uses = list(uses)
        built.backward(*share(0), lr=0.1, dense=dense)
        for name, parameter in built.model.named_parameters():
            mean = expected[name] * torch.eye(10) if name == "extra.both.weight" and not dense else expected[name]
            results[f"{name} dense={dense}"] = None if parameter.grad is None else torch.equal(parameter.grad, mean)
        built.skip_step()
    built.model.uses = list(uses)
    built.backward(*share(0), lr=0.1)
    built.step()
    results["none has moved"] = not torch.equal(built.model.extra["none"].weight, plain.extra["none"].weight)
    return results


def not_finite(where: str) -> dict[str, Any]:
    """Give rank 1 an infinite gradient at an active or at a pruned position.

    Returns:
        The norm, for packed and for dense averaging.
    """
    weight = nn.Parameter(torch.ones(2, 2))
    reducer = Reducer({"weight": weight}, reduction="packed", wire="fp32", bucket_mb=25)
    reducer.use_masks({"weight": torch.tensor([[True, False], [False, True]])})
    results = {}
    for dense in (False, True):
        factors = torch.tensor([[3.0, 1.0], [1.0, 4.0]])
        if session.rank() == 1:
            factors[0, 0 if where == "active" else 1] = math.inf
        weight.grad = None
        reducer.start(dense=dense)
        (weight * factors).sum().backward()
        norm = reducer.finish()
        results[f"dense={dense}"] = [float(norm) if norm.isfinite() else "not finite", str(weight.grad.tolist())]
    return results


def on_the_wire(wire: str) -> dict[str, Any]:
    """Return the first averaged gradient under autocast, its bytes, and the result of 40 steps."""
    trainer = Trainer("torch", "rigl", precision="bf16", wire=wire)
    with counting() as sizes:
        gradients = _gradients(trainer)
    for step in range(40):
        trainer.step(step)
    return {
        "bytes": sum(sizes),
        "gradients": gradients.tolist(),
        "state": trainer.state(),
        "norm": trainer.gradient_norm.item(),
    }


def main(folder: Path, what: str) -> None:
    with group.join(threads_per_rank=1):
        if what == "two":
            results = {**long_runs(), **table()}
            results |= {f"micro-batches {engine}": micro_batches(engine) for engine in ENGINES}
            results |= {
                f"unused {engine}": unused_parameters(engine) for engine in ENGINES if engine != "deepspeed, stage 1"
            }
            results |= {f"not finite {where}": not_finite(where) for where in ("active", "pruned")}
            results |= {f"own gradients {engine}": own_gradients(engine) for engine in ENGINES} | {
                "exchanged": exchanged()
            }
            results |= {
                f"compiled {engine}": train(engine, "rigl", num_steps=8, every=4, is_compiled=True)
                for engine in COMPILED
            }
            results |= {f"wire {wire}": on_the_wire(wire) for wire in ("fp32", "bf16")}
        else:
            results = {**on_several_ranks(), "resumed": resumed()}
    (folder / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave(0)
