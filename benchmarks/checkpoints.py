"""Measure what checkpoints cost: ``python -m benchmarks.checkpoints``.

ResNet-50, 90% ERK, SGD with momentum, one rank, in a folder of a tmpfs. Parts:

K1        size: ``torch.save`` of the dense weights and momentum / our checkpoint, which includes
          masks and explored set; also with float masks, as published code keeps them
K1 time   time: our save, until it is on disk with its manifest / that ``torch.save``
K1 wait   the part of our save that training waits for: the snapshot

Ends with an error only if a loaded checkpoint differs from the saved state in any bit.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.support.bars import Figure, Options, Results, bar, in_turn, median_ms, options
from benchmarks.support.workload import DENSITY
from pipeline import models
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.plan import build_plan
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

TMPFS = Path("/dev/shm")


def main() -> None:
    given = options(__doc__, ("K1",), models=("resnet50",), quick_model="cifar_resnet8")
    results = Results()
    with tempfile.TemporaryDirectory(dir=TMPFS if TMPFS.is_dir() else None) as folder:
        for name in given.models:
            measure(name, Path(folder) / name, given, results)
    results.write(given.json)


def parts(name: str, config: Config, *, seed: int) -> tuple[Engine, Sparsifier]:
    """Build an engine and a sparse network, and take one optimiser step."""
    engine = build_engine(models.build(name, seed=seed), config.train)
    sparsifier = Sparsifier(
        engine.model, engine.optimizer, METHODS["rigl"], density=DENSITY, seed=0, fragments=engine.fragments
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter).contiguous()
    sparsifier.before_step(0.3)
    engine.step()
    sparsifier.after_step()
    return engine, sparsifier


def measure(name: str, folder: Path, given: Options, results: Results) -> None:
    """Measure K1 on one network."""
    config = load_config(
        "imagenet_r50_s90", ["data.train=t", "data.val=v", "train.engine=torch", "train.channels_last=false"]
    )
    checkpoints = Checkpoints(folder / "ours", config, build_plan(config, steps_per_epoch=1000), data_digest="")
    engine, sparsifier = parts(name, config, seed=0)
    theirs = folder / "dense.pt"
    folder.mkdir()

    def save() -> None:
        checkpoints.save(10, engine, sparsifier, tracker_run="")

    def save_safely() -> None:
        save()
        checkpoints.finish()

    def save_dense() -> None:
        torch.save({"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}, theirs)

    save_safely()
    save_dense()
    require_exact(checkpoints, engine, sparsifier, parts(name, config, seed=1))
    ours, dense = sum(path.stat().st_size for path in (folder / "ours/step-00000010").iterdir()), theirs.stat().st_size
    with_masks = dense + 4 * sum(mask.numel() for mask in sparsifier.masks.values())
    megabytes = f"{dense / 1e6:.1f} / {ours / 1e6:.2f} MB, {name}; with float masks {with_masks / ours:.1f}"
    text = f"{dense / ours:.2f} must be ≥ 6, aim 7, limit 7.4  ({megabytes})"
    results.add(
        Figure(
            "K1",
            text,
            {"value": dense / ours, "dense_bytes": dense, "checkpoint_bytes": ours, "with_masks": with_masks / ours},
        )
    )
    results.add(bar("K1 time", [in_turn(save_safely, save_dense, rounds=given.rounds) for _ in range(given.runs)]))
    wait_ms = median_ms(save, rounds=3 * given.rounds, prepare=checkpoints.finish)
    checkpoints.finish()
    results.add(Figure("K1 wait", f"training waits for {wait_ms:.1f} ms", {"ms": wait_ms}))
    shutil.rmtree(folder)


def require_exact(
    checkpoints: Checkpoints, engine: Engine, sparsifier: Sparsifier, other: tuple[Engine, Sparsifier]
) -> None:
    """Load the checkpoint into another network and compare all state, bit for bit.

    Raises:
        AssertionError: if anything differs.
    """
    checkpoints.load(*other, resume="auto")
    for (name, old), new in zip(engine.model.named_parameters(), other[0].model.parameters(), strict=True):
        assert torch.equal(old, new), name
        assert all(torch.equal(value, other[0].state_of(new)[key]) for key, value in engine.state_of(old).items()), name
    assert other[1].numbers() == sparsifier.numbers()


if __name__ == "__main__":
    main()
