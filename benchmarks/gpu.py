"""Measure what only a GPU can show, in one command: ``python -m benchmarks.gpu``.

Needs one CUDA device, but neither ffcv nor data files. Parts, for ``--only``:

masks      the masks on the GPU equal those on the CPU, for every method, scope and structure
packing    gathering and scattering the active gradients / copying whole gradients
update     the time of one topology update
step       a training step, sparse / dense: ResNet-50, 224 px, channels-last, bf16 autocast,
           fused SGD, images in memory
syncs      how often the host waits for the device, in a step and in an update
deepspeed  the same step under DeepSpeed with one NCCL rank / under plain torch; skipped with a
           message if deepspeed is not installed

``--images N`` sets the batch of a step, if 256 images do not fit. ``--device cpu --quick`` runs the
same code on a small network without a GPU; its times mean nothing. Ends with an error only on a
wrong result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.support.bars import Bounds, Figure, Options, Results, bar, in_turn, median_ms, options
from benchmarks.support.workload import DENSITY, DROP_FRACTION, Setup, Workload
from pipeline import models
from pipeline.command_line import leave
from pipeline.config.schema import TrainConfig
from pipeline.distributed import session
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, SCOPES, Strategy

PARTS = ("masks", "packing", "update", "step", "syncs", "deepspeed")
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


def compare_masks(given: Options, results: Results) -> None:
    """Give both devices the same values and gradients, and compare the masks after every update.

    Raises:
        SystemExit: if a mask differs.
    """
    generator = torch.Generator().manual_seed(0)
    num = 0
    for name, strategy in strategies():
        sparsifiers = []
        for device in ("cpu", given.device):
            model = models.build("cifar_resnet20", args={"width": 16})
            model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            dense = ["stem.weight"] if strategy.structure.startswith("block") else []
            sparsifiers.append(Sparsifier(model, optimizer, strategy, density=0.2, seed=0, dense_layers=dense))
        for _ in range(NUM_UPDATES):
            for key, weight in sparsifiers[0].weights.items():
                value, gradient = (torch.randn(weight.shape, generator=generator) for _ in range(2))
                gradient.round_(decimals=1)  # many ties
                for sparsifier in sparsifiers:
                    with torch.no_grad():
                        sparsifier.weights[key].copy_(value).mul_(sparsifier.masks[key].to(value.dtype))
                    sparsifier.weights[key].grad = gradient.to(sparsifier.weights[key].device, copy=True)
            for sparsifier in sparsifiers:
                sparsifier.before_step(0.3)
                sparsifier.after_step()
            cpu, other = sparsifiers
            if wrong := [key for key, mask in cpu.masks.items() if not torch.equal(mask, other.masks[key].cpu())]:
                raise SystemExit(f"{name}: the mask of {wrong[0]} differs between cpu and {given.device}")
            num += len(cpu.masks)
    results.add(
        Figure(
            "masks",
            f"{num} masks of {len(list(strategies()))} strategies are equal on cpu and {given.device}",
            {"num_masks": num},
        )
    )


def measure_packing(workload: Workload, given: Options, results: Results) -> None:
    """Time what a packed all-reduce adds on the device / the flat copy that a dense one needs."""
    setup = Setup(workload)
    gradients = [torch.randn(weight.numel(), device=weight.device) for weight in setup.sparsifier.weights.values()]
    active = [mask.flatten().nonzero().squeeze(1) for mask in setup.sparsifier.masks.values()]

    def packed() -> None:
        for gradient, indices in zip(gradients, active, strict=True):
            values = gradient.index_select(0, indices)
            gradient.zero_().index_copy_(0, indices, values)

    def dense() -> None:
        for gradient in gradients:
            gradient.copy_(gradient.clone())

    results.add(
        bar("pack and unpack / copies", [in_turn(packed, dense, rounds=3 * given.rounds) for _ in range(given.runs)])
    )


def measure_update(workload: Workload, given: Options, results: Results) -> None:
    """Time one topology update; it should take at most 20 ms."""
    for method, scope in (("rigl", "layer"), ("rigl", "global"), ("set", "layer")):
        setup = Setup(workload, method, scope)
        ms = median_ms(setup.update, rounds=given.rounds, prepare=setup.refresh)
        results.add(Figure(f"update {method} {scope}", f"{ms:.1f} ms", {"ms": ms}))


def training_step(engine: Engine, sparsifier: Sparsifier | None, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step of the loop of launchers/train.py."""

    def step() -> None:
        loss, _, norm = engine.backward(
            images, labels, lr=0.1, dense=sparsifier is None or sparsifier.needs_dense_gradient()
        )
        session.Session().agree_to_go_on(loss, norm, 0)
        if sparsifier is not None:
            sparsifier.before_step(is_finite=True, is_masked=engine.is_gradient_masked)
        engine.step()
        if sparsifier is not None:
            sparsifier.after_step()

    return step


