"""Part ``masks``: the masks on the device are those of the CPU, for every method, scope and structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.gpu.loop import on_device
from benchmarks.gpu.report import Options, Report
from pipeline import models
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, SCOPES, Strategy

NUM_UPDATES = 3


def strategies() -> Iterator[tuple[str, Strategy]]:
    """Yield every method, scope and structure that can grow, with its name."""
    for name, strategy in METHODS.items():
        if strategy.grow is not None:
            yield name, strategy
    for scope in SCOPES:
        yield f"rigl {scope}", dataclasses.replace(METHODS["rigl"], scope=scope)
    yield "rigl fan_in", dataclasses.replace(METHODS["rigl"], structure="fan_in")
    yield "set blocks", dataclasses.replace(METHODS["set"], structure="block 4x4", prune="magnitude")


def masks(given: Options, report: Report) -> None:
    """Give both devices the same values and gradients, with many ties, and compare the masks after every update."""
    generator = torch.Generator().manual_seed(0)
    num, wrong = 0, []
    with on_device(given):
        for name, strategy in strategies():
            found = differing(strategy, given, generator)
            wrong += [f"{name}: {layer}" for layer, is_different in found if is_different]
            num += len(found)
    text = f"{num} masks of {len(list(strategies()))} strategies on cpu and {given.device}"
    report.check("masks", not wrong, text + (f"; differing: {wrong[0]}" if wrong else ""), "equal", num_masks=num)


def differing(strategy: Strategy, given: Options, generator: torch.Generator) -> list[tuple[str, bool]]:
    """Return for every mask of every update its layer, and whether it differs between the CPU and the device."""
    sparsifiers = []
    for each in ("cpu", given.device):
        model = models.build("cifar_resnet8" if given.is_quick else "cifar_resnet20", args={"width": 16})
        model.to(each, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        dense = ["stem.weight"] if strategy.structure.startswith("block") else []
        sparsifiers.append(Sparsifier(model, optimizer, strategy, density=0.2, seed=0, dense_layers=dense))
    cpu, other = sparsifiers
    found = []
    for _ in range(NUM_UPDATES):
        for key, weight in cpu.weights.items():
            value, gradient = (torch.randn(weight.shape, generator=generator) for _ in range(2))
            gradient.round_(decimals=1)  # many ties
            for sparsifier in sparsifiers:
                with torch.no_grad():
                    sparsifier.weights[key].copy_(value).mul_(sparsifier.masks[key].to(value.dtype))
                sparsifier.weights[key].grad = gradient.to(sparsifier.weights[key].device, copy=True)
        for sparsifier in sparsifiers:
            sparsifier.before_step(0.3)
            sparsifier.after_step()
        found += [(key, not torch.equal(mask, other.masks[key].cpu())) for key, mask in cpu.masks.items()]
    return found