def plain_step(model: nn.Module, images: Tensor, labels: Tensor, *, is_fused: bool) -> Callable[[], None]:
    """Return one step of plain torch: zero_grad, forward, backward, optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=is_fused)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):  # a CPU would emulate it
            loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure_steps(name: str, given: Options, results: Results) -> None:
    """Measure the parts ``step``, ``syncs`` and ``deepspeed``."""
    num_images, size = (8, 64) if given.is_quick else (given.images, 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, size, size, generator=generator).to(
        given.device, memory_format=torch.channels_last
    )
    labels = torch.randint(0, 1000, (num_images,), generator=generator).to(given.device)
    precision = "bf16" if images.is_cuda else "fp32"
    config = TrainConfig(
        engine="torch", global_batch=num_images, precision=precision, channels_last=True, weight_decay=1e-4
    )

    def sparse(engine_name: str) -> tuple[Engine, Sparsifier]:
        engine = build_engine(models.build(name), dataclasses.replace(config, engine=engine_name))
        sparsifier = Sparsifier(
            engine.model,
            engine.optimizer,
            METHODS["rigl"],
            density=DENSITY,
            seed=0,
            fragments=engine.fragments,
            on_masks=engine.use_masks,
        )
        return engine, sparsifier

    engine, sparsifier = sparse("torch")
    ours = training_step(engine, sparsifier, images, labels)
    dense = training_step(build_engine(models.build(name), config), None, images, labels)
    model = models.build(name).to(given.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = plain_step(model, images, labels, is_fused=given.device == "cuda")
    if "step" in given.only:
        pairs = {"sparse / dense step": (ours, dense), "dense / plain torch step": (dense, plain)}
        for label, (numerator, denominator) in pairs.items():
            bounds = (
                Bounds("≤ 1.02", "1.00", "1.00") if label.startswith("sparse") else Bounds("≤ 1.03", "1.00", "1.00")
            )
            result = bar(
                label, [in_turn(numerator, denominator, rounds=3 * given.rounds) for _ in range(given.runs)], bounds
            )
            results.add(result)
            rate = 1000 * num_images / result.numerator_ms
            results.add(Figure(f"{label.split(' / ')[0]} images", f"{rate:.0f} images/s", {"images_per_second": rate}))
    if "syncs" in given.only and given.device == "cuda":

        def update() -> None:
            loss, _, norm = engine.backward(images, labels, lr=0.1)
            session.Session().agree_to_go_on(loss, norm, 0)
            sparsifier.before_step(DROP_FRACTION, is_finite=True, is_masked=engine.is_gradient_masked)
            engine.step()
            sparsifier.after_step()

        numbers = {
            "plain step": host_waits(plain),
            "sparse step": host_waits(ours),
            "step with update": host_waits(update),
        }
        results.add(Figure("host waits", ", ".join(f"{label} {num}" for label, num in numbers.items()), numbers))
    if "deepspeed" in given.only:
        if importlib.util.find_spec("deepspeed") is None:
            print("deepspeed: not installed, skipped", flush=True)
            return
        theirs = training_step(*sparse("deepspeed"), images, labels)
        runs = [in_turn(theirs, ours, rounds=3 * given.rounds) for _ in range(given.runs)]
        results.add(bar("deepspeed / torch engine", runs))


def host_waits(leg: Callable[[], None]) -> int:
    """Count how often torch makes the host wait for the device in one call."""
    leg()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            leg()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def main() -> None:
    given = options(__doc__, PARTS, models=("resnet50",), quick_model="resnet18", images=256)
    if given.device == "cpu" and not given.is_quick:
        given = dataclasses.replace(given, device="cuda")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # session and engine would use a GPU that they find
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device found; --device cpu --quick tests that the code runs")
    results = Results()
    name = given.models[0]
    print(
        f"{torch.cuda.get_device_name() if given.device == 'cuda' else 'cpu'}, torch {torch.__version__}, {name}",
        flush=True,
    )
    with session.session(threads_per_rank=given.threads):
        if "masks" in given.only:
            compare_masks(given, results)
        workload = Workload.named(name, given.device)
        if "packing" in given.only:
            measure_packing(workload, given, results)
        if "update" in given.only:
            measure_update(workload, given, results)
        del workload
        if {"step", "syncs", "deepspeed"} & set(given.only):
            measure_steps(name, given, results)
    results.write(given.json)
    leave(0)


if __name__ == "__main__":
    main()
